"""Answers of best-of-n with their scores, in the files of the paper's code: of each reward model, and of
ensembles of several.

    runs/<DIR>/seed1/proxy_labelled_sorted.json     [{"instruction", "answers", "proxy_scores", "gold_scores",
                                                      "indices"}], each list sorted by proxy score
    runs/<DIR>/seed1/bon_sampled_results.json       [{"n", "proxy_score", "gold_score"}]
    runs/<DIR>/seed1/results.json                   the same with intervals, for `conch overoptimisation`

`indices` are the answers' places before sorting, by which scores of several models are brought together; the
paper's code writes none, and its answers are found by their texts.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from conch.atomic_files import replace_text
from conch.config import DataConfig
from conch.data.files import read_rows
from conch.errors import ConfigError, DataError, missing_path
from conch.evaluation.best_of_n import best_of_n, check_ns
from conch.evaluation.curves import RESULTS, Start, results_json
from conch.evaluation.records import GOLD, PROXY

SORTED = "proxy_labelled_sorted.json"
SAMPLED = "bon_sampled_results.json"
DEFAULT_NS = (*(2**power for power in range(13)), 6144, 8192, 12500)
_VARIANCE = "members_variance"
_ANSWERS = ("answers", "generations", "outputs")
_PUBLISHED_SPLIT = ":validation"

Variance = Literal["population", "sample"]


@dataclass(frozen=True)
class Entry:
    """Answers to one instruction.

    row: what else the row has: "instruction", "input".
    gold: one score per answer.
    """

    row: Mapping[str, Any]
    answers: tuple[str, ...]
    gold: np.ndarray

    @property
    def instruction(self) -> str:
        """The instruction, and the input where there is one."""
        parts = (self.row["instruction"], self.row.get("input"))
        return "\n".join(str(part) for part in parts if part)


def read_entries(source: str, big_n: int) -> list[Entry]:
    """Read answers that gold has scored.

    source: a file, a folder, or a dataset of the hub, whose split is `validation` unless one is named.
    big_n: answers to take of each row, the first ones.

    Raises:
        DataError: the source cannot be read, or no row is such.
    """
    is_hub_name = "/" in source and ":" not in source and not Path(source).exists()
    suffix = Path(source.removesuffix(".gz")).suffix
    if is_hub_name and suffix not in (".json", ".jsonl", ".csv", ".parquet"):
        source += _PUBLISHED_SPLIT
    rows = read_rows(source, DataConfig(), form=_entry)
    return [Entry(each.row, each.answers[:big_n], each.gold[:big_n]) for each in rows]


def _entry(row: Any) -> Entry:
    if not isinstance(row, Mapping):
        raise DataError("is no object")
    key = next((name for name in _ANSWERS if name in row), None)
    if key is None or not isinstance(row.get("instruction"), str) or "gold_scores" not in row:
        raise DataError(
            f"has the keys {', '.join(map(str, row)) or 'of an empty object'}, and needs `instruction`, "
            "`answers` and `gold_scores`"
        )
    answers = tuple(row[key])
    gold = np.array([np.nan if score is None else score for score in row["gold_scores"]], dtype=float)
    if not answers or len(answers) != len(gold) or not all(isinstance(each, str) for each in answers):
        raise DataError(f"has {len(answers)} {key} and {len(gold)} gold_scores: one score per text is needed")
    return Entry({name: row[name] for name in ("instruction", "input") if name in row}, answers, gold)


def choices(ns: Sequence[int] | None, num_samples: int) -> list[int]:
    """The n that are asked for, or those of the paper that the answers give.

    Raises:
        DataError: one exceeds the number of answers.
    """
    if ns is None:
        return [n for n in DEFAULT_NS if n <= num_samples]
    check_ns(ns, num_samples)
    return sorted(set(ns))


def write_scored(
    folder: Path,
    entries: Sequence[Entry],
    proxies: Sequence[np.ndarray],
    ns: Sequence[int] | None,
    *,
    sources: Mapping[str, str],
    variances: Sequence[np.ndarray] | None = None,
) -> None:
    """Write a model's or an ensemble's files.

    proxies, variances: of each entry one number per answer, in the order of its answers.
    sources: "reward" and "gold" -> what gave them, for people.

    Raises:
        DataError: see `choices`.
        ConfigError: they cannot be written.
    """
    columns: list[dict[str, np.ndarray]] = [
        {PROXY: proxy, GOLD: entry.gold} for entry, proxy in zip(entries, proxies, strict=True)
    ]
    for each, variance in zip(columns, variances or (), strict=False):
        each[_VARIANCE] = variance
    fewest = min(len(entry.answers) for entry in entries)
    result = best_of_n(columns, choices(ns, fewest), proxy=PROXY)
    starts = {name: Start.of(np.concatenate([each[name] for each in columns])) for name in (PROXY, GOLD)}
    content = results_json(result, starts, sources, "" if variances is None else _VARIANCE)
    seeds_form = [{key: row[key] for key in ("n", "proxy_score", "gold_score")} for row in content["results"]]
    ordered = [_sorted(entry, proxy) for entry, proxy in zip(entries, proxies, strict=True)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in ((SORTED, ordered), (SAMPLED, seeds_form), (RESULTS, content)):
            replace_text(folder / name, json.dumps(value, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}") from error


def _sorted(entry: Entry, proxy: np.ndarray) -> dict[str, Any]:
    order = np.argsort(proxy, kind="stable").tolist()
    gold: list[float | None] = [None if np.isnan(score) else float(score) for score in entry.gold]
    return {
        **entry.row,
        "answers": [entry.answers[place] for place in order],
        "proxy_scores": [float(proxy[place]) for place in order],
        "gold_scores": [gold[place] for place in order],
        "indices": order,
    }


def read_sorted(path: Path) -> tuple[list[Entry], list[np.ndarray]]:
    """Read a model's answers and proxy scores, in the order from before sorting where the file tells it.

    Raises:
        DataError: it is missing, damaged or of another format.
    """
    try:
        rows = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: run run_bon_pipeline.py for this seed first{missing_path(path)}"
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    entries: list[Entry] = []
    proxies: list[np.ndarray] = []
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        try:
            entry = _entry(row)
            proxy = np.array(row["proxy_scores"], dtype=float)
            before = np.argsort(row.get("indices", range(len(proxy))), kind="stable")
            if len(proxy) != len(entry.answers) or len(before) != len(proxy):
                raise DataError(f"has {len(proxy)} proxy_scores for {len(entry.answers)} answers")
        except (DataError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"entry {number} of {path} {error}") from error
        answers = tuple(entry.answers[place] for place in before)
        entries.append(Entry(entry.row, answers, entry.gold[before]))
        proxies.append(proxy[before])
    return entries, proxies


def aligned(
    models: Sequence[tuple[Sequence[Entry], Sequence[np.ndarray]]],
) -> tuple[list[Entry], list[np.ndarray]]:
    """Bring the scores of several models to the order of the first one's answers.

    models: entries and proxy scores of each.

    Returns:
        the first one's entries, and for each the scores [members, answers].

    Raises:
        DataError: they have other instructions or answers.
    """
    first, _ = models[0]
    tables: list[np.ndarray] = []
    for number, entry in enumerate(first):
        rows: list[np.ndarray] = []
        for entries, proxies in models:
            if (
                len(entries) != len(first)
                or entries[number].row.get("instruction") != entry.row["instruction"]
            ):
                raise DataError("the seeds were scored on other instructions: score all on the same answers")
            rows.append(proxies[number][_places(entries[number].answers, entry.answers)])
        tables.append(np.stack(rows))
    return list(first), tables


def _places(answers: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Where the wanted answers stand; of equal texts each is taken once."""
    if tuple(answers) == tuple(wanted):
        return [*range(len(answers))]
    places: defaultdict[str, deque[int]] = defaultdict(deque)
    for place, answer in enumerate(answers):
        places[answer].append(place)
    try:
        found = [places[answer].popleft() for answer in wanted]
    except IndexError:
        found = []
    if len(found) != len(answers):
        raise DataError("the seeds were scored on other answers: score all on the same file")
    return found


def objective_of(
    scores: np.ndarray, objective: str, weight: float = 0.0, variance: Variance = "population"
) -> tuple[np.ndarray, np.ndarray]:
    """The ensemble's score of each answer, and its members' variance.

    scores: [members, answers].
    objective: `mean`, `WCO` (the least) or `UWO` (mean less `weight` times the variance).
    variance: divided by the number of members, or by one less.

    Raises:
        ConfigError: one member has no variance over n - 1.
    """
    if variance == "sample" and len(scores) < 2:
        raise ConfigError("variance=sample divides by one less than the members, and there is one member")
    spread = scores.var(axis=0, ddof=1 if variance == "sample" else 0)
    if objective == "WCO":
        return scores.min(axis=0), spread
    mean = scores.mean(axis=0)
    return (mean, spread) if objective == "mean" else (mean - weight * spread, spread)

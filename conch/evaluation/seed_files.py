"""Evaluations in the files of the code of Coste et al. 2023 (arXiv:2310.02743), and records made of them.

`<folder>/eval-<k>.json`, k counting evaluations from 0, is a list of rows, one a prompt:

    {"instruction": "...", "answers": ["...", ...], "proxy_scores": [1.5, ...],
     "ensemble_variance": [0.1, ...], "gold_scores": [0.7, ...], "kl_list": [...]}

The first row alone has `kl_list`. In those files it holds estimates from two samples of each rollout so far,
which nothing pairs with evaluations; so no KL is read from it. What is written here has in it the KL of each
evaluation so far, and more keys, of the first row:

    kl          KL from the start, in nats per sample, over this evaluation's samples
    step        steps of training
    variant     suffix of a swept generation argument
    sources     name of a score -> what gave it

and of each row:

    prompt          what the policy read: a text, or messages
    input           the instruction's input, where it has one
    member_scores   member -> scores, one an answer
    num_tokens      tokens, one an answer
    metadata        the prompt's extra keys

A row's score k is that of its answer k, whatever the order of the answers, and equal answers have scores of
their own. A score that could not be had is null.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conch.atomic_files import replace_text
from conch.errors import ConfigError, DataError, missing_path
from conch.evaluation.records import (
    EVALUATIONS,
    GOLD,
    PROXY,
    EvaluatedSample,
    EvaluationRecord,
    read_record,
    records_of,
    write_record,
)

RECORD = ".jsonl"
"""Suffix of records of Conch's own."""

_NAME = re.compile(r"eval-(\d+)\.json")
_VARIANT = re.compile(r"step_\d+((?:@.+)?)\.jsonl")
_SCORES = "_scores"
_COLUMN_OF = {"proxy": PROXY, "gold": GOLD}
"""Beginning of a key of scores -> name of the score in a record."""
_MEMBERS = "member_scores"


def evaluation_files(where: Path) -> list[Path]:
    """Evaluations of a run's folder or of a folder of evaluations, variants included, in the order of steps.

    Raises:
        ConfigError: there are none.
    """
    if not where.is_dir():
        raise ConfigError(f"{where} is no folder of evaluations{missing_path(where)}")
    folder = where / EVALUATIONS if (where / EVALUATIONS).is_dir() else where
    variants = {match[1] for path in folder.iterdir() if (match := _VARIANT.fullmatch(path.name))}
    found = [path for variant in sorted(variants) for path in records_of(folder, variant)]
    found = found or seed_files_of(folder) or seed_files_of(where / "eval")
    if not found:
        raise ConfigError(
            f"{where} holds no evaluations, neither step_<n>.jsonl nor eval-<k>.json: name the folder of a "
            "run that evaluated (train.eval_every above 0, evaluation.keep=true), or that of its evaluations"
        )
    return found


def read_evaluation(path: Path) -> EvaluationRecord:
    """Read an evaluation of either format.

    Raises:
        DataError: it is damaged, or has no samples.
    """
    record = read_record(path) if path.suffix == RECORD else read_seed_file(path)
    if not record.samples:
        raise DataError(f"the evaluation {path} holds no samples: delete it, or evaluate again")
    return record


def write_evaluation(path: Path, record: EvaluationRecord) -> None:
    """Write scores into the file that a record was read from.

    Raises:
        DataError: the disk failed; the old content stays.
    """
    try:
        (write_record if path.suffix == RECORD else add_scores)(path, record)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}") from error


def seed_files_of(folder: Path) -> list[Path]:
    """Files `eval-<k>.json` of a folder, by k; empty where it has none."""
    found = {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _NAME.fullmatch(path.name))
    }
    return [found[number] for number in sorted(found)]


def read_seed_file(path: Path) -> EvaluationRecord:
    """Read a file as a record: a sample an answer, those of a row together.

    The step is k where the file does not tell it. Of `ensemble_variance` the mean becomes the metric
    `eval/members_variance`; a file that does not name its members has no more of them.

    Raises:
        DataError: the file is missing, damaged (the row is named) or of another format.
    """
    rows = read_rows(path)
    samples = [sample for number, row in enumerate(rows) for sample in _samples(path, number, row)]
    head = rows[0]
    match = _NAME.fullmatch(path.name)
    step = head.get("step", int(match[1]) if match else 0)
    variances = [value for row in rows for value in row.get("ensemble_variance") or () if _is_number(value)]
    metrics: dict[str, float | None] = {}
    if variances:
        metrics["eval/members_variance"] = math.fsum(variances) / len(variances)
    if _is_number(head.get("kl")):
        metrics["eval/kl"] = float(head["kl"])
    return EvaluationRecord(
        step, tuple(samples), metrics, head.get("variant") or "", dict(head.get("sources") or {})
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file as they stand in it.

    Raises:
        DataError: the file is missing, damaged or of another format.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"the evaluation {path} cannot be read: {error}{missing_path(path)}") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} is no evaluation: it holds no list of rows with `instruction` and `answers`")
    if not rows:
        raise DataError(f"{path} holds no rows")
    for number, row in enumerate(rows):
        answers = row.get("answers")
        if not isinstance(row.get("instruction"), str) or not _are_texts(answers):
            raise DataError(
                f"{path} is no evaluation: row {number} has no text `instruction` with a list of `answers`"
            )
        for key in _score_keys(row):
            if not isinstance(row[key], list) or len(row[key]) != len(answers):
                raise DataError(
                    f"{path} is damaged: row {number} has {len(answers)} answers, and `{key}` is no list of "
                    "as many scores"
                )
    return rows


def _score_keys(row: Mapping[str, Any]) -> list[str]:
    """Keys with a score an answer; `datasets` writes null where a row has none."""
    return [
        key
        for key, value in row.items()
        if value is not None and key != _MEMBERS and (key.endswith(_SCORES) or key == "ensemble_variance")
    ]


def _samples(path: Path, number: int, row: Mapping[str, Any]) -> list[EvaluatedSample]:
    columns = {_column(key): row[key] for key in _score_keys(row) if key.endswith(_SCORES)}
    members = row.get(_MEMBERS) or {}
    answers, tokens = row["answers"], row.get("num_tokens") or [0] * len(row["answers"])
    if any(len(column) != len(answers) for column in [tokens, *members.values()]):
        raise DataError(f"{path} is damaged: row {number} has not one score of each member for each answer")
    return [
        EvaluatedSample(
            number,
            prompt_of(row),
            answer,
            tokens[place],
            {name: _score(scores[place]) for name, scores in columns.items()},
            {name: _score(scores[place]) for name, scores in members.items()},
            row.get("metadata") or {},
        )
        for place, answer in enumerate(answers)
    ]


def prompt_of(row: Mapping[str, Any]) -> str | list[Mapping[str, Any]]:
    """What the policy read of a row: `prompt`, else the instruction with the row's `input` below."""
    if row.get("prompt"):
        return row["prompt"]
    return row["instruction"] + (f"\n{row['input']}" if row.get("input") else "")


def add_scores(path: Path, record: EvaluationRecord) -> None:
    """Write a record's scores into the file that it was read from; all else of the file stays.

    Raises:
        OSError: the disk failed; the old content stays.
    """
    rows, place = read_rows(path), 0
    for row in rows:
        samples = record.samples[place : place + len(row["answers"])]
        place += len(samples)
        for name in dict.fromkeys(name for sample in samples for name in sample.scores):
            row[_key(name)] = [sample.scores.get(name) for sample in samples]
    if record.sources:
        rows[0]["sources"] = dict(record.sources)
    _write(path, rows)


def write_seed_file(
    path: Path,
    record: EvaluationRecord,
    *,
    kls: Sequence[float | None],
) -> None:
    """Write a record as such a file, or replace it.

    kls: KL from the start of each evaluation so far, this one's last.

    Raises:
        OSError: the disk failed; the old content stays.
    """
    groups: dict[int, list[EvaluatedSample]] = {}
    for sample in record.samples:
        groups.setdefault(sample.prompt, []).append(sample)
    rows = [_row(samples) for samples in groups.values()]
    if rows:
        kl = record.metrics.get("eval/kl")
        head = {"kl": kl, "step": record.step, "variant": record.variant, "sources": dict(record.sources)}
        rows[0] |= {"kl_list": list(kls), **head}
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, rows)


def _row(samples: Sequence[EvaluatedSample]) -> dict[str, Any]:
    first = samples[0]
    row: dict[str, Any] = {**_instruction(first), "answers": [sample.output for sample in samples]}
    for name in dict.fromkeys([PROXY, *(name for sample in samples for name in sample.scores)]):
        row[_key(name)] = [sample.scores.get(name) for sample in samples]
    # One score does not vary: a run without members has 0.
    row["ensemble_variance"] = [sample.variance if sample.members else 0.0 for sample in samples]
    members = dict.fromkeys(name for sample in samples for name in sample.members)
    if members:
        row[_MEMBERS] = {name: [sample.members.get(name) for sample in samples] for name in members}
    row["num_tokens"] = [sample.num_tokens for sample in samples]
    if first.metadata:
        row["metadata"] = dict(first.metadata)
    return {**row, "prompt": first.input}


def _instruction(sample: EvaluatedSample) -> dict[str, str]:
    """What the prompt was made of, where its row told it; else a text prompt as it is, of messages the user's
    last."""
    told = {key: sample.metadata[key] for key in ("instruction", "input") if sample.metadata.get(key)}
    if not all(isinstance(value, str) for value in told.values()) or "instruction" not in told:
        return {"instruction": _asked(sample)}
    return told


def _asked(sample: EvaluatedSample) -> str:
    if isinstance(sample.input, str):
        return sample.input
    said = [message for message in sample.input if message.get("role") == "user"] or sample.input[-1:]
    content = said[-1].get("content") if said else ""
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def write_seed_files(records: Sequence[Path], folder: Path) -> list[Path]:
    """Write records of a run, in the order of their steps, as `eval-0.json`, `eval-1.json`, ...

    Raises:
        DataError: a record cannot be read.
        OSError: the disk failed.
    """
    kls: list[float | None] = []
    written = []
    for number, path in enumerate(records):
        record = read_record(path)
        kls.append(record.metrics.get("eval/kl"))
        written.append(folder / f"eval-{number}.json")
        write_seed_file(written[-1], record, kls=kls)
    return written


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = json.dumps(rows, ensure_ascii=False, indent=4, default=str)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which UTF-8 has no place for
        text = json.dumps(rows, indent=4, default=str)
    replace_text(path, text)


def _column(key: str) -> str:
    name = key.removesuffix(_SCORES)
    return _COLUMN_OF.get(name, name)


def _key(column: str) -> str:
    names = {column: name for name, column in _COLUMN_OF.items()}
    return names.get(column, column) + _SCORES


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, str) for value in values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _score(value: Any) -> float | None:
    return float(value) if _is_number(value) else None

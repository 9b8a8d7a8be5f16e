"""Runs on a disk, read from their folders: how they stand, and what differs in their settings. No torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from conch.config import Section
from conch.config.algorithms import run_config_of
from conch.errors import ConfigError, DataError, first_line, missing_path
from conch.runs.state import BEST_METRIC_FILE, CONFIG_FILE, METRICS_FILE, STATE_FILE, read_state

PLACES = ("train.run_dir", "train.output_dir", "train.resume")
"""Settings that say where a run is, which differ wherever two runs do."""

_ALGORITHMS = ("ppo", "grpo", "rft", "ilql", "sft", "reward_model")
_NOT_BELOW = {"checkpoints", "samples", "evaluations", "rollouts", "tensorboard", "wandb", "servers"}
"""Folders of a run that hold no further runs, and many files."""


@dataclass(frozen=True, slots=True)
class RunSummary:
    """How a run stands.

    algorithm: "" where nothing tells.
    state: `running`, `finished`, `stopped`, `failed`, `killed`.
    step, total_steps: done and asked for; None where nothing tells.
    metric: by which it chooses its best checkpoint; "" before the first evaluation.
    best, best_step: value of the best evaluation so far, and its step.
    changed: when it last wrote a step, in seconds since the epoch.
    reason: what made it fail.
    """

    folder: Path
    algorithm: str
    state: str
    step: int | None
    total_steps: int | None
    metric: str
    best: float | None
    best_step: int | None
    changed: float
    reason: str = ""


def find_runs(folder: Path) -> list[Path]:
    """Return the folders of all runs in and below `folder`, those that were written to last first.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}{missing_path(folder)}")
    return sorted(_run_folders(folder), key=_changed, reverse=True)


def _run_folders(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        # A training service has a `run.json` of another kind around the folder of a run.
        if METRICS_FILE in files or (STATE_FILE in files and read_state(Path(place)) is not None):
            yield Path(place)
            folders[:] = [name for name in folders if name not in _NOT_BELOW]


def _changed(run: Path) -> float:
    times = [file.stat().st_mtime for file in (run / METRICS_FILE, run / STATE_FILE) if file.is_file()]
    return max(times, default=0.0)


def summarise(run: Path) -> RunSummary:
    """Read how the run in this folder stands, also one that runs just now or wrote no `run.json`."""
    try:
        settings = read_settings(run)
    except DataError:  # a list of runs passes over what one of them has damaged
        settings = {}
    return summary_of(run, settings, _rows(run))


def summary_of(run: Path, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> RunSummary:
    """Tell how the run in this folder stands.

    settings: section by section, as of `read_settings`.
    rows: metrics of its steps.
    """
    state = read_state(run)
    step = max((row["step"] for row in rows), default=None)
    total = state.total_steps if state else (settings.get("train") or {}).get("total_steps")
    metric, best = _best(run, rows)
    if state is None:
        algorithm = algorithm_of(settings)
        stands = "finished" if step is not None and total is not None and step >= total else "stopped"
    else:
        algorithm, stands = state.algorithm, state.state
    at, value = best or (None, None)
    reason = state.reason if state else ""
    return RunSummary(run, algorithm, stands, step, total, metric, value, at, _changed(run), reason)


def algorithm_of(settings: Mapping[str, Any]) -> str:
    """Return the algorithm that these sections are of, as `conch train` names it; "" where none tells."""
    if "asynchronous" in settings:
        return "async_grpo"
    return next((name for name in _ALGORITHMS if name in settings), "")


def read_settings(run: Path) -> dict[str, Any]:
    """Return the resolved configuration of the run in a folder, section by section; {} where it wrote none.

    Raises:
        DataError: `config.yaml` is damaged, or cannot be read.
    """
    path = run / CONFIG_FILE
    try:
        settings = yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:  # also where the bytes are no text
        raise DataError(f"{path} is damaged: {first_line(error)}") from error
    if not isinstance(settings, dict):
        raise DataError(f"{path} is damaged: no mapping of sections")
    return settings


def labelled_runs(words: Sequence[str]) -> dict[str, Path]:
    """Return label -> folder, for words of a command line: `folder`, or `label=folder`.

    Without a label it is as much of a folder's end as tells the runs apart.

    Raises:
        ConfigError: a label stands twice.
    """
    named = [split_label(word) for word in words]
    endings = _endings([path.resolve() for label, path in named if not label])
    labels = [label or endings[path.resolve()] for label, path in named]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ConfigError(f"two runs are called {twice[0]}: give one of them a label, label=folder")
    return dict(zip(labels, (path for _, path in named), strict=True))


def split_label(word: str) -> tuple[str, Path]:
    """Return label and folder of `label=folder`; of a folder alone, "" and the folder."""
    label, equals, folder = word.partition("=")
    is_named = bool(equals and label and folder) and not Path(word).exists()
    return (label, Path(folder)) if is_named else ("", Path(word))


def _endings(folders: Sequence[Path]) -> dict[Path, str]:
    """Each folder's last parts, as many as it takes to tell all of them apart."""
    length = 1
    while True:
        endings = {folder: "/".join(folder.parts[-length:]) for folder in folders}
        if len(set(endings.values())) == len(endings):
            return endings
        length += 1


def differences(runs: Sequence[Path]) -> dict[str, list[Any]]:
    """Return what differs between the settings of runs: full name -> value in each, `...` where one has none.

    Raises:
        DataError: a folder is no run's, or its `config.yaml` is damaged.
    """
    settings = [dict(flat(_settings_of_run(run))) for run in runs]
    names = dict.fromkeys(name for each in settings for name in each)
    values = {name: [each.get(name, ...) for each in settings] for name in names}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}


def defaults_of(algorithm: str) -> dict[str, Any]:
    """Full name -> default of an algorithm's keys, without those that are required; {} where it is ""."""
    return dict(flat(_defaults(run_config_of(algorithm)))) if algorithm else {}


def _defaults(section: type[Section]) -> dict[str, Any]:
    """Defaults of a section's keys; of a section in it that must be given, those of its own keys."""
    values: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if not field.is_required():
            values[name] = _plain(field.get_default(call_default_factory=True, validated_data={}))
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            values[name] = _defaults(field.annotation)
    return values


def _plain(value: Any) -> Any:
    """The value as a resolved configuration has it: sections as mappings, paths as texts."""
    if isinstance(value, Section):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def told_differences(runs: Sequence[Path], *, everything: bool = False) -> dict[str, list[Any]]:
    """Return the `differences` that a reader wants to know, below the `algorithm` where that differs.

    Left out are settings that say where a run is, and, of keys that not every run has, those that stand at
    the defaults of their algorithm.

    everything: leave nothing out.

    Raises:
        DataError: see `differences`.
    """
    found = differences(runs)
    algorithms = [algorithm_of(_settings_of_run(run)) for run in runs]
    head = {"algorithm": list[Any](algorithms)} if len(set(algorithms)) > 1 else {}
    if everything:
        return head | found
    defaults = [defaults_of(algorithm) for algorithm in algorithms]
    return head | {
        name: values
        for name, values in found.items()
        if name not in PLACES and not _stands_at_defaults(name, values, defaults)
    }


def _stands_at_defaults(name: str, values: Sequence[Any], defaults: Sequence[Mapping[str, Any]]) -> bool:
    """Whether some runs lack a key, and it has its default in all others."""
    pairs = [(value, usual.get(name, ...)) for value, usual in zip(values, defaults, strict=True)]
    return ... in values and all(value in (..., default) for value, default in pairs)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Full name and value of each setting; lists and empty mappings are values."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _settings_of_run(run: Path) -> dict[str, Any]:
    path = run / CONFIG_FILE
    if not path.is_file():
        raise DataError(f"{run} is no run's folder: there is no {path}{missing_path(path)}")
    return read_settings(run)


def _rows(run: Path) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl` that are whole: the last may be under way."""
    try:
        lines = (run / METRICS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _best(run: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[str, tuple[int, float] | None]:
    """The metric by which a run chooses its best checkpoint, and the best evaluation with its step."""
    try:
        metric = (run / BEST_METRIC_FILE).read_text(encoding="utf-8").strip()
    except OSError:
        return "", None
    sign = -1 if metric.endswith("loss") else 1
    points = [(row["step"], row[metric]) for row in rows if isinstance(row.get(metric), int | float)]
    finite = [(step, float(value)) for step, value in points if math.isfinite(value)]
    # Of equal values the first, as the run itself chooses.
    return metric, max(finite, key=lambda point: (sign * point[1], -point[0]), default=None)

"""What the page shows of run folders, as JSON values: small, and readable piece by piece.

Samples come in *blocks*, one for each file, with a column for each figure; prompts and metadata stand once
in a list of strings that blocks point into. A page that knows blocks and strings up to some version gets only
those that are newer, so the same `update` makes a whole report and keeps a live one up to date.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from conch import __version__
from conch.errors import ConchError, first_line
from conch.report.settings import compare
from conch.runs.listing import algorithm_of, defaults_of, flat, summary_of
from conch.runs.reading import ALARMS_FILE, Run, SampleFile, load, read_samples
from conch.runs.state import BEST_METRIC_FILE, CONFIG_FILE, METRICS_FILE, STATE_FILE

MAX_POINTS = 5000
"""Points of a curve; of longer ones the lowest and the highest of each stretch are kept."""

_TEXT_COLUMNS = ("status", "finish_reason", "policy_version")
_NOT_NUMBERS = ("source", "step", "variant", "prompt", "output", "metadata", "messages", *_TEXT_COLUMNS)
_FILES = (METRICS_FILE, STATE_FILE, CONFIG_FILE, BEST_METRIC_FILE, ALARMS_FILE)
_STATE_S = 30.0
"""Seconds after which a run is looked at again that has written nothing: it may have been killed."""

_LONG_WAIT_S = 5.0
_LONG_WAIT_FACTOR = 20.0
"""A step that waits for rewards longer than both is taken for an outage."""


@dataclass
class _Strings:
    """Strings by their place in a list that only grows."""

    listed: list[str] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)

    def place(self, text: str) -> int:
        place = self._places.setdefault(text, len(self.listed))
        if place == len(self.listed):
            self.listed.append(text)
        return place


@dataclass
class _Block:
    """A file's samples as they were last read.

    stamp: of the file.
    version: of the collector then.
    total: samples of the file.
    cap: how many of them were asked for.
    content: what the page gets.
    """

    stamp: tuple[int, int]
    version: int
    total: int
    cap: int
    content: dict[str, Any]


class Collector:
    """Reads run folders again and again, and tells what is new.

    runs: label -> folder.
    max_samples: most samples of a run; of each file the first ones are kept, which are of the same prompts.

    Raises:
        DataError: a folder is no run.
    """

    def __init__(self, runs: Mapping[str, Path], max_samples: int) -> None:
        self._runs = {label: load(folder) for label, folder in runs.items()}
        self._max_samples = max_samples
        self._strings = _Strings()
        self._blocks: dict[str, _Block] = {}
        self._defaults: dict[str, dict[str, Any]] = {}
        self._shown: list[dict[str, Any]] = []
        self._settings: dict[str, Any] = {}
        self._flat: dict[int, dict[str, Any]] = {}
        self._weights: dict[int, Mapping[str, float]] = {}
        self._known: dict[int, tuple[Any, float, dict[str, Any]]] = {}
        self._next = 0
        self.version = 0
        """Grows whenever something is new."""

    def refresh(self, *, patient: bool = False) -> None:
        """Read what has changed.

        patient: note a damaged or vanished file in the run's `error` instead of raising: it may be better a
            moment later.

        Raises:
            DataError: a file is damaged.
        """
        before = (self._shown, self._settings, self._blocks.keys() | set())
        self._next = self.version + 1
        shown: list[dict[str, Any]] = []
        settings: list[dict[str, Any]] = []
        valid: set[str] = set()
        for number, (label, run) in enumerate(self._runs.items()):
            error, read = "", dict[str, Any]()
            try:
                read = {**self._about(number, run), **self._read_samples(number, run, valid)}
            except (ConchError, OSError) as reason:
                if not patient:
                    raise
                error = first_line(reason)
            last = self._shown[number] if number < len(self._shown) else {}
            shown.append({**last, **read, "label": label, "folder": str(run.folder), "error": error})
            settings.append(self._flat.get(number, {}))
            if error:  # what was read of it before stays
                valid.update(name for name, block in self._blocks.items() if block.content["run"] == number)
        for name in self._blocks.keys() - valid:
            del self._blocks[name]
        self._shown = shown
        defaults = [self._defaults_of(run.get("algorithm", "")) for run in shown]
        self._settings = compare(settings, defaults)
        is_new = any(block.version == self._next for block in self._blocks.values())
        if is_new or before != (self._shown, self._settings, self._blocks.keys() | set()):
            self.version = self._next

    def update(self, *, since: int = 0, known_strings: int = 0) -> dict[str, Any]:
        """What a page needs that knows everything up to the version `since`, and so many strings."""
        return {
            "conch": __version__,
            "made": time.time(),
            "version": self.version,
            "runs": self._shown,
            "settings": self._settings,
            "first_string": known_strings,
            "strings": self._strings.listed[known_strings:],
            "ids": list(self._blocks),
            "blocks": [block.content for block in self._blocks.values() if block.version > since],
        }

    def _about(self, number: int, run: Run) -> dict[str, Any]:
        """What `about` says of a run; what it said last, for a while, where its files are as they were."""
        stamps = [_stamp(run.folder / name) for name in _FILES if (run.folder / name).exists()]
        known = self._known.get(number)
        if known is None or known[0] != stamps or time.monotonic() - known[1] > _STATE_S:
            settings = run.settings
            self._flat[number] = dict(flat(settings))
            self._weights[number] = (settings.get("reward") or {}).get("weights") or {}
            known = self._known[number] = (stamps, time.monotonic(), about(run, settings))
        return known[2]

    def _defaults_of(self, algorithm: str) -> dict[str, Any]:
        if algorithm not in self._defaults:
            self._defaults[algorithm] = defaults_of(algorithm)
        return self._defaults[algorithm]

    def _read_samples(self, number: int, run: Run, valid: set[str]) -> dict[str, Any]:
        """Read the files that are new, and say how many samples there are.

        valid: names of blocks that are to stay, which grows.
        """
        files = {f"{number}/{file.path.relative_to(run.folder)}": file for file in run.sample_files()}
        stamps = {name: _stamp(file.path) for name, file in files.items()}
        known = self._blocks
        unchanged = {name for name, stamp in stamps.items() if name in known and known[name].stamp == stamp}
        totals = {
            name: self._blocks[name].total if name in unchanged else count_samples(file)
            for name, file in files.items()
        }
        cap = rows_of_each(list(totals.values()), self._max_samples)
        for name, file in files.items():
            wanted = min(cap, totals[name])
            if name not in unchanged or wanted != self._blocks[name].cap:
                rows = list(islice(read_samples(file, self._weights[number]), wanted))
                content = self._block(name, number, file, rows)
                self._blocks[name] = _Block(stamps[name], self._next, totals[name], wanted, content)
        valid.update(files)
        shown = sum(len(self._blocks[name].content["output"]) for name in files)
        return {"samples": max(shown, sum(totals.values())), "samples_shown": shown}

    def _block(
        self, name: str, number: int, file: SampleFile, rows: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Columns of rows of a file."""
        names = dict.fromkeys(key for row in rows for key in row if key not in _NOT_NUMBERS)
        columns = {key: [_short(row.get(key)) for row in rows] for key in names}
        texts = {key: [_as_text(row.get(key)) for row in rows] for key in _TEXT_COLUMNS}
        block = {
            "id": name,
            "run": number,
            "source": file.source,
            "step": file.step,
            "variant": file.variant,
            "version": self._next,
            "prompt": [self._strings.place(_whole(row["prompt"])) for row in rows],
            "output": [_whole(row["output"]) for row in rows],
            "columns": {key: column for key, column in columns.items() if any(v is not None for v in column)},
            "texts": {key: column for key, column in texts.items() if any(column)},
        }
        if any(row.get("metadata") for row in rows):
            block["metadata"] = [
                self._strings.place(_whole(json.dumps(row["metadata"], ensure_ascii=False, default=str)))
                if row.get("metadata")
                else -1
                for row in rows
            ]
        return block


def count_samples(file: SampleFile) -> int:
    """Samples of a file, without reading them: its lines; one too many while the last is being written."""
    content = file.path.read_bytes()
    lines = content.count(b"\n") + (not content.endswith(b"\n"))
    return max(0, lines - (file.source != "rollout"))  # an evaluation and a table have a head


def rows_of_each(totals: Sequence[int], most: int) -> int:
    """How many rows of each file there is room for, where all may have `most` together.

    Rounded down where not all fit, so that one file more seldom changes it.
    """
    room, left = most, sorted(totals)
    while left and left[0] * len(left) <= room:
        room -= left.pop(0)
    if not left:
        return max(totals, default=0)
    each = max(1, room // len(left))
    return each - each % max(1, 2 ** (each.bit_length() - 4))


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def about(run: Run, settings: Mapping[str, Any]) -> dict[str, Any]:
    """State, curves, alarms and what became of the reward server.

    settings: of the run, section by section.
    """
    rows = run.metrics()
    summary = summary_of(run.folder, settings, rows)
    return {
        "algorithm": algorithm_of(settings),
        "state": summary.state,
        "reason": summary.reason,
        "step": summary.step or 0,
        "total_steps": summary.total_steps,
        "best_metric": summary.metric,
        "best": summary.best,
        "best_step": summary.best_step,
        "updated": summary.changed,
        "checkpoints": list(run.checkpoints),
        **curves(rows),
        "alarms": run.alarms(),
        "incidents": incidents(rows),
    }


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each metric's points: `series` has name -> [place among `axes`, values], `axes` lists of steps.

    Steps without a number are left out.
    """
    points: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                steps, values = points.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(float(value))
    places: dict[tuple[int, ...], int] = {}
    series: dict[str, Any] = {}
    for name in sorted(points):
        steps, values = thinned(*points[name])
        place = places.setdefault(tuple(steps), len(places))
        series[name] = [place, [_short(value, digits=7) for value in values]]
    return {"axes": [list(axis) for axis in places], "series": series}


def thinned(
    steps: Sequence[int], values: Sequence[float], most: int = MAX_POINTS
) -> tuple[list[int], list[float]]:
    """At most so many points: the lowest and the highest of each stretch, so that no peak is lost."""
    if len(steps) <= most:
        return list(steps), list(values)
    stretches = most // 2
    kept: list[int] = []
    for k in range(stretches):
        stretch = range(k * len(steps) // stretches, (k + 1) * len(steps) // stretches)
        kept += sorted({min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)})
    return [steps[place] for place in kept], [values[place] for place in kept]


def incidents(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Stretches of steps in which rewards did not come as they should, by their first step.

    Returns:
        dicts of `kind` (failed, waited, retried or degraded), `first` and `last` step, and `text`.
    """
    waits = [row["reward/wait_s"] for row in rows if row.get("reward/wait_s") is not None]
    long_s = max(_LONG_WAIT_S, _LONG_WAIT_FACTOR * median(waits)) if waits else math.inf
    figures = {
        "failed": ("reward/failed_fraction", 0.0),
        "waited": ("reward/wait_s", long_s),
        "retried": ("reward/retries", 0.0),
        "degraded": ("reward/degraded_fraction", 0.0),
    }
    scored = [row for row in rows if row.get("reward/failed_fraction") is not None]
    found: list[dict[str, Any]] = []
    for kind, (name, limit) in figures.items():
        for stretch in _stretches(scored, name, limit):
            values = [row[name] for row in stretch]
            where = {"first": stretch[0]["step"], "last": stretch[-1]["step"]}
            found.append({"kind": kind, **where, "text": _said(kind, values, stretch)})
    return sorted(found, key=lambda each: (each["first"], each["kind"]))


def _stretches(
    rows: Iterable[Mapping[str, Any]], name: str, limit: float
) -> Iterable[list[Mapping[str, Any]]]:
    """Rows in a row whose figure is above a limit."""
    stretch: list[Mapping[str, Any]] = []
    for row in rows:
        if (row.get(name) or 0.0) > limit:
            stretch.append(row)
        elif stretch:
            yield stretch
            stretch = []
    if stretch:
        yield stretch


def _said(kind: str, values: Sequence[float], rows: Sequence[Mapping[str, Any]]) -> str:
    if kind == "waited":
        return f"the trainer waited {sum(values):,.1f} s for rewards: slow, or an outage"
    if kind == "retried":
        requests = sum(row.get("reward/requests") or 0.0 for row in rows)
        return f"{sum(values):,.0f} of {requests:,.0f} requests repeated another that had failed"
    what = "had no reward" if kind == "failed" else "were scored by some members of an ensemble only"
    return f"up to {max(values):.1%} of a step's samples {what}"


def _short(value: Any, digits: int = 5) -> int | float | None:
    """A number with so many digits, a whole one without a point; None for what is no number."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def _as_text(value: Any) -> str:
    return "" if value is None else str(value)


def _whole(text: Any) -> str:
    """A text that UTF-8 has a form for: of half a surrogate pair, a question mark."""
    return str(text).encode("utf-8", "replace").decode("utf-8")

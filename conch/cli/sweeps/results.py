"""What jobs came to: their metric, read from `metrics.jsonl`, and whether one falls behind the others."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from conch.cli.sweeps.settings import SweepConfig

METRICS_FILE = "metrics.jsonl"
BEST_METRIC_FILE = "best_metric.txt"
"""Written by every run: the metric by which it chooses its best checkpoint."""

_USUAL = ("reward/mean", "train/loss")
Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Curve:
    """Values of one metric after step 0.

    metric: its name.
    points: step -> value, in the order of steps; only finite values.
    """

    metric: str
    points: Mapping[int, float]

    def until(self, step: int | None) -> Curve:
        """Return the part up to a step; None for all of it."""
        if step is None:
            return self
        return Curve(self.metric, {at: value for at, value in self.points.items() if at <= step})


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run, one mapping a step; without those that are being written just now."""
    path = run_dir / METRICS_FILE
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.setdefault(row["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]


def metric_of(settings: SweepConfig, run_dir: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Name of the metric that this run is compared by."""
    if settings.metric is not None:
        return settings.metric
    file = run_dir / BEST_METRIC_FILE
    own = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    logged = {name for row in rows for name in row}
    candidates = [name for name in (own, *_USUAL) if name]
    return next((name for name in candidates if name in logged), candidates[0])


def read_curve(settings: SweepConfig, run_dir: Path) -> Curve:
    """Return the metric that a run is compared by, at the steps that logged it."""
    rows = read_rows(run_dir)
    name = metric_of(settings, run_dir, rows)
    values = {int(row["step"]): row.get(name) for row in rows if row["step"] > 0}
    points = {step: value for step, value in values.items() if isinstance(value, int | float)}
    return Curve(name, {step: float(value) for step, value in points.items() if math.isfinite(value)})


def direction_of(settings: SweepConfig, metric: str) -> Direction:
    """What is better of a metric."""
    if settings.direction is not None:
        return settings.direction
    return "minimize" if metric.endswith("loss") else "maximize"


def objective(settings: SweepConfig, curve: Curve) -> tuple[int, float] | None:
    """Return the step and the value that a job is compared by; None where the metric was never logged."""
    if not curve.points:
        return None
    takes_best = settings.metric_at == "best" or (
        settings.metric_at is None and curve.metric.startswith("eval/")
    )
    if not takes_best:
        step = max(curve.points)
        return step, curve.points[step]
    sign = 1 if direction_of(settings, curve.metric) == "maximize" else -1
    # Of equal values the first: it needed fewer steps.
    return max(curve.points.items(), key=lambda point: (sign * point[1], -point[0]))


def falls_behind(settings: SweepConfig, curve: Curve, finished: Sequence[Curve]) -> int | None:
    """Return the first step at which a job is worse than the median of finished ones, None if it never is.

    The rule is that of Optuna's `MedianPruner`: the job's best value so far against the median of the others'
    values at the very same step.

    finished: of the jobs that came to their end.
    """
    if len(finished) < settings.n_startup_trials:
        return None
    sign = 1 if direction_of(settings, curve.metric) == "maximize" else -1
    best = -math.inf
    for step, value in sorted(curve.points.items()):
        best = max(best, sign * value)
        others = [other.points[step] for other in finished if step in other.points]
        if step >= settings.n_warmup_steps and others and best < sign * median(others):
            return step
    return None


def last_error(log: Path, start: int) -> str:
    """Return the line of an attempt's output that says why it failed.

    start: where the attempt's output begins, in bytes.
    """
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(start, file.tell() - (1 << 16)))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    lines = [line.strip() for line in lines if line.strip()]
    named = [line for line in lines if line.startswith("error:") or _is_exception(line)]
    return (named or lines or [""])[-1]


def _is_exception(line: str) -> bool:
    name = line.partition(":")[0]
    return bool(name) and name.replace(".", "").isidentifier() and name.endswith(("Error", "Exception"))

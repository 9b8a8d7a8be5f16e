"""Draw a run's curves from its `metrics.jsonl`: `conch plot RUN_DIR [metric ...]`."""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conch.errors import DataError
from conch.runs.board import evaluation_figures, has_evaluation, has_training, training_figures
from conch.runs.reading import no_run
from conch.runs.state import METRICS_FILE
from conch.types import Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    "reward/mean": "served reward of rollouts (mean)",
    "eval/reward": "reward on evaluation samples (mean)",
    "eval/gold/reward": "gold on evaluation samples (mean), which watches only",
    "eval/members_variance": "variance of an ensemble's members (reward², mean)",
    "eval/optimality": "gold optimality (mean, 1 = shortest walks)",
    "policy/kl": "KL to the starting policy (nats per sample)",
}
"""Axis titles with units, for the curves that `plot_run` draws by default."""

UNITS = {
    "kl": "nats per sample",
    "length": "tokens",
    "entropy": "nats per token",
}
"""Of the figures of `conch.runs.board` that have one, as `Curves` titles them."""

_MOST_POINTS = 1000
_COLUMNS = 3
_INCHES = 3.4  # width of a curve
_PIXELS_PER_INCH = 160  # shown at half of it, so that it is sharp on every screen


def read_metric(run_dir: Path, name: str) -> tuple[list[int], list[float]]:
    """Return the steps at which `name` was logged, and its values; empty where it never was.

    Raises:
        DataError: the folder holds no metrics, or a damaged line (named by number).
    """
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise DataError(no_run(run_dir))
    steps, values = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        row = _parse(path, number, line)
        if row.get(name) is not None:
            steps.append(row["step"])
            values.append(row[name])
    return steps, values


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:  # no JSON, or no UTF-8
        raise DataError(f"line {number} of {path} is damaged: {error}; delete that line") from error
    if not isinstance(row, dict) or "step" not in row:
        raise DataError(f"line {number} of {path} is damaged: no object with a step; delete that line")
    return row


def plot_run(run_dir: Path, names: Sequence[str] = tuple(LABELS)) -> list[Path]:
    """Write one PNG for each of `names` that the run logged to `<run_dir>/plots/`; returns their paths."""
    written: list[Path] = []
    for name in names:
        steps, values = read_metric(run_dir, name)
        if not steps:
            continue
        figure, axes = _new_figure()
        axes.plot(steps, values, marker="o", markersize=3, linewidth=1.5)
        axes.set(xlabel="step", ylabel=LABELS.get(name, name), title=f"{name}  ({run_dir.name})")
        axes.grid(alpha=0.3)
        written.append(_saved(figure, run_dir, name))
    return written


def plot_against(run_dir: Path, x: str, x_label: str, labels: Mapping[str, str]) -> Path:
    """Draw metrics over the metric `x`, logged at the same steps, into one PNG in `<run_dir>/plots/`.

    x_label: title of the x axis, with the unit.
    labels: metric -> its text in the legend, with the unit.

    Returns:
        path of the PNG.

    Raises:
        DataError: see `read_metric`; or a metric was never logged with `x`.
    """
    x_at = dict(zip(*read_metric(run_dir, x), strict=True))
    curves = {name: _points(x_at, *read_metric(run_dir, name)) for name in labels}
    for name, points in curves.items():
        if not points:
            raise DataError(f"{run_dir} logged no `{name}` at a step at which it logged `{x}`")
    figure, axes = _new_figure()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.5, label=labels[name])
    axes.set(xlabel=x_label, title=run_dir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    return _saved(figure, run_dir, "_".join((*labels, "over", x)))


def _points(x_at: dict[int, float], steps: list[int], values: list[float]) -> list[tuple[float, float]]:
    """Return (x, y) in the order of steps."""
    return [(x_at[step], value) for step, value in zip(steps, values, strict=True) if step in x_at]


def _new_figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _saved(figure: Any, run_dir: Path, name: str) -> Path:
    path = run_dir / "plots" / f"{name.replace('/', '_')}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


class Curves:
    """The main figures of a run over its steps, training beside evaluation, in one picture."""

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._training: dict[str, Points] = {}
        self._evaluation: dict[str, Points] = {}
        self.extend(rows)

    @property
    def width(self) -> int:
        """Of the picture as it is to be shown, in pixels."""
        return round(_INCHES * min(_COLUMNS, max(1, len(self._names()))) * _PIXELS_PER_INCH / 2)

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add steps as `Run.metrics` gives them."""
        for row in rows:
            metrics = {name: math.nan if value is None else value for name, value in row.items()}
            self.add(int(metrics.pop("step")), metrics)

    def add(self, step: int, metrics: Metrics) -> None:
        """Add what was measured at a step."""
        if has_training(metrics):
            for name, value in training_figures(metrics).items():
                self._training.setdefault(name, Points()).add(step, value)
        if has_evaluation(metrics):
            for name, value in evaluation_figures(metrics).items():
                self._evaluation.setdefault(name, Points()).add(step, value)

    def points(self, name: str) -> Points:
        """Of a figure's training: `reward`, say.

        Raises:
            KeyError: nothing was added of it.
        """
        return self._training[name]

    def png(self) -> bytes | None:
        """The picture; None before there is a second point anywhere."""
        names = self._names()
        curves = [*self._training.values(), *self._evaluation.values()]
        if all(len(points.steps) < 2 for points in curves):
            return None
        # Not through pyplot, whose back end and open figures are the user's.
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        columns = min(_COLUMNS, len(names))
        lines = math.ceil(len(names) / columns)
        target = io.BytesIO()
        with rc_context({"text.usetex": False}):  # a user's setting; names of metrics are no LaTeX
            figure = Figure((_INCHES * columns, 2.3 * lines), layout="constrained", dpi=_PIXELS_PER_INCH)
            for place, name in enumerate(names, start=1):
                self._draw(figure.add_subplot(lines, columns, place), name)
            figure.savefig(target, format="png")
        return target.getvalue()

    def _names(self) -> list[str]:
        return list(dict.fromkeys([*self._training, *self._evaluation]))

    def _draw(self, axes: Axes, name: str) -> None:
        unit = UNITS.get(name, "")
        axes.set_title(f"{name} ({unit})" if unit else name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("step", fontsize=7)
        if points := self._training.get(name):
            axes.plot(points.steps, points.values, color="tab:blue", linewidth=1, label="training")
        if points := self._evaluation.get(name):
            axes.plot(points.steps, points.values, "o-", color="tab:orange", markersize=3, label="evaluation")
        axes.legend(fontsize=6, frameon=False)


class Points:
    """A curve of at most `_MOST_POINTS` points, evenly spread over all that were added, and the last one."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, float]] = []
        self._last: list[tuple[int, float]] = []  # empty where the last one is among those kept
        self._seen = 0
        self._stride = 1

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in (*self._kept, *self._last)]

    @property
    def values(self) -> list[float]:
        return [value for _, value in (*self._kept, *self._last)]

    def add(self, step: int, value: float) -> None:
        is_kept = self._seen % self._stride == 0
        self._last = [] if is_kept else [(step, value)]
        if is_kept:
            self._kept.append((step, value))
        self._seen += 1
        if len(self._kept) > _MOST_POINTS:  # an odd number: halving it keeps the last one too
            self._kept, self._stride = self._kept[::2], 2 * self._stride


def main(argv: Sequence[str]) -> None:
    """Draw the curves that a command line names."""
    parser = argparse.ArgumentParser(prog="conch plot", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of a run")
    parser.add_argument("metric", nargs="*", help=f"metrics to draw (default: {', '.join(LABELS)})")
    arguments = parser.parse_args(argv)
    paths = plot_run(arguments.run_dir, arguments.metric or tuple(LABELS))
    if not paths:
        raise DataError(f"{arguments.run_dir} logged none of the asked-for metrics")
    for path in paths:
        print(path)

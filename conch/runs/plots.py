"""Draw curves of runs from their `metrics.jsonl`.

    conch plot outputs/a                            the main figures of a run, in one picture
    conch plot outputs/a outputs/b                  those of several runs, over each other
    conch plot outputs/a outputs/b reward/mean      a picture for each metric that is named

A run is a folder, or `label=folder`. Pictures are written to `plots/` in the folder of the first run.
"""

from __future__ import annotations

import argparse
import difflib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conch.cli import CommandParser
from conch.errors import DataError, missing_path
from conch.runs.board import (
    evaluation_figures,
    figure_of,
    has_evaluation,
    has_training,
    training_figures,
)
from conch.runs.listing import find_runs, labelled_runs, split_label
from conch.runs.reading import load
from conch.types import Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_UNITS = {
    "kl": "nats per sample",
    "sqrt_kl": "√nats per sample",
    "length": "tokens",
    "entropy": "nats per token",
    "accuracy": "share",
    "spearman": "rank correlation",
    "members_variance": "reward²",
    "optimality": "1 = shortest walks",
}
"""Name of a figure of `conch.runs.board`, or last word of a metric -> its unit, where it has one."""
_UNITS_OF_ENDINGS = {"tokens_per_s": "tokens/s", "_s": "s", "_fraction": "share"}

_MOST_POINTS = 1000
_FEW_POINTS = 40  # so few are marked, for a single one is no line
_COLUMNS = 3
_INCHES = 3.4  # width of a curve
_PIXELS_PER_INCH = 160  # shown at half of it, so that it is sharp on every screen
_LONGEST_NAME = 100  # of a picture, in characters


def read_metric(run_dir: Path, name: str) -> tuple[list[int], list[float]]:
    """Return the steps at which `name` was logged, and its values; empty where it never was.

    Raises:
        DataError: the folder holds no metrics, or a damaged line (named by number).
    """
    return _points_of(load(run_dir).metrics(), name)


def _points_of(rows: Iterable[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def plot_run(run_dir: Path, names: Sequence[str] = ()) -> list[Path]:
    """Draw a run as `plot_runs` does."""
    return plot_runs({run_dir.resolve().name: run_dir}, names)


def plot_runs(runs: Mapping[str, Path], names: Sequence[str] = ()) -> list[Path]:
    """Draw runs over each other, to `plots/` in the folder of the first one.

    runs: label -> folder.
    names: metrics, each of which gets a picture; none for the main figures of the runs in one picture.

    Returns:
        paths of the PNG files.

    Raises:
        DataError: a folder holds no metrics, or a damaged line; no run has logged a metric, or anything yet.
    """
    rows = {label: load(folder).metrics() for label, folder in runs.items()}
    folder = next(iter(runs.values()))
    told = ", ".join(str(path) for path in runs.values())
    if not names:
        curves = {label: Curves(each) for label, each in rows.items()}
        if not any(each.names for each in curves.values()):
            raise DataError(f"{told} logged no step yet")
        title = next(iter(curves)) if len(curves) == 1 else ""
        return [_saved(_figure_of(curves, title), folder, _picture_name("curves", runs), _PIXELS_PER_INCH)]
    logged = {name for each in rows.values() for row in each for name in row} - {"step"}
    for name in names:
        if name not in logged:
            raise DataError(f"{told} logged no `{name}`{_near_metrics(name, logged)}")
    return [_plot_metric(name, rows, folder) for name in names]


def _plot_metric(name: str, rows: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path) -> Path:
    curves = {label: _points_of(each, name) for label, each in rows.items()}
    if not any(steps for steps, _ in curves.values()):
        raise DataError(f"`{name}` of {', '.join(rows)} is null at every step: it was no number")
    figure, axes = _new_figure()
    for label, (steps, values) in curves.items():
        marker = "o" if len(steps) < _FEW_POINTS else ""
        axes.plot(steps, values, marker=marker, markersize=3, linewidth=1.5, label=label)
    axes.set(xlabel="step", ylabel=with_unit(name), title=f"{name}  ({', '.join(rows)})")
    if len(curves) > 1:
        axes.set_title(name)
        axes.legend()
    axes.grid(alpha=0.3)
    return _saved(figure, folder, _picture_name(name, rows))


def with_unit(metric: str) -> str:
    """Return the name of a metric, or of a figure of `conch.runs.board`, with its unit: `length (tokens)`."""
    plain = metric.partition("@")[0]
    last = plain.rpartition("/")[2]
    unit = _UNITS.get(figure_of(plain) or last, "")
    unit = unit or next((unit for end, unit in _UNITS_OF_ENDINGS.items() if last.endswith(end)), "")
    return f"{metric} ({unit})" if unit else metric


def _near_metrics(name: str, logged: Iterable[str]) -> str:
    """What to say behind "logged no such metric"."""
    known = sorted(logged)
    if near := difflib.get_close_matches(name, known, n=1):
        return f"; did you mean `{near[0]}`?"
    folder = missing_path(Path(name))
    if folder.startswith("; did you mean"):  # a run's folder, mistyped
        return f", and there is no such folder{folder}"
    alike = [each for each in known if name in each]
    return f"; {'names like it are' if alike else 'there are'}: {', '.join(alike or known)}"


def _picture_name(head: str, labels: Iterable[str]) -> str:
    """`curves`; of several runs `curves_a_vs_b`."""
    labels = list(labels)
    name = f"{head}_{'_vs_'.join(labels)}" if len(labels) > 1 else head
    return name.replace("/", "_")[:_LONGEST_NAME]


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


def _saved(figure: Any, run_dir: Path, name: str, pixels_per_inch: int = 120) -> Path:
    path = run_dir / "plots" / f"{name.replace('/', '_')}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=pixels_per_inch)
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
        return round(_INCHES * min(_COLUMNS, max(1, len(self.names))) * _PIXELS_PER_INCH / 2)

    @property
    def names(self) -> list[str]:
        """Of the figures, those of training first."""
        return list(dict.fromkeys([*self._training, *self._evaluation]))

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
        curves = [*self._training.values(), *self._evaluation.values()]
        if all(len(points.steps) < 2 for points in curves):
            return None
        target = io.BytesIO()
        _figure_of({"": self}).savefig(target, format="png")
        return target.getvalue()

    def draw(self, axes: Axes, name: str, colors: tuple[str, str]) -> None:
        """Draw a figure's training and evaluation, each in its color, as far as they are there."""
        dashes = "--" if colors[0] == colors[1] else "-"
        lines = ("training", self._training, "-", 2, 1.0), ("evaluation", self._evaluation, dashes, 3, 1.5)
        for (label, figures, style, size, width), color in zip(lines, colors, strict=True):
            if points := figures.get(name):
                marker = "o" if label == "evaluation" or len(points.steps) < _FEW_POINTS else ""
                line = {"linestyle": style, "linewidth": width, "color": color, "label": label}
                axes.plot(points.steps, points.values, marker=marker, markersize=size, **line)


def _figure_of(runs: Mapping[str, Curves], title: str = "") -> Figure:
    """One picture of all figures that the runs have.

    runs: label -> curves; several of them are told apart by color.
    """
    # Not through pyplot, whose back end and open figures are the user's.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for curves in runs.values() for name in curves.names))
    columns = max(1, min(_COLUMNS, len(names)))
    lines = math.ceil(len(names) / columns)
    with rc_context({"text.usetex": False}):  # a user's setting; names of metrics are no LaTeX
        height = 2.3 * lines + (
            0.3 if title else 0.2 * math.ceil(len(runs) / columns) if len(runs) > 1 else 0
        )
        figure = Figure((_INCHES * columns, height), layout="constrained", dpi=_PIXELS_PER_INCH)
        if title:
            figure.suptitle(title, fontsize=10)
        for place, name in enumerate(names, start=1):
            axes = figure.add_subplot(lines, columns, place)
            axes.set_title(with_unit(name), fontsize=9)
            axes.tick_params(labelsize=7)
            axes.set_xlabel("step", fontsize=7)
            for number, curves in enumerate(runs.values()):
                curves.draw(axes, name, _colors(number, len(runs)))
            if len(runs) == 1:
                axes.legend(fontsize=6, frameon=False)
        if len(runs) > 1:
            _add_legend(figure, list(runs), columns)
    return figure


def _colors(number: int, runs: int) -> tuple[str, str]:
    """Of training and of evaluation: of one run two, of each of several runs one."""
    return ("tab:blue", "tab:orange") if runs == 1 else (f"C{number % 10}", f"C{number % 10}")


def _add_legend(figure: Figure, labels: Sequence[str], columns: int) -> None:
    """Tell below the panels which color is which run, and which line is training."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=_colors(number, 2)[0], label=label) for number, label in enumerate(labels)]
    drawn = {line.get_label() for axes in figure.axes for line in axes.get_lines()}
    if "evaluation" in drawn:
        lines += [Line2D([], [], color="gray", linewidth=1, label="training")] if "training" in drawn else []
        lines += [Line2D([], [], color="gray", linestyle="--", marker="o", markersize=3, label="evaluation")]
    figure.legend(handles=lines, loc="outside lower center", fontsize=7, ncols=columns + 1, frameon=False)


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
    parser = CommandParser(
        prog="conch plot",
        usage="conch plot [-h] RUN [RUN ...] [METRIC ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = "folder of a run, or label=folder; behind the first one also metrics (default: the main figures)"
    parser.add_argument("words", nargs="*", metavar="RUN", help=words)
    words = parser.parse_args(argv).words
    if not words:
        newest = find_runs(Path("outputs"))[:1] if Path("outputs").is_dir() else []
        parser.refuse("name the folder of a run" + "".join(f"; the newest one is {run}" for run in newest))
    folders = [words[0], *(word for word in words[1:] if split_label(word)[1].is_dir())]
    metrics = [word for word in words[1:] if word not in folders]
    for path in plot_runs(labelled_runs(folders), metrics):
        print(path)

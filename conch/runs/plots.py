"""Draw a run's curves from its `metrics.jsonl`: `conch plot RUN_DIR [metric ...]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conch.errors import DataError
from conch.runs.reading import no_run
from conch.runs.state import METRICS_FILE

LABELS = {
    "reward/mean": "served reward of rollouts (mean)",
    "eval/reward": "reward on evaluation samples (mean)",
    "eval/gold/reward": "gold on evaluation samples (mean), which watches only",
    "eval/members_variance": "variance of an ensemble's members (reward², mean)",
    "eval/optimality": "gold optimality (mean, 1 = shortest walks)",
    "policy/kl": "KL to the starting policy (nats per sample)",
}
"""Axis titles with units, for the curves that `plot_run` draws by default."""


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

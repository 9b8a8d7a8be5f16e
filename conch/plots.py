"""Draw a run's curves from its `metrics.jsonl`: `python -m conch.plots RUN_DIR [metric ...]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conch.errors import DataError
from conch.tracking import METRICS_FILE

LABELS = {
    "reward/mean": "served reward of rollouts (mean)",
    "eval/reward": "reward on evaluation samples (mean)",
    "eval/optimality": "gold optimality (mean, 1 = shortest walks)",
    "policy/kl": "KL to the starting policy (nats per sample)",
}
"""Axis titles with units, for the curves that `plot_run` draws by default."""


def read_metric(run_dir: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values at which `name` was logged; empty where it never was.

    Raises:
        DataError: the folder holds no metrics, or a damaged line (named by number).
    """
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise DataError(f"{run_dir} is not a run folder: it has no {METRICS_FILE}")
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written: list[Path] = []
    for name in names:
        steps, values = read_metric(run_dir, name)
        if not steps:
            continue
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.plot(steps, values, marker="o", markersize=3, linewidth=1.5)
        axes.set(xlabel="step", ylabel=LABELS.get(name, name), title=f"{name}  ({run_dir.name})")
        axes.grid(alpha=0.3)
        path = run_dir / "plots" / f"{name.replace('/', '_')}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=120)
        written.append(path)
    return written


def main(argv: Sequence[str]) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m conch.plots", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of a run")
    parser.add_argument("metric", nargs="*", help=f"metrics to draw (default: {', '.join(LABELS)})")
    arguments = parser.parse_args(argv)
    paths = plot_run(arguments.run_dir, arguments.metric or tuple(LABELS))
    if not paths:
        raise DataError(f"{arguments.run_dir} logged none of the asked-for metrics")
    for path in paths:
        print(path)


if __name__ == "__main__":
    from conch.cli import run_main

    run_main(main)

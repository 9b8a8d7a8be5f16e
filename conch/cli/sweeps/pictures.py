"""Pictures of a sweep: the objective against each key, and the curves of all jobs in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_MOST_NAMES = 20
_MOST_TICKS = 6
_PANEL_WIDTH, _PANEL_HEIGHT = 4.6, 3.6


def draw_objective(
    path: Path, metric: str, columns: Mapping[str, Sequence[str]], values: Sequence[float]
) -> None:
    """Draw one panel a swept key, one point a job.

    columns: key -> its value in each job, as text.
    values: of the objective, one a job.
    """
    figure, panels = _new_figure(len(columns))
    for axes, (key, texts) in zip(panels, columns.items(), strict=True):
        numbers = [_number(text) for text in texts]
        if all(number is not None for number in numbers):
            places: list[float] = [number for number in numbers if number is not None]
            if min(places) > 0 and max(places) >= 20 * min(places):
                axes.set_xscale("log")
            if len(set(places)) <= _MOST_TICKS:
                axes.set_xticks(sorted(set(places)), [f"{place:g}" for place in sorted(set(places))])
                axes.minorticks_off()
        else:
            names = list(dict.fromkeys(texts))
            places = [float(names.index(text)) for text in texts]
            axes.set_xticks(range(len(names)), names, rotation=30 if len(names) > 3 else 0)
        axes.plot(places, values, "o", markersize=5, alpha=0.7)
        axes.set(xlabel=key)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel=metric)
    figure.savefig(path, dpi=120)


def draw_curves(path: Path, metric: str, curves: Mapping[str, Mapping[int, float]], best: str | None) -> None:
    """Draw the metric over steps, one line a job.

    curves: name of a job -> step -> value.
    best: name of the job whose line is drawn thicker.
    """
    figure, (axes,) = _new_figure(1, wide=True)
    for name, points in curves.items():
        width = 2.5 if name == best else 1.2
        axes.plot(
            list(points), list(points.values()), marker="o", markersize=2.5, linewidth=width, label=name
        )
    axes.set(xlabel="step", ylabel=metric)
    axes.grid(alpha=0.3)
    if len(curves) <= _MOST_NAMES:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _new_figure(panels: int, *, wide: bool = False) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = _PANEL_WIDTH * (1.6 if wide else panels)
    figure = Figure(figsize=(width, _PANEL_HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])

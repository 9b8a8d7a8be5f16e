"""One figure of overoptimisation: proxy and gold against sqrt(KL) or KL, and step or n.

    conch overoptimisation runs/ppo --output pictures
    conch overoptimisation runs/ppo --axis kl
    conch overoptimisation single=runs/a,runs/b,runs/c uwo=runs/d,runs/e,runs/f --output pictures

A folder is that of a run that kept its evaluations, or one that `conch best-of-n` wrote. Scores are gains
over the starting policy in standard deviations of its scores. Folders of a group, with commas between, are
seeds: the line is their mean at each step, and at each distance that all of them reached; the band goes from
the least to the greatest, and gold of each goes on as a thin line. One best-of-n has the intervals of its
prompts' bootstrap for a band.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from conch.atomic_files import replace_text
from conch.cli import CommandParser, run_main
from conch.errors import ConfigError, DataError
from conch.evaluation.curves import Curve, curve_of
from conch.evaluation.fits import Fit, fit_seeds, gamma
from conch.evaluation.records import GOLD
from conch.log import get_logger

_log = get_logger(__name__)

NAME = "overoptimisation"
GAIN = "gain over the starting policy\n(standard deviations of its scores)"
Axis = Literal["sqrt_kl", "kl"]
AXES: Mapping[Axis, str] = {
    "sqrt_kl": "sqrt(KL) from the starting policy (sqrt(nats per sample))",
    "kl": "KL from the starting policy (nats per sample)",
}
"""What the first panel has on its horizontal axis -> its label."""
_VARIANCE = "members' variance\n(variances of the starting proxy)"
_X_LABELS = {"rl": "step", "best_of_n": "n, samples to choose from"}
_PANEL_WIDTH, _SCORE_HEIGHT, _VARIANCE_HEIGHT = 5.4, 4.0, 2.0
_LEGEND_LINE = 0.24
"""Inches."""


@dataclass(frozen=True)
class Band:
    """A line with what is around it. at: of the horizontal axis. low, high: edges of the band."""

    at: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Group:
    """Seeds of one setting, normalised, at the steps that all of them have.

    fits: "gold" and "proxy" -> their fit; less where a score is not there or has too few points.
    gamma: degree of overoptimisation; NaN without both fits.
    note: why there is no fit; "" where there is one.
    """

    name: str
    seeds: tuple[Curve, ...]
    fits: Mapping[str, Fit]
    gamma: float
    note: str = ""

    @property
    def form(self) -> str:
        return self.seeds[0].form

    def band(self, series: str) -> Band:
        """`proxy`, `gold`, `variance` or `distance` at each step."""
        rows = np.stack([getattr(seed, series) for seed in self.seeds])
        interval = self.seeds[0].intervals.get(series) if len(rows) == 1 else None
        low, high = (rows.min(axis=0), rows.max(axis=0)) if interval is None else interval
        return Band(self.seeds[0].step, rows.mean(axis=0), low, high)

    def band_over_distance(self, series: str) -> Band:
        """The same against sqrt(KL). Of several seeds, whose KL differs at a step, at the distances that one
        of them was measured at and all of them reached; between its points a seed is a straight line."""
        if len(self.seeds) == 1:
            return replace(self.band(series), at=self.seeds[0].distance)
        lines = [_by_distance(seed.distance, getattr(seed, series)) for seed in self.seeds]
        if not all(len(distance) for distance, _ in lines):
            nothing = np.array([])
            return Band(nothing, nothing, nothing, nothing)
        first, last = max(line[0][0] for line in lines), min(line[0][-1] for line in lines)
        at = np.unique(np.concatenate([distance for distance, _ in lines]))
        at = at[(at >= first) & (at <= last)]
        rows = np.stack([np.interp(at, *line) for line in lines])
        return Band(at, rows.mean(axis=0), rows.min(axis=0), rows.max(axis=0))

    def has(self, series: str) -> bool:
        """Whether there is a number to draw."""
        return bool(np.isfinite(self.band(series).mean).any())


def _by_distance(distance: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A run's points in the order of their distance, those without a number left out."""
    there = np.flatnonzero(np.isfinite(distance) & np.isfinite(values))
    order = there[np.argsort(distance[there], kind="stable")]
    return distance[order], values[order]


def group_of(name: str, curves: Sequence[Curve]) -> Group:
    """Normalise seeds, bring them to their common steps, and fit alpha and beta.

    Raises:
        DataError: they are of two forms, share no step, or cannot be normalised.
    """
    if len({curve.form for curve in curves}) > 1:
        raise DataError(f"the group {name} has runs and best-of-n: give each a group of its own")
    seeds = [curve.normalised() for curve in curves]
    common = sorted(set.intersection(*(set(seed.step.tolist()) for seed in seeds)))
    if not common:
        raise DataError(f"the seeds of {name} share no step: evaluate all of them at the same steps")
    aligned = tuple(_at(seed, common) for seed in seeds)
    fits: dict[str, Fit] = {}
    note = ""
    for series in ("gold", "proxy"):
        try:
            fits[series] = fit_seeds([(seed.kl, getattr(seed, series)) for seed in seeds], seeds[0].form)
        except DataError as error:
            note = note or str(error)
    degree = math.nan
    if len(fits) == 2:
        degree = gamma(fits["gold"], fits["proxy"], float(max(np.nanmax(seed.kl) for seed in seeds)))
    return Group(name, aligned, fits, degree, note)


def _at(curve: Curve, steps: Sequence[float]) -> Curve:
    places = [curve.step.tolist().index(step) for step in steps]
    columns = {name: getattr(curve, name)[places] for name in ("step", "kl", "proxy", "gold", "variance")}
    intervals = {name: interval[:, places] for name, interval in curve.intervals.items()}
    return Curve(label=curve.label, form=curve.form, intervals=intervals, **columns)


def draw(
    curves: Mapping[str, Sequence[Curve]], folder: Path, name: str = NAME, *, axis: Axis = "sqrt_kl"
) -> list[Path]:
    """Write the figure of all groups, its points and its fits.

    curves: name of a group -> its seeds, not normalised.
    axis: of the first panel. Means and fits are those over sqrt(KL), whatever they are drawn against.

    Returns:
        paths of `<name>.png`, `<name>.csv` and `<name>_fits.csv`.

    Raises:
        DataError: see `group_of`.
        ConfigError: the folder cannot be written.
    """
    groups = [group_of(group, seeds) for group, seeds in curves.items()]
    paths = [folder / f"{name}{ending}" for ending in (".png", ".csv", "_fits.csv")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _draw_figure(groups, paths[0], axis)
        replace_text(paths[1], _table(_points(curves)))
        replace_text(paths[2], _table(_fit_rows(groups)))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}") from error
    for group in groups:
        if group.note:
            _log.info("%s: no fit: %s", group.name, group.note)
    return paths


def draw_folder(folder: Path) -> list[Path]:
    """Draw a folder of best-of-n into itself; a warning where its scores cannot be drawn."""
    try:
        return draw({folder.name: [curve_of(folder)]}, folder, "best_of_n")
    except DataError as error:
        _log.warning("no picture: %s", error)
        return []


def _draw_figure(groups: Sequence[Group], path: Path, axis: Axis) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    forms = [form for form in _X_LABELS if any(group.form == form for group in groups)]
    has_variance = any(group.has("variance") for group in groups)
    heights = [_SCORE_HEIGHT, _VARIANCE_HEIGHT] if has_variance else [_SCORE_HEIGHT]
    columns = 1 + len(forms)
    size = (_PANEL_WIDTH * columns, sum(heights) + 0.7 + _LEGEND_LINE * len(groups))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
    for number, group in enumerate(groups):
        color = f"C{number % 10}"
        _draw_group(group, panels[:, 0], axis, color)
        _draw_fit(group, panels[0, 0], axis, color)
        _draw_group(group, panels[:, 1 + forms.index(group.form)], "step", color)
    for column, label in enumerate([AXES[axis], *(_X_LABELS[form] for form in forms)]):
        # The lowest panel that has something.
        filled = [axes for axes in panels[:, column] if axes.lines] or [panels[0, column]]
        filled[-1].set_xlabel(label)
        if label == _X_LABELS["best_of_n"]:
            for axes in panels[:, column]:
                axes.set_xscale("log", base=2)
    panels[0, 0].set_ylabel(GAIN)
    if has_variance:
        panels[1, 0].set_ylabel(_VARIANCE)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        axes.set_visible(bool(axes.lines))
        axes.axhline(0.0, color="black", linewidth=0.6)
    figure.suptitle(_about_bands(groups), fontsize="medium")
    _draw_legend(figure, panels[0, 0])
    figure.savefig(path, dpi=120)


def _about_bands(groups: Sequence[Group]) -> str:
    """Says what lines and bands are, where there are bands."""
    said: list[str] = []
    if any(len(group.seeds) > 1 for group in groups):
        said.append("several runs: their mean, band from the least to the greatest, thin: gold of each")
    if any(group.seeds[0].intervals for group in groups if len(group.seeds) == 1):
        said.append("one best-of-n: band of the 95 % bootstrap interval over prompts")
    return "\n".join(said)


def _draw_legend(figure: Any, axes: Any) -> None:
    """A line a group: its proxy, and its gold with the fit."""
    handles, labels = axes.get_legend_handles_labels()
    # Columns are filled from top to bottom.
    order = sorted(range(len(labels)), key=lambda place: ": proxy" not in labels[place])
    figure.legend(
        [handles[place] for place in order],
        [labels[place] for place in order],
        loc="outside lower center",
        ncols=2,
        fontsize="small",
    )


def _on(axis: Axis, distance: np.ndarray) -> np.ndarray:
    """Where distances, sqrt(KL), stand on the axis."""
    return distance**2 if axis == "kl" else distance


def _draw_group(group: Group, panels: Any, x: Axis | Literal["step"], color: str) -> None:
    """Proxy dashed, gold solid, the members' variance below."""
    styles = {"proxy": ("--", 1.2, panels[0]), "gold": ("-", 2.0, panels[0])}
    if len(panels) > 1:
        styles["variance"] = ("-", 1.2, panels[1])
    for series, (style, width, axes) in styles.items():
        if not group.has(series):
            continue
        band = group.band(series)
        if x != "step":
            band = group.band_over_distance(series)
            band = replace(band, at=_on(x, band.at))
        there = np.isfinite(band.mean) & np.isfinite(band.at)
        measured = x == "step" or len(group.seeds) == 1
        if x != "step" and not measured and series == "gold":  # the mean ends where the first run does
            for seed in group.seeds:
                distance, gold = _by_distance(seed.distance, seed.gold)
                axes.plot(_on(x, distance), gold, color=color, linewidth=0.6, alpha=0.6)
        axes.plot(
            band.at[there],
            band.mean[there],
            style,
            color=color,
            linewidth=width,
            marker="o" if measured else "",
            markersize=3,
            label=_label(group, series),
        )
        if not np.array_equal(band.low[there], band.high[there]):
            edges = band.low[there], band.high[there]
            axes.fill_between(band.at[there], *edges, color=color, alpha=0.18, linewidth=0)


def _draw_fit(group: Group, axes: Any, axis: Axis, color: str) -> None:
    fit = group.fits.get("gold")
    if fit is None:
        return
    d = np.linspace(0.0, float(np.nanmax(group.band("distance").mean)), 200)
    axes.plot(_on(axis, d), fit.gain(d**2), ":", color=color, linewidth=1.6)


def _label(group: Group, series: str) -> str:
    """Text of the legend; gold's with the fit that is dotted."""
    runs = f" ({len(group.seeds)} runs)" if len(group.seeds) > 1 else ""
    name = f"{group.name}{runs}: {series}"
    fit = group.fits.get(series)
    if series != "gold" or fit is None:
        return name
    form = r"$d(\alpha - \beta d)$" if fit.form == "best_of_n" else r"$d(\alpha - \beta \ln d)$"
    alpha, beta = _with_interval(fit.alpha, fit.alpha_interval), _with_interval(fit.beta, fit.beta_interval)
    degree = "" if math.isnan(group.gamma) else rf", $\gamma$ = {group.gamma:.2f}"
    return rf"{name}; dotted: {form}, $\alpha$ = {alpha}, $\beta$ = {beta}{degree}"


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def _points(curves: Mapping[str, Sequence[Curve]]) -> Iterable[Mapping[str, Any]]:
    """Every point of every seed, as it was measured and as it is drawn."""
    for group, seeds in curves.items():
        for seed in seeds:
            drawn = seed.normalised()
            for k in range(len(seed.step)):
                yield {
                    "group": group,
                    "seed": seed.label,
                    "form": seed.form,
                    "step" if seed.form == "rl" else "n": int(seed.step[k]),
                    "kl": seed.kl[k],
                    "sqrt_kl": seed.distance[k],
                    "proxy": seed.proxy[k],
                    "gold": seed.gold[k],
                    "members_variance": seed.variance[k],
                    "proxy_gain": drawn.proxy[k],
                    "gold_gain": drawn.gold[k],
                }


def _fit_rows(groups: Sequence[Group]) -> Iterable[Mapping[str, Any]]:
    for group in groups:
        for series, fit in group.fits.items():
            yield {
                "group": group.name,
                "series": series,
                "form": fit.form,
                "seeds": len(group.seeds),
                "alpha": fit.alpha,
                "alpha_low": fit.alpha_interval[0],
                "alpha_high": fit.alpha_interval[1],
                "beta": fit.beta,
                "beta_low": fit.beta_interval[0],
                "beta_high": fit.beta_interval[1],
                "peak_sqrt_kl": math.sqrt(fit.peak_kl),
                "gamma": group.gamma,
            }


def _table(rows: Iterable[Mapping[str, Any]]) -> str:
    """CSV; a cell is empty where there is no number."""
    listed = list(rows)
    names = list(dict.fromkeys(name for row in listed for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    for row in listed:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return text.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.10g}"


def groups_of(words: Sequence[str]) -> dict[str, list[Path]]:
    """Folders by group: `name=folder,folder`, or a folder that is a group of its own.

    Raises:
        ConfigError: a name stands twice, or a group has no folder.
    """
    groups: dict[str, list[Path]] = {}
    for word in words:
        name, equals, listed = word.partition("=")
        if not equals or Path(word).exists():
            own_name = Path(word).resolve().name
            name, listed = word if own_name in groups else own_name, word
        folders = [Path(folder) for folder in listed.split(",") if folder]
        if name in groups or not folders:
            raise ConfigError(
                f"{word}: " + ("the group stands twice" if name in groups else "the group has no folder")
            )
        groups[name] = folders
    return groups


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of their paths that tell the folders of a group apart."""
    parts = [folder.resolve().parts for folder in folders]
    length = 1
    while len({each[-length:] for each in parts}) < len(set(parts)):
        length += 1
    return [str(Path(*each[-length:])) for each in parts]


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="conch overoptimisation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", nargs="+", help="a run, a folder of best-of-n, or seeds of one: name=folder,folder"
    )
    parser.add_argument("--output", type=Path, default=Path("pictures"), help="default: %(default)s")
    parser.add_argument(
        "--axis", choices=get_args(Axis), default="sqrt_kl", help="of the first panel (default: %(default)s)"
    )
    parser.add_argument("--gold", default=GOLD, help="score that watched the runs (default: %(default)s)")
    parser.add_argument(
        "--variant",
        help="of runs that evaluate a sweep (`eval_generation`), as in the names of their files: "
        "@do_sample=true; default: the only one that measured KL",
    )
    return parser


def main(argv: Sequence[str]) -> None:
    """Draw the folders that a command line names."""
    arguments = _parser().parse_args(argv)
    groups = groups_of(arguments.folder)
    curves: dict[str, list[Curve]] = {}
    for name, folders in groups.items():
        labels = zip(folders, _labels(folders), strict=True)
        curves[name] = [
            curve_of(folder, gold=arguments.gold, label=label, variant=arguments.variant)
            for folder, label in labels
        ]
    for name, folders in groups.items():
        for folder, curve in zip(folders, curves[name], strict=True):
            if not np.isfinite(curve.gold).any():
                told = "%s has no gold scores, so %s is drawn without: `conch gold-eval` adds them to a run"
                _log.warning(told, folder, name)
    for path in draw(curves, arguments.output, axis=arguments.axis):
        print(path)


if __name__ == "__main__":
    run_main(main)

"""What every display of a run shows: its last step beside its last evaluation, its best one, and its pace."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from conch.types import Metrics

FIGURES = (
    ("reward", "reward/mean", "eval/reward"),
    ("gold", "", "eval/gold/reward"),
    ("kl", "policy/kl", "eval/kl"),
    ("length", "rollout/length_mean", "eval/length_mean"),
    ("entropy", "policy/entropy", ""),
    ("loss", "train/loss", "eval/loss"),
    ("accuracy", "", "eval/accuracy"),
    ("spearman", "", "eval/spearman"),
)
"""Name of a figure, its metric of training, its metric of evaluations; "" where there is none."""

_ASIDE = {"reward_standard_error", "members_variance", "sqrt_kl", "calibration_error"}
_MOST_OTHERS = 4
"""Most metrics of an evaluation that are shown beside those of `FIGURES`: a user's, and facts."""


def figure_of(metric: str) -> str:
    """Return the name of the figure that a metric is shown as; "" where it is none."""
    return next((name for name, *metrics in FIGURES if metric and metric in metrics), "")


def training_figures(metrics: Metrics) -> dict[str, float]:
    """Name -> value of the main metrics of a step."""
    return {name: metrics[metric] for name, metric, _ in FIGURES if metric in metrics}


def evaluation_figures(metrics: Metrics) -> dict[str, float]:
    """Name -> value of the main metrics of an evaluation, the user's among them."""
    figures = {name: metrics[metric] for name, _, metric in FIGURES if metric in metrics}
    known = {metric for _, _, metric in FIGURES}
    others = {
        name.removeprefix("eval/"): value
        for name, value in metrics.items()
        if name.startswith("eval/") and name not in known and "@" not in name and name.count("/") == 1
    }
    shown = [name for name in others if name not in _ASIDE][:_MOST_OTHERS]
    return figures | {name: others[name] for name in shown}


def has_training(metrics: Metrics) -> bool:
    """Whether metrics of one step are, also, of its training."""
    return any(not name.startswith(("eval/", "alarm/")) for name in metrics)


def has_evaluation(metrics: Metrics) -> bool:
    """Whether metrics of one step are, also, of an evaluation."""
    return any(name.startswith("eval/") for name in metrics)


def as_text(figures: Mapping[str, float]) -> str:
    """`reward 0.5123  kl 3.2`."""
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())


class Pace:
    """Steps per second, and the time that the steps left will take.

    total_steps: of the run.
    first: steps done before, which tell nothing of the pace.
    """

    def __init__(self, total_steps: int, first: int) -> None:
        self.total_steps = total_steps
        self._first = first
        self._start = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start, or since the run was resumed."""
        return time.monotonic() - self._start

    def rate(self, step: int) -> float:
        """Steps per second; 0 before the first."""
        return (step - self._first) / max(1e-9, self.elapsed_s)

    def left_s(self, step: int) -> float | None:
        """Seconds; None before the first step."""
        rate = self.rate(step)
        return (self.total_steps - step) / rate if rate > 0 else None


@dataclass(slots=True)
class Board:
    """The state of a display.

    name: of what runs: `ppo`.
    step: the last one that was done.
    training, evaluation: the last ones, each with its step.
    best_step: of the best evaluation.
    """

    name: str
    pace: Pace
    step: int
    training: tuple[int, dict[str, float]] | None = None
    evaluation: tuple[int, dict[str, float]] | None = None
    best_step: int | None = None

    def train(self, step: int, metrics: Metrics) -> None:
        """Take up a step."""
        self.step = step
        self.training = step, training_figures(metrics)

    def evaluate(self, step: int, metrics: Metrics, *, is_best: bool) -> str:
        """Take up an evaluation; returns the line that tells it."""
        self.evaluation = step, evaluation_figures(metrics)
        if is_best:
            self.best_step = step
        best = "  (best so far)" if is_best else ""
        return f"{self.name} {step}/{self.pace.total_steps} evaluation  {as_text(self.evaluation[1])}{best}"

    def rows(self) -> list[tuple[str, str, str]]:
        """Name, value of training and value of the evaluation, line by line; [] before there is any."""
        if self.training is None and self.evaluation is None:
            return []
        at_step, training = self.training or (None, {})
        at_evaluation, evaluation = self.evaluation or (None, {})
        rows = [("step", _cell(at_step), f"{_cell(at_evaluation)}{self._told_best(at_evaluation)}")]
        names = [name for name, *_ in FIGURES if name in training or name in evaluation]
        for name in dict.fromkeys([*names, *evaluation]):
            rows.append((name, _cell(training.get(name)), _cell(evaluation.get(name))))
        return rows

    def head(self) -> str:
        """`ppo 12/200`."""
        return f"{self.name} {self.step}/{self.pace.total_steps}"

    def times(self) -> str:
        """`0.8 steps/s, 0:15 elapsed, 3:55 left`."""
        elapsed, left_s = f"{_clock(self.pace.elapsed_s)} elapsed", self.pace.left_s(self.step)
        if left_s is None:
            return elapsed
        left = f", {_clock(left_s)} left" if self.step < self.pace.total_steps else ""
        return f"{self.pace.rate(self.step):.3g} steps/s, {elapsed}{left}"

    def _told_best(self, step: int | None) -> str:
        if self.best_step is None:
            return ""
        return " (best)" if self.best_step == step else f" (best: {self.best_step})"


def _cell(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    """`7 s`, `3:20` (minutes), `2:03:20` (hours)."""
    minutes, rest = divmod(int(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

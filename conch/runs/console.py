"""What a person sees of a run: on a terminal a display that stays in place, elsewhere lines of the log.

                  training      evaluation
    step          12            10 (best: 5)           the table: the last step beside the last evaluation
    reward        0.5123        0.61
    ppo 12/200 ━━━──── 0.8 steps/s, ...                the live line: steps, rate, time

Each evaluation is also printed as a line of its own, which scrolls away above the display and is not
overwritten.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from conch.log import get_logger
from conch.types import Metrics

_log = get_logger(__name__)

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

_TRAINING_LINES = 20
"""About as many lines of training are logged in a run; of evaluations each."""


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


@runtime_checkable
class RunConsole(Protocol):
    """Where a run's progress is shown."""

    def training(self, step: int, metrics: Metrics) -> None:
        """Show a step."""
        ...

    def evaluation(self, step: int, metrics: Metrics, *, is_best: bool) -> None:
        """Show an evaluation, which is to stay visible.

        is_best: it is the best so far.
        """
        ...

    def notice(self, text: str) -> None:
        """Show a sentence from within a signal's handler, which may have interrupted anything."""
        ...

    def say(self, text: str) -> None:
        """Print some lines, before `close` or after it."""
        ...

    def close(self) -> None:
        """Leave the terminal in order."""
        ...


def open_console(name: str, total_steps: int, first: int) -> RunConsole:
    """Return the display of a terminal where stderr is one, else the lines of the log.

    name: of what runs: `ppo`.
    first: steps done before this start.
    """
    # Runs of a service are threads beside each other: one terminal has no place for several displays.
    is_alone = threading.current_thread() is threading.main_thread()
    if is_alone and sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown"):
        from conch.runs.terminal import TerminalConsole

        return TerminalConsole(name, total_steps, first)
    return LogConsole(name, total_steps, first)


class LogConsole:
    """Lines of the log: every evaluation, and about twenty steps of a run. See `open_console`."""

    def __init__(self, name: str, total_steps: int, first: int) -> None:
        self._name = name
        self._pace = Pace(total_steps, first)

    def training(self, step: int, metrics: Metrics) -> None:
        total = self._pace.total_steps
        if step % max(1, total // _TRAINING_LINES) and step != total:
            return
        left_s = self._pace.left_s(step)
        pace = "" if left_s is None else f"  ({self._pace.rate(step):.2f} steps/s, {left_s:.0f} s left)"
        _log.info(
            "%s %d/%d training  %s%s", self._name, step, total, as_text(training_figures(metrics)), pace
        )

    def evaluation(self, step: int, metrics: Metrics, *, is_best: bool) -> None:
        _log.info("%s", evaluation_line(self._name, step, self._pace.total_steps, metrics, is_best))

    def notice(self, text: str) -> None:
        write_notice(text)

    def say(self, text: str) -> None:
        _log.info("%s", text)

    def close(self) -> None:
        pass


def write_notice(text: str) -> None:
    """Write a sentence to stderr from within a signal's handler."""
    # Not through logging or print: one of them may be at work in what the signal interrupted.
    os.write(2, f"\n{text}\n".encode())


def evaluation_line(name: str, step: int, total: int, metrics: Metrics, is_best: bool) -> str:
    """What is said of an evaluation, on a line of its own."""
    best = "  (best so far)" if is_best else ""
    return f"{name} {step}/{total} evaluation  {as_text(evaluation_figures(metrics))}{best}"

"""The display of a run at a terminal: a table and a live line that stay below all that is printed."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from conch.runs.console import FIGURES, Pace, evaluation_figures, evaluation_line, training_figures
from conch.types import Metrics

_REFRESHES_PER_S = 2.0


class _Console(Console):
    def show_cursor(self, show: bool = True) -> bool:
        """Leave the cursor alone: a process that is killed would leave a terminal without one."""
        return False


class TerminalConsole:
    """A table and a live line that stay at the bottom of the terminal; all else scrolls above them.

    While it is open, what the process prints on stderr (and on stdout, where that is the terminal too) goes
    above the display.
    """

    def __init__(self, name: str, total_steps: int, first: int) -> None:
        self._name = name
        self._step = first
        self._pace = Pace(total_steps, first)
        self._training: tuple[int, dict[str, float]] | None = None
        self._evaluation: tuple[int, dict[str, float]] | None = None
        self._best_step: int | None = None
        self._notice = ""
        self._console = _Console(file=sys.stderr, force_terminal=True, highlight=False)
        self._live = Live(
            console=self._console,
            get_renderable=self._display,
            refresh_per_second=_REFRESHES_PER_S,
            redirect_stdout=sys.stdout.isatty(),
        )
        _OPEN.append((sys.stdout, sys.stderr))
        self._live.start(refresh=True)

    def training(self, step: int, metrics: Metrics) -> None:
        self._step = step
        self._training = step, training_figures(metrics)

    def evaluation(self, step: int, metrics: Metrics, *, is_best: bool) -> None:
        self._evaluation = step, evaluation_figures(metrics)
        if is_best:
            self._best_step = step
        self.say(evaluation_line(self._name, step, self._pace.total_steps, metrics, is_best))

    def notice(self, text: str) -> None:
        self._notice = text  # the display's own thread shows it

    def say(self, text: str) -> None:
        try:
            # Not broken into lines here: paths and commands are to be copied.
            self._console.print(Text(text), soft_wrap=True)
        except OSError:  # the terminal was closed; the run goes on without it
            self.close()

    def close(self) -> None:
        if self._live.is_started:
            _OPEN.clear()
            with contextlib.suppress(OSError):
                self._live.stop()

    def _display(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self._training is not None or self._evaluation is not None:
            parts.append(self._table())
        parts.append(self._line())
        if self._notice:
            parts.append(Text(self._notice, style="yellow"))
        return Group(*parts)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 4, 0, 0), header_style="bold")
        for title in ("", "training", "evaluation"):
            table.add_column(title, no_wrap=True, min_width=10)
        at_step, training = self._training or (None, {})
        at_evaluation, evaluation = self._evaluation or (None, {})
        table.add_row("step", _cell(at_step), f"{_cell(at_evaluation)}{self._told_best(at_evaluation)}")
        names = [name for name, *_ in FIGURES if name in training or name in evaluation]
        for name in dict.fromkeys([*names, *evaluation]):
            table.add_row(name, _cell(training.get(name)), _cell(evaluation.get(name)))
        return table

    def _told_best(self, step: int | None) -> str:
        if self._best_step is None:
            return ""
        return " (best)" if self._best_step == step else f" (best: {self._best_step})"

    def _line(self) -> Table:
        total, left_s = self._pace.total_steps, self._pace.left_s(self._step)
        line = Table.grid(padding=(0, 1))
        for _ in range(3):
            line.add_column(no_wrap=True)
        times = f"{_clock(self._pace.elapsed_s)} elapsed"
        if left_s is not None:
            times = f"{self._pace.rate(self._step):.3g} steps/s, {times}"
            times += f", {_clock(left_s)} left" if self._step < total else ""
        bar = ProgressBar(total=max(1, total), completed=self._step, width=20)
        line.add_row(f"{self._name} {self._step}/{total}", bar, times)
        return line


_OPEN: list[tuple[Any, Any]] = []
"""stdout and stderr as they were before the display of this process was opened, if one is open."""


def _leave_display() -> None:
    """In a fork of the process: print past the display, whose lock may have been taken at the fork."""
    if _OPEN:
        sys.stdout, sys.stderr = _OPEN.pop()


os.register_at_fork(after_in_child=_leave_display)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    """`7 s`, `3:20` (minutes), `2:03:20` (hours)."""
    minutes, rest = divmod(int(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

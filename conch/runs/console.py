"""What a person sees of a run: at a terminal and in a notebook a display that stays in place, elsewhere lines
of the log.

                  training      evaluation
    step          12            10 (best: 5)           the table: the last step beside the last evaluation
    reward        0.5123        0.61
    ppo 12/200 ━━━──── 0.8 steps/s, ...                the live line: steps, rate, time

Each evaluation is also told on a line of its own, which is not overwritten.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Protocol, runtime_checkable

from conch.log import get_logger
from conch.runs.board import Board, Pace, as_text, training_figures
from conch.types import Metrics

_log = get_logger(__name__)

_TRAINING_LINES = 20
"""About as many lines of training are logged in a run; of evaluations each."""


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


def open_console(name: str, total_steps: int, first: int, run_dir: Path) -> RunConsole:
    """Return the display of a notebook or of a terminal where stderr is one, else the lines of the log.

    name: of what runs: `ppo`.
    first: steps done before this start, whose metrics are in `run_dir`.
    """
    board = Board(name, Pace(total_steps, first), first)
    # Runs of a service are threads beside each other: one terminal has no place for several displays.
    if threading.current_thread() is not threading.main_thread():
        return LogConsole(board)
    if "IPython" in sys.modules:
        from conch.runs.notebook import NotebookConsole, is_in_notebook

        if is_in_notebook():
            return NotebookConsole(board, run_dir)
    if _can_draw():
        from conch.runs.terminal import TerminalConsole

        return TerminalConsole(board)
    return LogConsole(board)


def _can_draw() -> bool:
    """Whether stderr is a terminal where a display can stay in place."""
    # Jupyter gives a command after "!" a pseudo-terminal, and prints all of it into the cell.
    environment = os.environ
    is_in_cell = "JPY_PARENT_PID" in environment or "backend_inline" in environment.get("MPLBACKEND", "")
    is_terminal = sys.stderr.isatty() and environment.get("TERM", "") not in ("", "dumb", "unknown")
    return is_terminal and not is_in_cell


class LogConsole:
    """Lines of the log: every evaluation, and about twenty steps of a run. See `open_console`."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def training(self, step: int, metrics: Metrics) -> None:
        board, pace = self._board, self._board.pace
        board.train(step, metrics)
        total = pace.total_steps
        if step % max(1, total // _TRAINING_LINES) and step != total:
            return
        left_s = pace.left_s(step)
        told = "" if left_s is None else f"  ({pace.rate(step):.2f} steps/s, {left_s:.0f} s left)"
        _log.info("%s training  %s%s", board.head(), as_text(training_figures(metrics)), told)

    def evaluation(self, step: int, metrics: Metrics, *, is_best: bool) -> None:
        _log.info("%s", self._board.evaluate(step, metrics, is_best=is_best))

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

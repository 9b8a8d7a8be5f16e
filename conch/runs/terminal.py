"""The display of a run at a terminal: a table and a live line that stay below all that is printed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from conch.runs.board import Board
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

    def __init__(self, board: Board) -> None:
        self._board = board
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
        self._board.train(step, metrics)

    def evaluation(self, step: int, metrics: Metrics, *, is_best: bool) -> None:
        self.say(self._board.evaluate(step, metrics, is_best=is_best))

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
        parts: list[RenderableType] = [self._line()]
        if rows := self._board.rows():
            parts.insert(0, _table(rows))
        if self._notice:
            parts.append(Text(self._notice, style="yellow"))
        return Group(*parts)

    def _line(self) -> Table:
        line, board = Table.grid(padding=(0, 1)), self._board
        for _ in range(3):
            line.add_column(no_wrap=True)
        bar = ProgressBar(total=max(1, board.pace.total_steps), completed=board.step, width=20)
        line.add_row(board.head(), bar, board.times())
        return line


def _table(rows: Sequence[tuple[str, str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 4, 0, 0), header_style="bold")
    for title in ("", "training", "evaluation"):
        table.add_column(title, no_wrap=True, min_width=10)
    for row in rows:
        table.add_row(*row)
    return table


_OPEN: list[tuple[Any, Any]] = []
"""stdout and stderr as they were before the display of this process was opened, if one is open."""


def _leave_display() -> None:
    """In a fork of the process: print past the display, whose lock may have been taken at the fork."""
    if _OPEN:
        sys.stdout, sys.stderr = _OPEN.pop()


os.register_at_fork(after_in_child=_leave_display)

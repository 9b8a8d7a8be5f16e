"""The display of a run in a notebook: a progress bar, the table, and curves that grow below the cell."""

from __future__ import annotations

import base64
import html
import multiprocessing
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conch.errors import DataError
from conch.runs.board import Board, has_evaluation
from conch.runs.console import write_notice
from conch.runs.plots import Curves
from conch.runs.state import METRICS_FILE
from conch.types import Metrics

if TYPE_CHECKING:
    from conch.runs.reading import Run

_LEAST_S = 0.5
"""Seconds between two drawings, at least."""

_SHARE = 0.03
"""Part of the time between two pictures that drawing one may take."""


def is_in_notebook() -> bool:
    """Whether a kernel of Jupyter runs this process, and it is not a child that the notebook launched."""
    from IPython.core.getipython import get_ipython

    # A terminal of IPython has no kernel. A child's output would miss the cell or end in its parent's socket.
    return getattr(get_ipython(), "kernel", None) is not None and multiprocessing.parent_process() is None


class NotebookConsole:
    """Shows a run below the cell that trains; nothing runs beside training, which draws between two steps.

    board: of the run.
    run_dir: whose earlier metrics the curves begin with, where the run goes on.
    curves: what is drawn.
    """

    def __init__(self, board: Board, run_dir: Path) -> None:
        from IPython.display import DisplayHandle

        self._board = board
        self.curves = Curves()
        if (run_dir / METRICS_FILE).is_file():
            from conch.runs.reading import load

            self.curves.extend(load(run_dir).metrics())
        self._evaluations: list[str] = []
        self._handles = DisplayHandle(), DisplayHandle()
        self._was_drawn = [False, False]
        self._board_due = self._curves_due = 0.0
        self._is_open = True
        self._draw_board()

    def training(self, step: int, metrics: Metrics) -> None:
        self._board.train(step, metrics)
        if not has_evaluation(metrics):  # else `evaluation` follows, with the same metrics
            self.curves.add(step, metrics)
            self._draw_if_due()

    def evaluation(self, step: int, metrics: Metrics, *, is_best: bool) -> None:
        self._evaluations.append(self._board.evaluate(step, metrics, is_best=is_best))
        self.curves.add(step, metrics)
        self._draw_if_due()

    def notice(self, text: str) -> None:
        write_notice(text)

    def say(self, text: str) -> None:
        print(text)

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._draw_board()
            self._draw_curves()

    def _draw_if_due(self) -> None:
        start = time.monotonic()
        if start >= self._board_due:
            self._draw_board()
            self._board_due = time.monotonic() + _LEAST_S
        if start >= self._curves_due:
            start = time.monotonic()
            self._draw_curves()
            end = time.monotonic()
            self._curves_due = end + max(_LEAST_S, (end - start) / _SHARE)

    def _draw_board(self) -> None:
        page = board_html(self._board, self._evaluations)
        self._show(0, {"text/html": page, "text/plain": f"{self._board.head()}  {self._board.times()}"})

    def _draw_curves(self) -> None:
        if png := self.curves.png():
            self._show(1, {"image/png": png, "text/plain": "curves"})

    def _show(self, place: int, data: Mapping[str, Any]) -> None:
        show = self._handles[place].update if self._was_drawn[place] else self._handles[place].display
        metadata = {"image/png": {"width": self.curves.width}} if "image/png" in data else {}
        show(data, raw=True, metadata=metadata)
        self._was_drawn[place] = True


def board_html(board: Board, evaluations: Iterable[str] = ()) -> str:
    """The bar, the table, and a list of all evaluations that opens by a click."""
    total = max(1, board.pace.total_steps)
    bar = f'<progress value="{board.step}" max="{total}" style="width:16em"></progress>'
    parts = [f"<div>{html.escape(board.head())} {bar} {html.escape(board.times())}</div>"]
    if rows := board.rows():
        lines = [("", "training", "evaluation"), *rows]
        cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in lines]
        parts.append(f"<table>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>")
    told = html.escape("\n".join(evaluations))
    if told:
        parts.append(f"<details><summary>evaluations</summary><pre>{told}</pre></details>")
    return "".join(parts)


def run_html(run: Run) -> str:
    """A run of the disk as a notebook shows it: a line that says how it stands, and its curves."""
    summary = run.summary
    steps = f"{'?' if summary.step is None else summary.step}/{summary.total_steps or '?'}"
    parts = [f"{summary.algorithm or 'run'} {steps} {summary.state}"]
    if summary.best is not None:
        parts.append(f"best {summary.metric} {summary.best:.4g} at step {summary.best_step}")
    parts.append(str(run.folder))
    head = f"<div>{html.escape(', '.join(parts))}</div>"
    try:
        curves = Curves(run.metrics())
    except DataError as error:
        return f"{head}<div>{html.escape(str(error))}</div>"
    png = curves.png()
    if png is None:
        return head
    source = base64.b64encode(png).decode()
    return f'{head}<img alt="curves" width="{curves.width}" src="data:image/png;base64,{source}">'

"""What is drawn of a run in a notebook."""

from __future__ import annotations

import importlib
import math
from itertools import pairwise
from pathlib import Path

import pytest

from conch.runs import load
from conch.runs.board import Board, Pace
from conch.runs.console import LogConsole, open_console
from conch.runs.notebook import NotebookConsole, board_html
from conch.runs.plots import Curves


def test_board_is_escaped_and_its_evaluations_are_listed() -> None:
    board = Board("<b>ppo</b>", Pace(10, 0), 0)
    told = board.evaluate(3, {"eval/reward": 0.5, "eval/<i>": 1.0}, is_best=True)
    page = board_html(board, [told])
    assert "&lt;b&gt;ppo&lt;/b&gt; 0/10" in page and "<td>&lt;i&gt;</td><td>-</td><td>1</td>" in page
    assert "<b>" not in page and "<i>" not in page
    assert "<summary>evaluations</summary>" in page and "3 (best)" in page


def test_curves_need_two_points_and_show_at_most_three_in_a_line() -> None:
    curves = Curves([{"step": 1, "reward/mean": 0.5}])
    assert curves.png() is None
    curves.add(2, {"reward/mean": math.nan, "policy/kl": 0.1})
    one_line = curves.png()
    assert one_line is not None and curves.width == 544
    curves.add(3, {"reward/mean": 1.0, "train/loss": 2.0, "policy/entropy": 1.0, "eval/accuracy": 0.5})
    two_lines = curves.png()
    assert two_lines is not None and curves.width == 816
    assert size(two_lines)[1] == 2 * size(one_line)[1]
    assert size(two_lines)[0] == 2 * curves.width


def size(png: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the head of a PNG."""
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def test_curves_of_a_long_run_keep_evenly_spread_points() -> None:
    curves = Curves()
    for step in range(10_000):
        curves.add(step, {"reward/mean": float(step)})
    points = curves.points("reward")
    *spread, last = points.steps
    assert 500 <= len(spread) <= 1000
    assert points.steps == [int(value) for value in points.values]
    assert {after - before for before, after in pairwise(spread)} == {16}
    assert spread[0] == 0 and last == 9_999  # the step that was done last is always there


def test_run_of_the_disk_says_how_it_stands_or_what_is_damaged(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "reward/mean": 0.5}\n{"step": 2, "reward/mean": null}\n')
    page = load(tmp_path)._repr_html_()
    assert str(tmp_path) in page and "<img" in page
    metrics.write_text('{"step": 1, "reward/mean": 0.5}\n{"st\n{"step": 2}\n')
    page = load(tmp_path)._repr_html_()
    assert "line 2 of " in page and "<img" not in page


def test_shell_without_a_kernel_gets_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Loaded, as a user's helper may load it, but not what runs the program.
    importlib.import_module("IPython")
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_console("ppo", 3, 0, tmp_path), LogConsole)


def test_step_with_an_evaluation_is_one_point_and_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[str] = []
    monkeypatch.setattr("conch.runs.notebook._LEAST_S", 0.0)
    monkeypatch.setattr("conch.runs.notebook.board_html", lambda *args: pages.append(board_html(*args)) or "")
    console = NotebookConsole(Board("ppo", Pace(10, 0), 0), tmp_path)
    for step in (1, 2):
        metrics = {"reward/mean": 0.5, "eval/reward": step / 4}
        console.training(step, metrics)
        console.evaluation(step, metrics, is_best=True)
    assert console.curves.points("reward").steps == [1, 2]
    assert "ppo 2/10 evaluation  reward 0.5  (best so far)" in pages[-1]


def test_resumed_run_draws_what_it_did_before(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "reward/mean": 0.5}\n{"step": 2, "reward/mean": 1.5}\n'
    )
    console = NotebookConsole(Board("ppo", Pace(10, 2), 2), tmp_path)
    assert console.curves.points("reward").values == [0.5, 1.5]

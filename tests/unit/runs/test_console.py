"""What a person sees of a run: at a real pseudo-terminal, and in a pipe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conch.runs.board import evaluation_figures
from tests.terminal import ROOT, AtTerminal

HEAD = """
import os, signal, sys, time
from pathlib import Path
from conch.config import TrackingConfig
from conch.log import get_logger, setup_logging
from conch.runs.tracking import Tracker

setup_logging()
folder = Path(sys.argv[1])
tracker = Tracker(folder, TrackingConfig(), total_steps=40, desc="ppo")
"""
RUN = """
with tracker:
    tracker.log(0, {"eval/reward": 0.25, "eval/optimality": 0.5}, is_best=True)
    for step in range(1, 41):
        metrics = {"reward/mean": step / 64, "policy/kl": 1.5, "train/loss": 3.0}
        if step == 17:
            get_logger("conch.part").warning("trouble at %d", step)
            print("from a reward [bold]function[/bold]", folder / ("x" * 120))
        if step % 13 == 0:
            metrics |= {"eval/reward": 0.25 + step / 64, "eval/kl": 1.25}
        tracker.log(step, metrics, is_best=step == 26)
        time.sleep(0.05)
tracker.say("the end is near: conch report " + "y" * 120)
"""


def at_terminal(program: str, folder: Path, **environment: str) -> AtTerminal:
    return AtTerminal([sys.executable, "-c", HEAD + program, str(folder)], **environment)


def test_terminal_has_a_live_line_and_training_beside_evaluation(tmp_path: Path) -> None:
    with at_terminal(RUN, tmp_path) as terminal:
        lines = terminal.finish().text.splitlines()
        raw = terminal.raw
    table = [line.split() for line in lines if line.startswith(("    ", "step ", "reward ", "kl ", "loss "))]
    assert table == [
        ["training", "evaluation"],
        ["step", "40", "39", "(best:", "26)"],
        ["reward", "0.625", "0.8594"],
        ["kl", "1.5", "1.25"],
        ["loss", "3", "-"],
    ], "once, at the end: what was drawn before it is gone"
    assert [line for line in lines if "━" in line] == [
        line for line in lines if line.startswith("ppo 40/40 ━")
    ]
    assert b"?25l" not in raw, "no hidden cursor is left to whoever kills the run"


def test_terminal_keeps_each_evaluation_and_all_that_is_printed(tmp_path: Path) -> None:
    with at_terminal(RUN, tmp_path) as terminal:
        lines = terminal.finish().text.splitlines()
    assert [line for line in lines if " evaluation  " in line] == [
        "ppo 0/40 evaluation  reward 0.25  optimality 0.5  (best so far)",
        "ppo 13/40 evaluation  reward 0.4531  kl 1.25",
        "ppo 26/40 evaluation  reward 0.6562  kl 1.25  (best so far)",
        "ppo 39/40 evaluation  reward 0.8594  kl 1.25",
    ]
    assert any(line.endswith("W conch.part: trouble at 17") for line in lines)
    assert "from a reward [bold]function[/bold]" in "".join(lines) and "x" * 120 in "".join(lines)
    assert lines[-1] == f"the end is near: conch report {'y' * 120}", "to be copied in one piece"


def test_pipe_gets_lines_with_every_evaluation(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HEAD + RUN, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    lines = [line.partition(": ")[2] for line in done.stderr.splitlines()]
    assert [line.split()[1] for line in lines if " evaluation  " in line] == [
        "0/40",
        "13/40",
        "26/40",
        "39/40",
    ]
    assert [line.split()[1] for line in lines if " training  " in line] == [
        f"{k}/40" for k in range(2, 41, 2)
    ]
    assert lines[-1].startswith("the end is near") and "\x1b" not in done.stderr + done.stdout
    assert done.stdout.startswith("from a reward [bold]function[/bold]")


@pytest.mark.parametrize(
    "environment",
    [
        {"TERM": "dumb"},
        {"RANK": "1"},
        {"JPY_PARENT_PID": "1"},
        {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
    ],
    ids=["dumb", "rank 1", "below a kernel", "below a kernel that VS Code started"],
)
def test_no_display_is_drawn_where_none_can_be_or_by_another_rank(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with at_terminal(RUN, tmp_path, **environment) as terminal:
        screen = terminal.finish()
    assert b"\x1b" not in terminal.raw
    is_logged = [line in screen.text for line in ("40/40 training  ", "39/40 evaluation  ")]
    assert is_logged == ["RANK" not in environment] * 2


def test_notice_of_a_signal_is_shown_while_a_step_goes_on(tmp_path: Path) -> None:
    program = """
signal.signal(signal.SIGINT, lambda *_: tracker.notice("finishing the step"))
with tracker:
    tracker.log(1, {"reward/mean": 0.5})
    while not (folder / "done").exists():
        time.sleep(0.1)
"""
    with at_terminal(program, tmp_path) as terminal:
        terminal.read_until(lambda screen: "ppo 1/40" in screen.text)
        terminal.press(b"\x03")
        screen = terminal.read_until(lambda screen: "finishing the step" in screen.text)
        live, notice = screen.lines[-2:]
        assert (
            live.startswith("ppo 1/40 ") and "━" in live and " steps/s, " in live and live.endswith(" left")
        )
        assert notice == "finishing the step"
        (tmp_path / "done").touch()
        assert terminal.finish().text.count("finishing the step") == 1


def test_display_is_closed_before_a_traceback(tmp_path: Path) -> None:
    with at_terminal(
        "with tracker:\n    tracker.log(1, {'reward/mean': 0.5})\n    1 / 0", tmp_path
    ) as terminal:
        lines = terminal.finish().text.splitlines()
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert lines.index("Traceback (most recent call last):") > max(
        place for place, line in enumerate(lines) if line.startswith("ppo 1/40")
    )


def test_run_goes_on_without_its_terminal(tmp_path: Path) -> None:
    program = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with tracker:
    tracker.log(1, {"reward/mean": 0.5})
    while not (folder / "closed").exists():
        time.sleep(0.1)
    for step in range(2, 5):
        tracker.log(step, {"eval/reward": 0.5})
        time.sleep(0.6)  # longer than the display takes to draw itself anew
(folder / "whole").touch()
"""
    with at_terminal(program, tmp_path) as terminal:
        terminal.read_until(lambda screen: "ppo 1/40" in screen.text)
        terminal.hang_up()
        (tmp_path / "closed").touch()
        terminal.process.wait(120)
    assert (tmp_path / "whole").exists()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_fork_prints_past_the_display(tmp_path: Path) -> None:
    program = """
with tracker:
    if (child := os.fork()) == 0:
        (folder / "child").write_text(f"{sys.stdout is sys.__stdout__} {sys.stderr is sys.__stderr__}")
        os._exit(0)
    os.waitpid(child, 0)
    (folder / "parent").write_text(f"{sys.stdout is sys.__stdout__} {sys.stderr is sys.__stderr__}")
"""
    with at_terminal(program, tmp_path) as terminal:
        terminal.finish()
    assert (tmp_path / "child").read_text() == "True True"
    assert (tmp_path / "parent").read_text() == "False False"


def test_figures_of_an_evaluation_are_the_main_ones_and_those_of_a_user() -> None:
    metrics = {
        "eval/optimality": 0.5,
        "eval/reward": 1.0,
        "eval/reward_standard_error": 0.1,
        "train/loss": 2.0,
    }
    metrics |= {"eval/optimality@beta=1": 0.25, "eval/gold/seconds": 3.0, "eval/kl": 4.0}
    metrics |= {f"eval/fact{number}": 0.0 for number in range(9)}
    figures = evaluation_figures(metrics)
    assert list(figures) == ["reward", "kl", "optimality", "fact0", "fact1", "fact2"]

"""Processes that hang end by themselves, say so, and leave the stacks of who waits for whom."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launches import LONGEST_S, accelerate, kill_all, start, torchrun

ALONE, RANKS = "tests.integration.watchdog_run", "tests.integration.hang_run"
LOST = "event.wait()  # nobody sets it"


def hang(
    kind: str, run: Path, seconds: float, launcher: list[str] | None = None, *, fresh: bool = False
) -> subprocess.Popen[str]:
    """A process, or ranks of a launcher, that hang in that way; deadlines take so many seconds."""
    program = [sys.executable, "-m", ALONE] if launcher is None else [*launcher, "-m", RANKS]
    return start([*program, kind, str(run), str(seconds)], fresh=fresh)


def output_of(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=LONGEST_S)[0]
    finally:
        kill_all(process)


def stacks(run: Path, rank: int = 0) -> str:
    return (run / "stuck" / f"rank_{rank}.txt").read_text()


def test_a_lost_thread_ends_the_run_with_its_stack(tmp_path: Path) -> None:
    process = hang("queue", tmp_path, 1.0)
    output = output_of(process)
    assert process.returncode == 1
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "nothing has moved on rank 0 for `asynchronous.deadline_s`=1 s" in error
    assert "completion 1 s ago (1 in all)" in error
    assert "server 127.0.0.1:1 holds version 3, group 7 under way for 4 s" in error
    assert "breaks fails: OSError: connection refused" in error and f"in {tmp_path}/stuck/rank_0.txt" in error
    text = stacks(tmp_path)
    sampler = text[text.index("Thread sampler") :]
    assert LOST in sampler.split("\nThread ")[0]
    assert "Thread MainThread" in text and "raise groups.get()" in text
    assert "Thread of an actor" in text


def test_a_main_thread_that_hangs_in_c_is_ended_after_the_grace(tmp_path: Path) -> None:
    process = hang("c", tmp_path, 1.0)
    output = output_of(process)
    assert process.returncode == 1
    assert output.splitlines()[-1].endswith("the main thread hangs, so this process ends")
    assert "ctypes.CDLL(None).sleep(LONG_S)" in stacks(tmp_path)


def test_notes_and_long_phases_keep_it_quiet(tmp_path: Path) -> None:
    process = hang("slow", tmp_path, 2.0)
    assert "ended well" in output_of(process)
    assert process.returncode == 0 and not (tmp_path / "stuck").exists()


def test_a_process_that_was_stopped_does_not_take_it_for_a_hang(tmp_path: Path) -> None:
    process = hang("slow", tmp_path, 3.0, fresh=True)
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    for _ in range(2):
        process.send_signal(signal.SIGSTOP)
        time.sleep(5)
        process.send_signal(signal.SIGCONT)
        time.sleep(1)
    assert "ended well" in output_of(process)
    assert process.returncode == 0 and not (tmp_path / "stuck").exists()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("all_reduce", "in all_reduce"),
        ("backward", "in a backward pass"),
        pytest.param("all_gather", "in all_gather", marks=pytest.mark.slow),
        # gloo has who sends wait, too, today; the barrier behind it waits in any case.
        pytest.param("broadcast", "in (broadcast|barrier)", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_hangs_ends_the_run_at_the_deadline_of_a_collective(
    kind: str, words: str, tmp_path: Path
) -> None:
    # Of forked ranks, the watch's thread does not get to run while a backward pass waits.
    process = hang(kind, tmp_path, 10.0, torchrun(2), fresh=True)
    output = output_of(process)
    assert process.returncode not in (0, None)
    assert re.search(
        f"error: rank 0 waited for the other processes of this run, {words}, until the deadline", output
    ), output
    assert (
        f"its stacks are in {tmp_path}/stuck/rank_0.txt, those of the others beside it (Timed out" in output
    )
    assert f"rank 1 computes or is stuck; its stacks are in {tmp_path}/stuck/rank_1.txt" in output
    assert LOST in stacks(tmp_path, 1)
    assert stacks(tmp_path, 1).count("====") == 1  # they do not answer each other's answers


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2-bf16", "zero3"])
def test_the_deadline_holds_in_the_groups_of_deepspeed(config: str, tmp_path: Path) -> None:
    process = hang("backward", tmp_path, 20.0, accelerate(config, 2))
    output = output_of(process)
    assert process.returncode not in (0, None)
    assert "error: rank 0 waited for the other processes of this run, in " in output
    assert LOST in stacks(tmp_path, 1)


def test_two_ranks_end_each_with_a_sentence_where_one_hangs_in_c(tmp_path: Path) -> None:
    process = hang("watched_ranks", tmp_path, 3.0, torchrun(2))
    output = output_of(process)
    assert process.returncode not in (0, None)
    assert "nothing has moved on rank 1" in output
    assert "nothing has moved on rank 0" in output or "error: another process of this run is gone" in output
    assert "ctypes.CDLL(None).sleep(LONG_S)" in stacks(tmp_path, 1)

"""A process of a run that is killed takes the others along, and they say why."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.launches import LONGEST_S, accelerate, kill_all, ranks_of, start, torchrun

GONE_WITHIN_S = 60
PROGRAM = "tests.integration.resume_run"


def train_for_ever(launcher: list[str], run_dir: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A run of two ranks in the midst of its steps."""
    settings = ["num_processes=2", "total_steps=1000000", "save_every=0", "eval_every=0"]
    process = start([*launcher, "-m", PROGRAM, "sft", str(run_dir), *settings], fresh=True)
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + LONGEST_S
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = [rank for rank in ranks_of(process) if PROGRAM in rank.cmdline()]
    assert len(ranks) == 2
    return process, ranks


def assert_all_leave(process: subprocess.Popen[str], ranks: list[psutil.Process]) -> str:
    """What they said."""
    _, alive = psutil.wait_procs(ranks, timeout=GONE_WITHIN_S)
    assert not alive
    output, _ = process.communicate(timeout=GONE_WITHIN_S)
    return output


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(lambda: torchrun(2), id="torchrun"),
        pytest.param(lambda: accelerate("zero2-bf16", 2), id="accelerate", marks=pytest.mark.slow),
    ],
)
def test_a_killed_rank_ends_the_run_with_the_reason(
    tmp_path: Path, launcher: Callable[[], list[str]]
) -> None:
    process, ranks = train_for_ever(launcher(), tmp_path / "run")
    try:
        victim = max(ranks, key=lambda rank: int(rank.environ()["RANK"]))
        victim.kill()
        output = assert_all_leave(process, ranks)
    finally:
        kill_all(process)
    assert process.returncode not in (0, None)
    assert "error: another process of this run is gone" in output
    assert f"(pid: {victim.pid})" in output and "exitcode  : -9" in output  # the launcher's report


def test_a_killed_launcher_takes_its_ranks_along(tmp_path: Path) -> None:
    process, ranks = train_for_ever(torchrun(2), tmp_path / "run")
    try:
        process.kill()
        output = assert_all_leave(process, ranks)
    finally:
        for rank in ranks:
            if rank.is_running():
                rank.kill()
    assert f"error: the launcher (process {process.pid}) is gone: leaving too" in output
    assert "SIGTERM: saved step" in output  # as before a preemption
    assert list((tmp_path / "run" / "checkpoints").glob("step_*/trainer_state.json"))

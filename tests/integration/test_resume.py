"""Killed and resumed runs equal undisturbed ones bit for bit, on one process and two."""

from __future__ import annotations

import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import launches
from tests.clock import CLOCK
from tests.integration.resume_run import KINDS, TRAIN
from tests.launches import torchrun

LONGEST_S = 180


def start(
    kind: str, run_dir: Path, ranks: int, *overrides: str, fresh: bool = False
) -> subprocess.Popen[str]:
    launcher = torchrun(ranks) if ranks > 1 else [sys.executable]
    run = ["-m", "tests.integration.resume_run", kind, str(run_dir), f"num_processes={ranks}"]
    return launches.start([*launcher, *run, *overrides], fresh=fresh, ACCELERATE_USE_CPU="true")


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=LONGEST_S)
    assert process.returncode == 0, output
    return output


def kill_when(process: subprocess.Popen[str], ready: Callable[[], bool]) -> bool:
    """SIGKILL every process of the run at the first instant that `ready` holds; False if it ended before."""
    deadline = time.monotonic() + LONGEST_S
    while not ready():
        if process.poll() is not None:
            process.communicate()
            return False
        assert time.monotonic() < deadline
        time.sleep(0.001)
    # torchrun gives each rank a session of its own: killing the launcher's would leave them running.
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(everyone, timeout=LONGEST_S)
    process.communicate(timeout=LONGEST_S)
    return True


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{name: value for name, value in row.items() if not name.startswith(CLOCK)} for row in rows]


def steps_logged(run_dir: Path) -> int:
    """Rows so far, a half-written one included."""
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def is_saving(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob(".step_*.partial"))


def assert_same_run(found: Path, expected: Path) -> None:
    assert [row["step"] for row in metrics_of(found)] == list(range(TRAIN["total_steps"] + 1))
    assert metrics_of(found) == metrics_of(expected)
    last = f"checkpoints/step_{TRAIN['total_steps']}"
    names = sorted(path.relative_to(expected) for path in (expected / last).rglob("*.safetensors"))
    assert names
    for name in [*names, Path(last, "state/optimizer.bin")]:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


# Those whose state is the most run on two processes in `make test`, the others in `make test-slow`.
USUAL = (("ppo", 1),)
CASES = [
    pytest.param(kind, ranks, marks=[] if (kind, ranks) in USUAL else [pytest.mark.slow])
    for kind in KINDS
    for ranks in (1, 2)
]


@pytest.mark.parametrize(("kind", "ranks"), CASES)
def test_a_killed_run_equals_an_undisturbed_one(tmp_path: Path, kind: str, ranks: int) -> None:
    calm, storm = tmp_path / "calm", tmp_path / "storm"
    finish(start(kind, calm, ranks, "save_in_background=false"))
    chance = random.Random(f"{kind} {ranks}")
    step = chance.randrange(2, 5)
    instant = time.monotonic() + 3600

    def at_a_random_instant() -> bool:
        nonlocal instant
        if steps_logged(storm) > step:
            instant = min(instant, time.monotonic() + chance.uniform(0.0, 0.1))
        return time.monotonic() >= instant

    assert kill_when(start(kind, storm, ranks, fresh=True), at_a_random_instant)
    reached = steps_logged(storm)
    again = start(kind, storm, ranks, fresh=True)
    assert kill_when(again, lambda: is_saving(storm) and steps_logged(storm) >= reached)
    output = finish(start(kind, storm, ranks))
    assert "going on with" in output
    assert_same_run(storm, calm)


@pytest.mark.parametrize(
    ("number", "code", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")]
)
def test_a_run_that_is_told_to_leave_saves_and_goes_on(
    tmp_path: Path, number: signal.Signals, code: int, name: str
) -> None:
    calm, storm = tmp_path / "calm", tmp_path / "storm"
    finish(start("ppo", calm, 1))
    process = start("ppo", storm, 1, "save_every=0")
    while steps_logged(storm) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=LONGEST_S)
    assert process.returncode == code, output
    assert f"{name}: saved step" in output and "Traceback" not in output
    finish(start("ppo", storm, 1, "save_every=0"))
    assert_same_run(storm, calm)


def test_ctrl_c_under_torchrun_saves_on_all_ranks_without_a_traceback_of_theirs(tmp_path: Path) -> None:
    storm = tmp_path / "storm"
    process = start("sft", storm, 2, "save_every=0", "total_steps=1000000", "eval_every=0")
    while steps_logged(storm) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=LONGEST_S)
    step = len(metrics_of(storm))
    assert f"Ctrl-C: saved step {step}" in output
    # torchrun's own says which signal it got.
    launchers = output.partition("Traceback")[2]
    assert "KeyboardInterrupt" not in output and "conch" not in launchers, launchers
    assert "going on with" in finish(start("sft", storm, 2, f"total_steps={step + 1}", "eval_every=0"))


def test_a_rank_that_cannot_write_its_part_ends_the_run_without_half_a_checkpoint(tmp_path: Path) -> None:
    settings = ("save_every=3", "total_steps=1000000", "eval_every=0", "file_bytes_of_rank_1=4096")
    process = start("sft", tmp_path / "run", 2, *settings)
    output, _ = process.communicate(timeout=LONGEST_S)
    assert process.returncode not in (0, None)
    assert re.search(r"error: the checkpoint \S+step_3 cannot be written: .*File too large", output), output
    assert "1 of 2 processes failed" in output or "another process has not written its part" in output
    assert list((tmp_path / "run/checkpoints").iterdir()) == []
    assert steps_logged(tmp_path / "run") < 100


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    finish(start("sft", tmp_path / "run", 1, "total_steps=2"))
    process = start("sft", tmp_path / "run", 2, "total_steps=4")
    output, _ = process.communicate(timeout=LONGEST_S)
    assert process.returncode != 0
    assert "was saved by 1 processes, here run 2" in output

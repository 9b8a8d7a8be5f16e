"""SIGKILL to a sweep's parent and to single jobs at random moments: the results are those of calm ones."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.integration.sweeps import (
    LETTERS,
    LONGEST_S,
    TOY,
    assert_equal,
    processes_of,
    run,
    start,
    states,
    wait_until,
)

KILLS = 20
GRID = [
    *("optimizer.learning_rate=2e-3,1e-2", "train.seed=range(0,3)"),
    *("train.total_steps=24", "train.eval_every=4", "sweep.jobs=2", "sweep.retries=99"),
]
SEARCH = [
    *("rate=tag(log,interval(1e-4,10))", "width=range(1,4)", "shape=glob(*)", "sweep.trials=16"),
    *(
        "train.total_steps=8",
        "pause_s=0.05",
        "sweep.jobs=2",
        "sweep.prune=median",
        "sweep.n_startup_trials=3",
    ),
    "sweep.retries=99",
]


WHAT = ["parent", "job", "job", "guard and parent"]


def kill_something(process: subprocess.Popen[str], folder: Path, what: str, chance: random.Random) -> bool:
    """SIGKILL to the parent, to a job, or to the guard and then the parent; False if it had ended."""
    if what == "job":
        if not wait_until(lambda: bool(processes_of(folder)), process):
            return False
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            chance.choice(processes_of(folder)).kill()
            return True
        return False
    if what == "guard and parent":
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children():
                if any("guard.py" in word for word in child.cmdline()):
                    child.kill()
    process.send_signal(signal.SIGKILL)
    return True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "words", "longest_s"), [(LETTERS, GRID, 12.0), (TOY, SEARCH, 3.0)], ids=["trainer", "search"]
)
def test_results_after_twenty_kills_are_those_of_an_undisturbed_sweep(
    tmp_path: Path, program: Sequence[str], words: list[str], longest_s: float
) -> None:
    calm, storm = tmp_path / "calm", tmp_path / "storm"
    run(program, calm, *words)
    assert set(states(calm)) <= {"done", "pruned"}
    chance = random.Random(21)
    killed: Counter[str] = Counter()
    starts = ended = 0
    deadline = time.monotonic() + 4 * LONGEST_S
    process = None
    while killed.total() < KILLS:
        assert time.monotonic() < deadline
        if process is None or process.poll() is not None:
            if process is not None:
                output, _ = process.communicate()
                if process.returncode == 0:
                    # Through before the kills were: begin again with another folder.
                    assert_equal(storm, calm)
                    ended += 1
                    storm = tmp_path / f"storm{ended}"
                else:
                    assert process.returncode in (-9, 1), output
            process = start(program, storm, *words)
            starts += 1
        what, until = chance.choice(WHAT), time.monotonic() + chance.uniform(0.2, longest_s)
        while time.monotonic() < until and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is None and kill_something(process, storm, what, chance):
            killed[what] += 1
            if chance.random() < 0.5:
                time.sleep(0.3)
    process.communicate(timeout=LONGEST_S)
    run(program, storm, *words)
    assert not processes_of(storm)
    print(f"kills: {dict(killed)}; sweeps started {starts} times, {ended + 1} came to their end")
    assert_equal(storm, calm)

"""Sweeps as users start them, and what they leave."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.clock import CLOCK

ROOT = Path(__file__).resolve().parents[2]
LONGEST_S = 300
TOY = (sys.executable, "-m", "tests.fakes.sweep_program")
LETTERS = (sys.executable, "-m", "tests.integration.sweep_run")


def start(
    program: Sequence[str], folder: Path | None, *words: str, cwd: Path = ROOT, **environment: str
) -> subprocess.Popen[str]:
    """Start a sweep in a session of its own; output and errors come on `stdout`."""
    where = [] if folder is None else [f"sweep.dir={folder}"]
    return subprocess.Popen(
        [*program, "--multirun", *words, *where],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """All output of a sweep that must end with this code."""
    try:
        output, _ = process.communicate(timeout=LONGEST_S)
    finally:
        process.kill()
    assert process.returncode == code, output
    return output


def run(program: Sequence[str], folder: Path, *words: str, code: int = 0, **environment: str) -> str:
    """The same from the start."""
    return finish(start(program, folder, *words, **environment), code)


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """Wait for something that a sweep does; False where it ended before."""
    deadline = time.monotonic() + LONGEST_S
    while not ready():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return True


def processes_of(folder: Path) -> list[psutil.Process]:
    """Everything that runs for the jobs of a sweep, in whatever session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("CONCH_SWEEP") == str(folder.resolve()):
                found.append(process)
    return found


def wait_for_end(folder: Path) -> None:
    """Wait until nothing of a sweep runs any more."""
    deadline = time.monotonic() + 60
    while left := processes_of(folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a sweep's parent alone."""
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=LONGEST_S)


def table(folder: Path) -> list[dict[str, str]]:
    """Rows of `sweep.csv` without what follows the clock."""
    with (folder / "sweep.csv").open(newline="") as file:
        return [
            {name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)
        ]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl` without what follows the clock."""
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{name: value for name, value in row.items() if not name.startswith(CLOCK)} for row in rows]


def steps(run_dir: Path) -> int:
    """Rows so far."""
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def seen(run_dir: Path) -> dict[str, Any]:
    """What the toy program saw of its command line and environment."""
    return json.loads((run_dir / "seen.json").read_text())


def states(folder: Path) -> list[str]:
    """State of each job."""
    return [row["state"] for row in table(folder)]


def assert_equal(found: Path, expected: Path) -> None:
    """Results and metrics of two sweeps are the same; of a pruned job up to where it was pruned."""
    assert table(found) == table(expected)
    for row in table(expected):
        one, other = metrics(found / row["run_dir"]), metrics(expected / row["run_dir"])
        if row["state"] == "pruned":
            jobs = json.loads((expected / "sweep.json").read_text())["jobs"]
            last = next(job["pruned_at"] for job in jobs if job["number"] == int(row["job"]))
            one, other = ([line for line in lines if line["step"] <= last] for lines in (one, other))
        assert one == other, row

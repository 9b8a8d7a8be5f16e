"""The benchmark of remote steps ends soon and leaves nothing, whichever of its processes is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.footprint import wait_until
from tests.launches import ROOT

START_S = 600.0
END_S = 60.0
SERVICE, TRAINER = "conch.service", "--alone"
"""A word of each side's command line."""

_WARM_STEPS = 4
"""Two turns of each side."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark whose sides take turns without end.

    errors: file of its stderr.
    scratch: where it has its temporary folders.
    """

    process: subprocess.Popen[bytes]
    sides: dict[str, psutil.Process]
    errors: Path
    scratch: Path

    def end(self) -> int:
        """Its exit code, once none of its processes is left."""
        code = self.process.wait(END_S)
        for side in self.sides.values():
            side.wait(END_S)
        return code


def _steps(scratch: Path) -> int:
    """Steps that either side has taken at least."""
    files = [
        *scratch.glob("*/*/together/metrics.jsonl"),
        *scratch.glob("*/*/apart/runs/*/train/metrics.jsonl"),
    ]
    return min(len(file.read_text().splitlines()) for file in files) if len(files) == 2 else 0


@pytest.fixture
def benchmark(tmp_path: Path) -> Iterator[Benchmark]:
    scratch, errors = tmp_path / "scratch", tmp_path / "errors"
    scratch.mkdir()
    words = ["--small", "--threads", "1", "--rounds", "1000000", "--warm-up", "1"]
    with errors.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.remote_step", *words],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(scratch)},
            stdout=subprocess.DEVNULL,
            stderr=stream,
        )
    sides: dict[str, psutil.Process] = {}
    try:
        wait_until(lambda: _steps(scratch) >= _WARM_STEPS, errors.read_text, START_S)
        for child in psutil.Process(process.pid).children():
            sides |= {word: child for word in (SERVICE, TRAINER) if word in child.cmdline()}
        yield Benchmark(process, sides, errors, scratch)
    finally:
        process.kill()
        process.wait(END_S)
        for side in sides.values():
            if side.is_running():
                side.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "told"),
    [
        (SERVICE, "the service has ended with code -9: its log ends with"),
        (TRAINER, "the process of the trainer has ended with code -9"),
    ],
)
def test_side_that_is_killed_ends_the_benchmark(benchmark: Benchmark, word: str, told: str) -> None:
    benchmark.sides[word].kill()
    assert benchmark.end() == 1
    assert told in benchmark.errors.read_text()
    assert [*benchmark.scratch.iterdir()] == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_sides_end_with_the_benchmark(benchmark: Benchmark, number: signal.Signals) -> None:
    benchmark.process.send_signal(number)
    assert benchmark.end() == (143 if number == signal.SIGTERM else -number)
    if number == signal.SIGTERM:
        assert [*benchmark.scratch.iterdir()] == []

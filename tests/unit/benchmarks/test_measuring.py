"""Processes of a benchmark: whatever one of them does, the benchmark ends, and leaves none."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from benchmarks.measuring import LineProcess, leaving_on_sigterm
from conch.errors import ConchError

ECHO = "import sys\nfor line in sys.stdin: print('noise'); print('GOT', line, end='', flush=True)"
SILENT = "import time\ntime.sleep(600)"
DEAF = (
    "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('READY', flush=True)\n"
    + SILENT
)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = {*psutil.Process().children()}
    yield
    assert {*psutil.Process().children()} - before == set()


def process_of(code: str) -> LineProcess:
    return LineProcess("the side", [sys.executable, "-c", code])


def test_lines_are_answered_and_noise_is_passed_over() -> None:
    process = process_of(ECHO)
    try:
        for line in ("one", "two"):
            process.tell(line)
            assert process.answer("GOT ") == line
        process.end_input()
        process.wait()
    finally:
        process.kill()


def test_process_that_lives_and_is_silent_is_told_in_time() -> None:
    process, started = process_of(SILENT), time.monotonic()
    try:
        with pytest.raises(
            ConchError, match=r"the process of the side lives, and has not answered within 0\.2"
        ):
            process.answer("GOT ", 0.2)
        with pytest.raises(ConchError, match="the process of the side does not end"):
            process.wait(0.1)
    finally:
        process.kill()
    assert time.monotonic() - started < 30


def test_process_that_has_ended_is_told_with_its_code_as_often_as_it_is_asked() -> None:
    process = process_of("print('bye'); raise SystemExit(3)")
    try:
        for _ in range(2):
            process.tell("go")
            with pytest.raises(
                ConchError, match="the process of the side has ended with code 3; its own words"
            ):
                process.answer("GOT ")
    finally:
        process.kill()


def test_process_that_does_not_heed_sigterm_is_killed() -> None:
    process = process_of(DEAF)
    process.answer("READY")
    process.kill(grace_s=0.2)


def test_sigterm_leaves_by_the_way_that_cleans_up() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left, leaving_on_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert left.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before

"""What a process that does not move leaves behind: the stacks of its threads, in the run's folder `stuck/`.

A hang is told from a process that was stopped (SIGSTOP, a suspended machine) by `ticks`: its clock jumps, the
clock of its own ticks does not.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

FOLDER = "stuck"

_LONGEST_TICK = 2.0
"""Most that one tick counts, in periods: what is beyond is time in which this process did not run."""

_SAY_WITHIN_S = 5.0

ResultT = TypeVar("ResultT")


def ticks(stop: threading.Event, period_s: float) -> Iterator[float]:
    """Wait period after period until `stop` is set; give the seconds that each one counts.

    A pause of the whole process counts as no more than `_LONGEST_TICK` periods.
    """
    before = time.monotonic()
    while not stop.wait(period_s):
        now = time.monotonic()
        yield min(now - before, _LONGEST_TICK * period_s)
        before = now


def thread_stacks(*, own: bool = False) -> str:
    """Return the stacks of all threads of this process, by name, the main thread first.

    own: False leaves the thread out that calls.
    """
    threads = {thread.ident: thread for thread in threading.enumerate()}
    main = threading.main_thread().ident
    texts: list[str] = []
    for ident, frame in sorted(sys._current_frames().items(), key=lambda item: item[0] != main):
        if ident == threading.get_ident() and not own:
            continue
        thread = threads.get(ident)
        name = thread.name if thread is not None else "a thread that Python did not start"
        stack = traceback.StackSummary.extract(traceback.walk_stack(frame))
        stack.reverse()
        texts.append(f"Thread {name} ({ident}):\n{''.join(stack.format())}")
    return "\n".join(texts)


def file_of(run: Path, rank: int) -> Path:
    """Return the file to which a rank writes its stacks."""
    return run / FOLDER / f"rank_{rank}.txt"


def write_report(run: Path | None, rank: int, reason: str, parts: Sequence[str] | None = None) -> str:
    """Append `reason` and `parts` to this rank's file, and return in words where they are.

    run: folder of the run; None, or one that cannot be written, puts all of it on stderr.
    parts: texts, by default the stacks of this process.
    """
    parts = [thread_stacks()] if parts is None else parts
    head = f"==== {time.strftime('%Y-%m-%d %H:%M:%S')}, rank {rank}, process {os.getpid()}: {reason}"
    text = "\n\n".join([head, *parts]) + "\n\n"
    if run is not None:
        file = file_of(run, rank)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as opened:
                opened.write(text)
            return f"in {file}"
        except OSError as error:
            text = f"{file} cannot be written ({error})\n{text}"
    say(text)
    return "above"


def say(text: str) -> None:
    """Write to stderr, not through logging: its locks may be held by a thread that waits for ever."""
    within(lambda: os.write(2, f"{text.rstrip()}\n".encode(errors="replace")), _SAY_WITHIN_S)


def within(call: Callable[[], ResultT], seconds: float) -> ResultT | None:
    """Return what `call` does within `seconds`; None where it takes longer or fails.

    It runs in a thread of its own, which is left alone when the time is up.
    """
    results: list[ResultT] = []

    def run() -> None:
        with contextlib.suppress(Exception):
            results.append(call())

    thread = threading.Thread(target=run, name="stuck-report", daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None

"""Runs of one process that do not come to an end by themselves; without torch, which takes long to load.

python -m tests.integration.watchdog_run KIND RUN_DIR SECONDS
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from pathlib import Path

from conch.cli import run_main
from conch.errors import StuckError
from conch.training.overlap.watchdog import Progress, Watchdog

LONG_S = 3600


def wait_for_nobody(event: threading.Event) -> None:
    """What a lost thread does."""
    event.wait()  # nobody sets it


def hang_in_c() -> None:
    """A call that no exception ends; the interpreter's lock is free, as in a collective."""
    ctypes.CDLL(None).sleep(LONG_S)


def breaks() -> list[str]:
    """A part that cannot say what it waits for."""
    raise OSError("connection refused")


def take(groups: queue.Queue[StuckError]) -> None:
    """What the main thread does at a buffer: the failure is all that will ever come."""
    raise groups.get()


def main(arguments: list[str]) -> None:
    """A loop of one process whose sampler hangs, whose main thread hangs, or that goes on slowly."""
    kind, run, deadline_s = arguments[0], Path(arguments[1]), float(arguments[2])
    progress, failures = Progress(), queue.Queue[StuckError]()
    progress.note("completion")
    threading.Thread(target=wait_for_nobody, args=(threading.Event(),), name="sampler", daemon=True).start()
    with Watchdog(
        progress,
        deadline_s=deadline_s,
        run=run,
        rank=0,
        on_stuck=failures.put,
        describe=[lambda: ["server 127.0.0.1:1 holds version 3, group 7 under way for 4 s"], breaks],
        stacks=[lambda: "Thread of an actor"],
        grace_s=2,
    ):
        print("started", flush=True)
        if kind == "queue":
            take(failures)
        elif kind == "c":
            hang_in_c()
        elif kind == "slow":  # for 4 deadlines, by notes of two threads and two phases that may take long
            for number in range(8):
                time.sleep(deadline_s / 2)
                progress.note(("reward", "step")[number % 2])
            with progress.paused("evaluation"), progress.paused("checkpoint"):
                time.sleep(deadline_s * 2)
            time.sleep(deadline_s / 2)
    print("ended well", flush=True)


if __name__ == "__main__":
    run_main(main)

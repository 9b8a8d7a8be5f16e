"""The launcher (torchrun, `accelerate launch`) that started this process: what it says, and if it lives."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time

POLL_S = 1.0
LEAVE_WITHIN_S = 30.0
"""Longest that a process goes on after its launcher is gone: to finish its step and to save."""


def launched_processes() -> int:
    """Processes that the launcher says it started; 0 where there is none that says."""
    return int(os.environ.get("WORLD_SIZE") or 0)


@functools.cache
def leave_with_launcher() -> None:
    """Watch the launcher from a thread, where there is one; leave when it is gone.

    One that is killed (SIGKILL, out of memory) takes nobody along: its ranks would train on, hold GPUs and
    ports, and be known to no scheduler. They get what a preemption sends, SIGTERM, on which a run saves and
    leaves with 143; one that waits for something and cannot is ended after `LEAVE_WITHIN_S`.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # started by hand: a parent may go, as under nohup
        return
    watch = threading.Thread(target=_leave_after, args=(os.getppid(),), name="launcher-watch", daemon=True)
    watch.start()


def _leave_after(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(POLL_S)
    # Not through logging: its locks may be held by a thread that waits for ever.
    print(f"error: the launcher (process {launcher}) is gone: leaving too", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LEAVE_WITHIN_S)
    os._exit(1)

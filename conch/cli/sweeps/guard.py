"""Ends the jobs of a sweep whose parent was killed: the sweep, started again, writes where they write.

`processes.py` runs this file by path, beside the sweep, in a session of its own. Only the standard library:
it must start at once. Its stdin is a pipe from the parent: when it closes, every process that carries the
parent's mark in its environment gets SIGTERM, on which a run saves its step and leaves, and SIGKILL after a
grace period.

Arguments: the mark (`NAME=value`), the grace period in seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

POLL_S = 0.1
_UNKILLABLE_S = 30.0
"""Longest that a killed process may take to be gone: one that hangs in a driver or a file system never is."""


def marked(mark: str) -> list[int]:
    """Return the processes, in whatever session, that were started with `NAME=value` in their environment."""
    found = []
    wanted = mark.encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0") and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


def end_marked(mark: str, grace_s: float, told: Callable[[list[int]], None] | None = None) -> list[int]:
    """End all processes with this mark; returns those that even SIGKILL does not end, as a rule none.

    grace_s: seconds from SIGTERM to SIGKILL.
    told: called with the processes once they have got SIGTERM.
    """
    deadline = time.monotonic() + grace_s
    terminated: set[int] = set()
    while processes := marked(mark):
        late = time.monotonic() > deadline
        if time.monotonic() > deadline + _UNKILLABLE_S:
            return processes
        # New ones come as long as the old ones start some.
        new = [pid for pid in processes if pid not in terminated]
        for pid in processes if late else new:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        if told is not None and new and not terminated:
            told(new)
        terminated.update(new)
        time.sleep(POLL_S)
    return []


def main() -> None:
    """Wait for the parent's end."""
    mark, grace_s = sys.argv[1], float(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    end_marked(mark, grace_s)


if __name__ == "__main__":
    main()

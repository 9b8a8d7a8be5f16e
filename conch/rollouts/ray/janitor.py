"""Cleans up after a cluster of Ray whose run was killed: waits for the run's end, then ends what is left.

Runs as a program of its own, `python -I janitor.py FOLDER`, in a session of its own; its standard input is a
pipe that the run holds open. A run that ends well says `done` there, and has cleaned up itself.

    FOLDER: Ray's files; processes of the cluster have it in the environment variable `CONCH_RAY_FOLDER`, or
    hold files of it open.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

FOLDER_VARIABLE = "CONCH_RAY_FOLDER"
"""Environment variable that holds the folder, for all processes of a run's own cluster."""

_GRACE_S = 5.0
"""Time in which the processes of a cluster leave by themselves once the run is gone."""

_TRIES = 50
_LOOK_S = 0.1

_QUIET_LOOKS = 4
"""Looks in a row that find nothing before a cluster is gone: a process that is just being started shows no
environment for a moment."""


def processes_of(folder: str) -> list[int]:
    """Processes of the cluster, without this one and without those that only talk to it."""
    mark = f"{FOLDER_VARIABLE}={folder}".encode()
    ids = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            ours = mark in (entry / "environ").read_bytes().split(b"\0") or _logs_into(entry, folder)
        except OSError:  # somebody else's, or gone
            continue
        if ours:
            ids.append(int(entry.name))
    return ids


def _logs_into(process: Path, folder: str) -> bool:
    """Whether it is one of Ray's, which writes its logs there.

    The title `ray::NAME` of actors and agents has been seen to take the place of their arguments and of their
    environment, so that no variable was left.
    """
    if not (process / "cmdline").read_bytes().startswith(b"ray::"):
        return False
    for descriptor in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed just now
            if os.readlink(descriptor).startswith(f"{folder}/"):
                return True
    return False


def clean_up(folder: str, grace_s: float = _GRACE_S) -> None:
    """End the processes of the cluster and delete the folder.

    grace_s: time in which they may leave by themselves.
    """
    end = time.monotonic() + grace_s
    while processes_of(folder) and time.monotonic() < end:
        time.sleep(_LOOK_S)
    quiet = 0
    for _ in range(_TRIES):
        found = processes_of(folder)
        for number in found:
            with contextlib.suppress(OSError):
                os.kill(number, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
        quiet = 0 if found or os.path.exists(folder) else quiet + 1
        if quiet == _QUIET_LOOKS:
            return
        time.sleep(_LOOK_S)


def main() -> None:
    folder = sys.argv[1]
    if os.fork():  # no child of the run: who kills a run with all of its children would kill it, too
        os._exit(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if b"done" not in sys.stdin.buffer.read():
        clean_up(folder)


if __name__ == "__main__":
    main()

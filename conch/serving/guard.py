"""Run one server process and outlive nobody's death but its own.

`launcher.py` runs this file by path, in a session of its own, with its settings as one JSON argument. Only
the standard library: it must start at once. It holds the read end of a pipe whose write end the launcher has.
When the pipe closes, because the launcher asked for a stop or because it was killed, the server gets SIGTERM,
after `grace_s` seconds its whole process group SIGKILL, and what it left in shared memory and in `scratch` is
removed. If the guard itself is killed, the kernel sends the server SIGTERM.

Settings: command (list), log (path), shm_prefix, scratch (folder), grace_s (seconds), parent_pid.
Prints the server's pid on stdout. Exit code: the server's, or 128 + signal.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.5


def main() -> int:
    """Start the server, wait until it ends or must end, clean up."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    signal.signal(signal.SIGINT, lambda number, _: stopping.append(number))
    try:
        server = _start(settings)
        print(server.pid, flush=True)
        while server.poll() is None and not stopping and _parent_wants_it(settings["parent_pid"], wake_read):
            pass
        return _end(server, settings["grace_s"])
    finally:
        clean_up(settings["shm_prefix"], settings["scratch"])


def _start(settings: dict[str, Any]) -> subprocess.Popen[bytes]:
    guard_pid = os.getpid()
    libc = ctypes.CDLL(None)

    def die_with_guard() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != guard_pid:  # the guard died before the line above
            os._exit(1)

    with open(settings["log"], "ab", buffering=0) as log:
        return subprocess.Popen(
            settings["command"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_guard,
        )


def _parent_wants_it(parent_pid: int, wake_read: int) -> bool:
    """Sleep until something happens; False once the launcher closed its pipe or is gone.

    A forked child of the launcher may keep the pipe open after its death, hence the look at its pid.
    """
    readable, _, _ = select.select([sys.stdin, wake_read], [], [], _POLL_S)
    if wake_read in readable:
        os.read(wake_read, 512)
    return sys.stdin not in readable and os.getppid() == parent_pid


def _end(server: subprocess.Popen[bytes], grace_s: float) -> int:
    if server.poll() is None:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=grace_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)  # the server if it hangs, and stubs that outlived it
    code = server.wait()
    return code if code >= 0 else 128 - code


def clean_up(shm_prefix: str, scratch: str) -> None:
    """Remove the shared-memory files that a killed server leaves, and its scratch folder."""
    assert shm_prefix, "an empty prefix would match everybody's shared memory"
    for left_over in Path("/dev/shm").glob(f"{shm_prefix}*"):
        left_over.unlink(missing_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

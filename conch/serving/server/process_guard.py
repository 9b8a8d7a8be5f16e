"""Run one server process, and end it with the process that started it.

`server.py` runs this file by path, in a session of its own. Only the standard library: it must start at once.
Its settings are one line of JSON on stdin (not an argument: the server's command holds secrets, and arguments
stand in the process list). Stdin then stays open: when it closes, because the parent asks for a stop or was
killed, the server gets SIGTERM, after `grace_s` seconds its whole process group SIGKILL, and its files in
shared memory and in `scratch` are removed. If the guard itself is killed, the kernel sends the server
SIGTERM.

The server's output goes through the guard into `log`, which is moved to `log.1`, `log.2`, ... when full.

Settings: command (list), log (path), log_max_bytes, log_keep (old files), shm_prefix, scratch (folder),
end_command (list, run after the end if not empty: removes a container), grace_s (seconds), parent_pid.
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
import time
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.5
_CHUNK_BYTES = 1 << 16
_END_COMMAND_TIMEOUT_S = 20.0


def main() -> int:
    """Start the server, wait until it ends or must end, clean up."""
    settings: dict[str, Any] = json.loads(sys.stdin.readline())
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    signal.signal(signal.SIGINT, lambda number, _: stopping.append(number))
    log = RotatingLog(Path(settings["log"]), settings["log_max_bytes"], settings["log_keep"])
    # Stubs that outlive the server become children of this process, so that their end can be waited for.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        server = _start(settings)
        print(server.pid, flush=True)
        parent = settings["parent_pid"]
        while server.poll() is None and not stopping and _is_wanted(parent, wake_read, server, log):
            pass
        return _end(server, log, settings["grace_s"])
    finally:
        _run_end_command(settings["end_command"])
        clean_up(settings["shm_prefix"], settings["scratch"])


class RotatingLog:
    """A file of at most `max_bytes`; full, it becomes `.1`, that `.2`, and so on up to `keep` old ones.

    Lines stay whole. A disk that is full loses lines, not the server.
    """

    def __init__(self, path: Path, max_bytes: int, keep: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._file = path.open("ab", buffering=0)
        self._size = self._file.tell()

    def write(self, chunk: bytes) -> None:
        """Append output; lines that do not fit begin the next file."""
        while len(chunk) > (room := self._max_bytes - self._size):
            cut = chunk.rfind(b"\n", 0, max(room, 0)) + 1
            if not cut and not self._size:
                break  # one line is longer than a file
            self._append(chunk[:cut])
            chunk = chunk[cut:]
            self._rotate()
        self._append(chunk)

    def _append(self, chunk: bytes) -> None:
        with contextlib.suppress(OSError):
            self._size += self._file.write(chunk) or 0

    def _rotate(self) -> None:
        with contextlib.suppress(OSError):
            for number in range(self._keep, 0, -1):
                older = self._path if number == 1 else self._numbered(number - 1)
                if older.exists():
                    older.replace(self._numbered(number))
            self._path.unlink(missing_ok=True)  # where nothing old is kept
            self._file.close()
            self._file = self._path.open("ab", buffering=0)
        self._size = 0  # even if that failed: the next attempt comes a file's length later

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")


def _start(settings: dict[str, Any]) -> subprocess.Popen[bytes]:
    guard_pid = os.getpid()
    libc = ctypes.CDLL(None)

    def die_with_guard() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != guard_pid:  # the guard died before the line above
            os._exit(1)

    server = subprocess.Popen(
        settings["command"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=die_with_guard,
    )
    assert server.stdout is not None
    os.set_blocking(server.stdout.fileno(), False)
    return server


def _is_wanted(parent_pid: int, wake_read: int, server: subprocess.Popen[bytes], log: RotatingLog) -> bool:
    """Sleep until something happens; False once the parent closed its pipe or is gone.

    A forked child of the parent may keep the pipe open after the parent's death, hence the check of its pid.
    """
    assert server.stdout is not None
    readable, _, _ = select.select([sys.stdin, wake_read, server.stdout], [], [], _POLL_S)
    if wake_read in readable:
        os.read(wake_read, 512)
    if server.stdout in readable and not _copy_output(server, log):
        time.sleep(0.01)  # it closed its output and still runs: select would not sleep any more
    return sys.stdin not in readable and os.getppid() == parent_pid


def _copy_output(server: subprocess.Popen[bytes], log: RotatingLog) -> bool:
    """Write the server's output into the log; False if there was none."""
    assert server.stdout is not None
    try:
        chunk = os.read(server.stdout.fileno(), _CHUNK_BYTES)
    except BlockingIOError:
        return False
    log.write(chunk)
    return bool(chunk)


def _end(server: subprocess.Popen[bytes], log: RotatingLog, grace_s: float) -> int:
    if server.poll() is None:
        server.terminate()
        deadline = time.monotonic() + grace_s
        while server.poll() is None and time.monotonic() < deadline:
            if not _copy_output(server, log):  # a full pipe would keep it from ending
                time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)  # the server if it hangs, and stubs that outlived it
    code = server.wait()
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-server.pid, 0)  # stubs: whoever asked for the stop finds all of its group gone
    while _copy_output(server, log):
        pass
    return code if code >= 0 else 128 - code


def _run_end_command(command: list[str]) -> None:
    if command:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_END_COMMAND_TIMEOUT_S,
                check=False,
            )


def clean_up(shm_prefix: str, scratch: str) -> None:
    """Remove the shared-memory files of a killed server, and its scratch folder."""
    assert shm_prefix, "an empty prefix would match everybody's shared memory"
    for left_over in Path("/dev/shm").glob(f"{shm_prefix}*"):
        left_over.unlink(missing_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

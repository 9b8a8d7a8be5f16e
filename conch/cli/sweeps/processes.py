"""Processes of a sweep: jobs, each in a session of its own, and what is left of earlier ones."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from conch.cli.sweeps import guard
from conch.errors import ConfigError

_PR_SET_PDEATHSIG = 1
_JOB_MARK = "CONCH_SWEEP_JOB"
_SWEEP_MARK = "CONCH_SWEEP"
_PARENT_MARK = "CONCH_SWEEP_PARENT"
_LEFTOVERS_GRACE_S = 5.0


class JobProcess:
    """One attempt of a job.

    number: of the job.
    log: file that its output is appended to.
    log_start: size of the file at the attempt's start, in bytes.
    """

    def __init__(self, number: int, process: subprocess.Popen[bytes], log: Path, log_start: int, mark: str):
        self.number = number
        self.log = log
        self.log_start = log_start
        self.started = time.monotonic()
        self._process = process
        self._mark = mark
        self._kill_at: float | None = None

    def poll(self) -> int | None:
        """Return the exit code once the job has ended, negative for a signal; None while it runs.

        What the job leaves behind (workers, ranks of a launcher that was killed) is ended as well: its folder
        is nobody's then.
        """
        code = self._process.poll()
        if code is None:
            if self._kill_at is not None and time.monotonic() > self._kill_at:
                self.kill()
            return None
        self._kill_group()
        guard.end_marked(self._mark, _LEFTOVERS_GRACE_S)
        return code

    def tell_to_leave(self, grace_s: float) -> None:
        """Send SIGTERM, on which a run saves its step and leaves; SIGKILL follows after `grace_s` seconds."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + grace_s
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    def kill(self) -> None:
        """End the job and all of its processes now."""
        self._kill_group()
        for pid in guard.marked(self._mark):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


class Jobs:
    """Starts the jobs of one sweep. A context manager: a guard ends them should this process be killed.

    folder: of the sweep.
    grace_s: seconds that a job has to save and leave.
    """

    def __init__(self, folder: Path, grace_s: float) -> None:
        self._folder = folder.resolve()
        self._grace_s = grace_s
        self._parent_mark = f"{_PARENT_MARK}={uuid.uuid4().hex}"
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Jobs:
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, self._parent_mark, str(self._grace_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        guarding = self._guard
        assert guarding is not None and guarding.stdin is not None
        guarding.stdin.close()
        guarding.wait()

    def end_leftovers(self, told: Callable[[list[int]], None]) -> None:
        """Have what an earlier, killed parent of this sweep left running save and leave; waits for its end.

        told: called with the processes, where there are any.

        Raises:
            ConfigError: some cannot be ended, and may write into the folders of jobs.
        """
        left = guard.end_marked(f"{_SWEEP_MARK}={self._folder}", self._grace_s, told)
        if left:
            raise ConfigError(
                f"processes {', '.join(map(str, left))} of an earlier start of the sweep in {self._folder} "
                "cannot be ended: end them, or choose another sweep.dir"
            )

    def start(
        self, number: int, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> JobProcess:
        """Start an attempt of a job.

        environment: variables beside those of this process.

        Raises:
            ConfigError: the program cannot be started.
        """
        marks = {
            _SWEEP_MARK: str(self._folder),
            _JOB_MARK: f"{self._folder}/{number}",
            _PARENT_MARK: self._parent_mark.partition("=")[2],
        }
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            start = output.tell()
            try:
                process = _spawn(command, {**os.environ, **environment, **marks}, output)
            except OSError as error:
                raise ConfigError(
                    f"job {number} cannot be started: {command[0]}: {error.strerror}"
                ) from error
        return JobProcess(number, process, log, start, f"{_JOB_MARK}={marks[_JOB_MARK]}")


def _spawn(
    command: Sequence[str], environment: Mapping[str, str], output: IO[bytes]
) -> subprocess.Popen[bytes]:
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def die_with_parent() -> None:
        # The guard does the same; but the guard, too, can be killed.
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return subprocess.Popen(
        list(command),
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


class FolderLock:
    """Makes sure that a folder has one sweep at a time. A context manager.

    The kernel opens the lock of a process that was killed.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"

    def __enter__(self) -> FolderLock:
        """Take the lock.

        Raises:
            ConfigError: another sweep has it.
        """
        self._file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                raise ConfigError(
                    f"{self._path} cannot be locked ({error.strerror}): choose another sweep.dir"
                ) from error
            self._file.seek(0)
            owner = self._file.read().strip() or "unknown"
            self._file.close()
            raise ConfigError(
                f"another sweep is at work in {self._path.parent} ({owner}): wait for it or stop it, or "
                "choose another sweep.dir"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        self._file.flush()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._file.close()

"""A folder that the processes of one server share, and that is gone when the last of them ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path
from types import TracebackType

from conch.errors import ConfigError

_LOCK = "lock"


class SharedFolder:
    """A folder for temporary files by the name `prefix-UID-KEY`, for this user alone.

    Each process that has it holds a shared lock of the kernel, which ends with the process however it ends.
    Who leaves last removes the folder; folders of servers that were killed are removed by the next one of the
    same prefix.

    prefix: the kind of server.
    key: what the processes of one server have in common, and no other server has.

    Raises:
        ConfigError: the folder belongs to somebody else.
    """

    def __init__(self, prefix: str, key: str) -> None:
        start = f"{prefix}-{os.getuid()}-"
        parent = Path(tempfile.gettempdir())
        self.path = parent / f"{start}{key}"
        for other in parent.glob(f"{start}*"):
            if other != self.path:
                _remove_abandoned(other)
        self._lock = self._join()

    def __enter__(self) -> SharedFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave; the last one removes the folder. A second call does nothing."""
        if self._lock is not None:
            _remove_if_alone(self.path, self._lock)
            os.close(self._lock)
            self._lock = None

    def _join(self) -> int | None:
        while True:
            with contextlib.suppress(FileExistsError):
                self.path.mkdir(mode=0o700)
            found = self.path.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
                raise ConfigError(
                    f"{self.path} is there already and not this user's alone: remove it, or set TMPDIR"
                )
            try:
                lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:  # whoever was the last has just removed it
                continue
            fcntl.flock(lock, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(lock).st_ino == (self.path / _LOCK).stat().st_ino:
                    return lock
            os.close(lock)


def _remove_if_alone(path: Path, lock: int) -> None:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)


def _remove_abandoned(path: Path) -> None:
    with contextlib.suppress(OSError):
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        try:
            _remove_if_alone(path, lock)
        finally:
            os.close(lock)

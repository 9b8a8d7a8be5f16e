"""One log of several processes: each line is whole, and tells its process."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from conch.errors import ConfigError

_FORMAT = "%(asctime)s %(process)d %(levelname).1s %(name)s: %(message)s"
_MOST_BYTES = 3000
"""Of a line; a pipe keeps what is written at once together up to 4096 bytes."""


class WholeLines(logging.Handler):
    """Writes each record as one line with one call, so that lines of several processes do not mix.

    Line breaks within a message, such as those of a traceback, are written as `\\n`.

    path: file to append to; None takes stderr.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(_FORMAT))
        self._path = path
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._file = sys.stderr.fileno() if path is None else os.open(path, flags, 0o600)
        except OSError as error:
            raise ConfigError(f"the log {path} cannot be written: {error.strerror}") from error

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; what cannot be written is lost, and nothing else with it."""
        try:
            line = self.format(record).replace("\r", "\\r").replace("\n", "\\n")
            whole = line.encode("utf-8", "backslashreplace")
            os.write(
                self._file, (whole if len(whole) <= _MOST_BYTES else whole[:_MOST_BYTES] + b"...") + b"\n"
            )
        except (OSError, ValueError):
            self.handleError(record)

    def close(self) -> None:
        """Close the file."""
        if self._path is not None and self._file >= 0:
            os.close(self._file)
            self._file = -1
        super().close()


def share_log(*names: str, path: Path | None = None, level: int = logging.INFO) -> None:
    """Send these loggers, and no others of theirs, into one log.

    path: file to append to; None takes stderr.

    Raises:
        ConfigError: the file cannot be written.
    """
    handler = WholeLines(path)
    for name in names:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(level)

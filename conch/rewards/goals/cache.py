"""Values of goals that several processes share, in a file of bounded size."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from conch.atomic_files import write_ahead
from conch.log import get_logger

_log = get_logger(__name__)

_AT_ONCE = 500
"""Keys in one query."""

_WAIT_S = 2.0
"""Longest wait for another process that writes."""


class SharedValues:
    """Values by goal and text in an SQLite file, for all processes that open it. Threads may share one.

    Texts are not in the file, only a hash of each with its goal's name and version. A file that fails, as on
    a full disk, costs time and is told once, and never costs a value.

    path: of the file, which is made where there is none.
    most: values that are kept; the oldest go first.
    """

    def __init__(self, path: Path, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._told = False
        self._file = sqlite3.connect(path, timeout=_WAIT_S, check_same_thread=False, isolation_level=None)
        # Nobody needs the file after a crash of the machine, so nothing waits for the disk.
        write_ahead(self._file, _WAIT_S)
        self._file.execute("PRAGMA synchronous = OFF")
        self._file.execute(
            "CREATE TABLE IF NOT EXISTS kept (id INTEGER PRIMARY KEY, key BLOB UNIQUE, value REAL NOT NULL)"
        )

    def get(self, goal: str, texts: Sequence[str]) -> list[float | None]:
        """Return the value of each text; None where none is kept."""
        keys = [_key(goal, text) for text in texts]
        found: dict[bytes, float] = {}
        try:
            with self._lock:
                for start in range(0, len(keys), _AT_ONCE):
                    some = keys[start : start + _AT_ONCE]
                    places = ",".join("?" * len(some))
                    found.update(
                        self._file.execute(f"SELECT key, value FROM kept WHERE key IN ({places})", some)
                    )
        except sqlite3.Error as error:
            self._tell(error)
        return [found.get(key) for key in keys]

    def put(self, goal: str, values: Mapping[str, float]) -> None:
        """Keep values by text."""
        rows = [(_key(goal, text), value) for text, value in values.items()]
        try:
            with self._lock, self._file:
                self._file.execute("BEGIN IMMEDIATE")
                self._file.executemany("INSERT OR IGNORE INTO kept (key, value) VALUES (?, ?)", rows)
                self._file.execute(
                    "DELETE FROM kept WHERE id <= (SELECT max(id) FROM kept) - ?", (self._most,)
                )
        except sqlite3.Error as error:
            self._tell(error)

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        with self._lock:
            self._file.close()

    def _tell(self, error: sqlite3.Error) -> None:
        if not self._told:
            self._told = True
            _log.warning("the cache of goals does not work (%s): values are measured anew", error)


def _key(goal: str, text: str) -> bytes:
    digest = hashlib.blake2b(goal.encode(), digest_size=16)
    digest.update(b"\0" + text.encode("utf-8", "surrogatepass"))
    return digest.digest()

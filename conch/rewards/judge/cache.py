"""Answers that are known already: in memory, or in a file that all processes and later runs share.

An answer is found by a hash of everything that it depends on: who is asked, and the whole request with its
messages, seed and limits. The file holds what the judge wrote, never what it was shown.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from conch.atomic_files import write_ahead
from conch.errors import ConfigError
from conch.log import get_logger
from conch.rewards.judge.endpoint import Answer, TokenChoice

_log = get_logger(__name__)
_BUSY_S = 10.0
_ADDITIONS_PER_CLEARING = 100
_MOST_BYTES = 256_000_000
"""Of answers in memory: one with log-probabilities of many tokens has millions."""


def key_of(judge: str, body: Mapping[str, Any]) -> str:
    """Return the name of a question in the cache.

    judge: who is asked.
    """
    content = json.dumps([judge, body], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(content.encode("utf-8", "backslashreplace")).hexdigest()


class AnswerCache:
    """The latest `size` answers by their keys; in memory, as many as fit, and with `path` in a SQLite file
    behind it.

    model: as the server names it now; answers of another one are not known. "" knows all.

    Raises:
        ConfigError: the file cannot be opened.
    """

    def __init__(self, size: int, path: Path | None) -> None:
        self.model = ""
        self._size = size
        self._answers: OrderedDict[str, str] = OrderedDict()
        self._bytes = 0
        self._path = path
        self._file: sqlite3.Connection | None = None
        self._additions = 0
        if path is not None and size > 0:
            self._file = _open(path)

    def get(self, key: str) -> Answer | None:
        """Return a known answer, marked as such; None if there is none."""
        written = self._answers.get(key)
        if written is not None:
            self._answers.move_to_end(key)
        elif self._file is not None:
            rows = self._execute("SELECT answer FROM answers WHERE key = ?", key)
            written = rows[0][0] if rows else None
        answer = None if written is None else _read(written)
        if answer is None or (self.model and answer.model != self.model):
            return None
        return replace(answer, is_known=True, pause_s=0.0)

    def add(self, key: str, answer: Answer) -> None:
        """Keep an answer; the oldest go."""
        if self._size == 0:
            return
        written = _written(answer)
        self._bytes += len(written) - len(self._answers.pop(key, ""))
        self._answers[key] = written
        while len(self._answers) > self._size or self._bytes > _MOST_BYTES:
            self._bytes -= len(self._answers.popitem(last=False)[1])
        if self._file is None:
            return
        self._execute("INSERT OR REPLACE INTO answers (key, answer) VALUES (?, ?)", key, written)
        self._additions += 1
        if self._file is not None and self._additions % _ADDITIONS_PER_CLEARING == 1:
            self._execute(
                "DELETE FROM answers WHERE number <= (SELECT max(number) FROM answers) - ?", self._size
            )

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _execute(self, command: str, *values: Any) -> list[Any]:
        """Run one command, a transaction of its own. A disk that fails costs the file, not the run."""
        assert self._file is not None
        try:
            return self._file.execute(command, values).fetchall()
        except sqlite3.Error as error:
            _log.warning(
                "the judge's answers are kept in memory from now on, since %s fails: %s", self._path, error
            )
            self.close()
            return []


def _open(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Answers may repeat what they judge: for nobody else's eyes.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        # Used in one thread at a time: that of the judge's loop, and at the end the one that closes.
        file = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        write_ahead(file, _BUSY_S)
        file.execute("PRAGMA synchronous = NORMAL")
        file.execute(
            "CREATE TABLE IF NOT EXISTS answers "
            "(number INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT UNIQUE NOT NULL, answer TEXT NOT NULL)"
        )
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(
            f"`judge.cache_file` = {path} cannot be opened ({error}): give a file on a local disk that is "
            "this cache or not there yet"
        ) from error
    return file


def _written(answer: Answer) -> str:
    tokens = None if answer.tokens is None else [[each.token, each.top] for each in answer.tokens]
    return json.dumps([answer.text, answer.finish_reason, answer.refused, tokens, answer.model])


def _read(text: str) -> Answer | None:
    try:
        content, reason, refused, tokens, model = json.loads(text)
        choices = (
            None
            if tokens is None
            else tuple(
                TokenChoice(token, tuple((name, float(value)) for name, value in top))
                for token, top in tokens
            )
        )
        return Answer(content, reason, refused, choices, model)
    except (ValueError, TypeError):
        return None

"""The file that scores go to: whole lines, which a later call goes on from, and a note of whose they are.

A killed call leaves `scores.jsonl` with some whole lines (of a table: `scores.csv.partial`, JSON lines too)
and `scores.jsonl.about.json`, which names input, reward and settings. The same command cuts off a line that
is not whole, and a part of which lines are missing, and asks for what is left. Another input, reward or
setting is refused. Lines of rows without a score can be replaced, of a table too, whose lines are kept as
long as there are such rows.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from conch.atomic_files import replace_text, sync
from conch.errors import ConfigError, DataError
from conch.scoring.asking import ours_of

_FORMAT = 1
_TABLES = (".csv", ".parquet")
OUTPUTS = (".jsonl", *_TABLES)


class Journal:
    """Lines of scores on a disk.

    output: the file that they are for: `.jsonl`, and then they stand in it; `.csv` or `.parquet`.
    about: what they are of, as it is kept beside them: group -> name -> value.
    rows_at_once: only whole parts of so many lines are gone on from, since what is asked together may matter.
    retry: take up lines that are all there too, where some are of rows without a score.

    Raises:
        ConfigError: the output holds something else, or is of another ending.
    """

    def __init__(
        self,
        output: Path,
        about: Mapping[str, Any],
        *,
        rows_at_once: int,
        overwrite: bool = False,
        retry: bool = False,
    ) -> None:
        if output.suffix not in OUTPUTS:
            raise ConfigError(
                f"--output {output}: scores are written as {', '.join(OUTPUTS)}; give one of these endings"
            )
        if not output.parent.is_dir():
            raise ConfigError(f"--output {output}: there is no folder {output.parent}: make it first")
        self.output = output
        self.is_table = output.suffix in _TABLES
        self.path = output.with_name(f"{output.name}.partial") if self.is_table else output
        self.note = output.with_name(f"{output.name}.about.json")
        self.report: dict[str, Any] | None = None
        """What all rows amount to; None while some have no line."""
        self._about = json.loads(json.dumps({"conch_score": _FORMAT, **about}, default=str))
        if overwrite:
            self._remove()
        self._file: io.FileIO | None = None
        self.rows = 0
        """Rows that have their lines already."""
        is_new = self._note() is None
        is_whole = self.report is not None
        if retry and self.report is not None and self.report["failed"]:
            self._check_lines()
            self.report = None
        if self.report is None:
            self._open(is_new)
            self.rows = self._whole_rows(1 if is_whole else rows_at_once)

    def _check_lines(self) -> None:
        if not self.path.exists():
            raise ConfigError(
                f"--retry-failed: {self.output} is whole, and its lines, {self.path}, are gone: give another "
                "--output, or --overwrite"
            )

    def _remove(self) -> None:
        """Remove what an earlier call has written.

        Raises:
            ConfigError: another process still writes it, or nobody may remove it.
        """
        try:
            with contextlib.suppress(FileNotFoundError), io.FileIO(self.path) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in (self.path, self.output, self.note):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise self._refusal(error) from error

    def _note(self) -> dict[str, Any] | None:
        """What the files beside the output say; None where there are none."""
        if not self.note.is_file():
            there = next((path for path in (self.output, self.path) if path.exists()), None)
            if there is not None:
                raise ConfigError(
                    f"{there} is there, and nothing beside it says what of: give another --output, or "
                    "--overwrite"
                )
            return None
        try:
            before = json.loads(self.note.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(
                f"{self.note} is damaged ({error}): give another --output, or --overwrite"
            ) from None
        report = before.pop("report", None)
        self.report = report if self.output.exists() else None
        if before != self._about:
            raise ConfigError(
                f"{self.output} holds scores of {_difference(before, self._about)}: give another --output, "
                "or --overwrite"
            )
        return before

    def _open(self, is_new: bool) -> None:
        """Note what the lines are of, and keep other processes out.

        Raises:
            ConfigError: another process writes to this output, or nobody may.
        """
        try:
            if is_new:
                self._write_note()
            self._lock()
        except OSError as error:
            self.close()
            raise self._refusal(error) from error

    def _lock(self) -> None:
        self.close()
        self._file = io.FileIO(self.path, "a")
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _write_note(self, **more: Any) -> None:
        replace_text(self.note, json.dumps({**self._about, **more}, indent=1) + "\n")

    def _refusal(self, error: OSError) -> ConfigError:
        if isinstance(error, BlockingIOError):
            return ConfigError(
                f"another process scores to {self.output}: wait for it, or give another --output"
            )
        return ConfigError(f"--output {self.output} cannot be written ({error.strerror})")

    def close(self) -> None:
        """Let other processes at the output."""
        if self._file is not None:
            self._file.close()

    def _whole_rows(self, rows_at_once: int) -> int:
        """Count the lines, and cut what goes beyond whole parts."""
        with self.path.open("rb+") as file:
            end, rows, keep = 0, 0, 0
            for line in file:
                if not line.endswith(b"\n"):
                    break
                end, rows = end + len(line), rows + 1
                if rows % rows_at_once == 0:
                    keep = end
            file.truncate(keep)
        return rows - rows % rows_at_once

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write a part's lines in one go.

        Raises:
            DataError: the disk failed.
        """
        data, written = b"".join(map(as_bytes, lines)), 0
        assert self._file is not None, "nothing is added to what is whole"
        try:
            while written < len(data):
                written += self._file.write(data[written:]) or 0
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be written ({error.strerror}): make room, and give the same command "
                "again"
            ) from error

    @contextlib.contextmanager
    def retried(self) -> Iterator[Callable[[Sequence[Mapping[str, Any]]], object]]:
        """Give what takes lines in place of those without a score, in order. When the block is left they
        stand in the file; where it raises, as many as there are.

        Raises:
            DataError: the disk failed, or a line is damaged; the lines are as they were.
        """
        aside, whole = (
            self.output.with_name(f".{self.output.name}.{what}") for what in ("retried", "merged")
        )
        try:
            with aside.open("wb") as file:
                try:
                    yield lambda lines: file.write(b"".join(map(as_bytes, lines)))
                finally:
                    file.flush()
                    self._merge(aside, whole)
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be written ({error.strerror}): make room, and give the same command "
                "again"
            ) from error
        finally:
            for path in (aside, whole):
                path.unlink(missing_ok=True)

    def _merge(self, retried: Path, whole: Path) -> None:
        """Put lines in the places of those without a score, as far as there are any."""
        with self.path.open("rb") as lines, retried.open("rb") as others, whole.open("wb") as merged:
            for line, content in zip(lines, self.lines(), strict=True):
                merged.write((others.readline() if is_failed(content) else line) or line)
        sync(whole)
        self._write_note()  # without a report, whose figures are those of the old lines
        os.replace(whole, self.path)
        self._lock()

    def lines(self) -> Iterator[dict[str, Any]]:
        """Read the lines back, one at a time."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise DataError(
                        f"{self.path} line {number} is damaged ({error}): score anew with --overwrite"
                    ) from None

    def finish(self, report: Mapping[str, Any]) -> None:
        """Note that all rows have their lines, and what they amount to."""
        if self.path.exists():
            sync(self.path)
        self.report = dict(report)
        self._write_note(report=self.report)
        if self.is_table and not report["failed"]:
            self.path.unlink(missing_ok=True)


def is_failed(line: Mapping[str, Any]) -> bool:
    """Whether a line is of a row without a score."""
    return ours_of(line)["status"] != "ok"


def as_bytes(line: Mapping[str, Any]) -> bytes:
    """A line of JSON. Bytes of an input that were no UTF-8 stand in it as escapes."""
    text = json.dumps(line, ensure_ascii=False, default=str) + "\n"
    return text.encode("utf-8", "backslashreplace")


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs, as `reward "a" and not "b"`."""
    pairs = [
        (f"{group} {name}" if name else group, one, other)
        for group in dict.fromkeys((*before, *now))
        for name, one, other in _values(before.get(group), now.get(group))
        if one != other
    ]
    return "; ".join(f"{name} {_shown(one)} and not {_shown(other)}" for name, one, other in pairs)


def _values(before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if not isinstance(before, dict) or not isinstance(now, dict):
        yield "", before, now
        return
    for name in dict.fromkeys((*before, *now)):
        yield name, before.get(name), now.get(name)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."

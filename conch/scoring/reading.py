"""Rows of what is to be scored, one at a time, whatever holds them, with memory for a few.

    rows.jsonl  rows.json  rows.txt  rows.csv  rows.tsv     each also as .gz or .zst
    rows.parquet
    some/folder  owner/name  owner/name:split               as for training, see `conch.data.files`
    -                                                       standard input

A row that cannot be read is a row, with the reason; only what ends the reading itself is an error.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from conch.errors import DataError, missing_path

InputFormat = Literal["jsonl", "json", "txt", "csv", "tsv", "parquet"]

STDIN = "-"
_PACKED = (".gz", ".zst")
_ROWS_OF_A_TABLE = 1024
_LONGEST_CELL = 1 << 30
_CHARS = 1 << 16


@dataclass(frozen=True, slots=True)
class InputRow:
    """One row, or why it cannot be read.

    place: "line 3" of a text file, "row 3" of a table, counted from 1.
    value: the row.
    broken: why there is no value, in words that follow its name; "" where there is one.
    """

    place: str
    value: Any = None
    broken: str = ""


class RowReader:
    """Reads the rows of a source again and again.

    source: see this module's docstring.
    format: of the rows; None goes by the source's ending, and takes standard input for JSON lines.

    Raises:
        DataError: there is no such file, or its ending says no format.
    """

    def __init__(self, source: str, format: InputFormat | None = None) -> None:
        self.source = source
        self.path = None if source == STDIN else Path(source).expanduser()
        suffixes = [] if self.path is None else [suffix.lower() for suffix in self.path.suffixes]
        self._packing = suffixes[-1] if suffixes and suffixes[-1] in _PACKED else ""
        ending = (suffixes[:-1] if self._packing else suffixes)[-1:]
        self.format = format or _format_of(ending[0] if ending else "")
        if self.path is None:
            self.format = self.format or "jsonl"
        self._raw: io.BufferedReader | None = None
        self._size = 0
        self._rows_done = self._rows_in_all = 0
        self._check()

    def _check(self) -> None:
        if self.format is None or (self.path is not None and self.path.is_dir()):
            self.format = None  # `conch.data.files` says what is wrong with it
            return
        if self.format == "parquet" and (self.path is None or self._packing):
            what = "standard input" if self.path is None else f"{self.path}, packed once more,"
            raise DataError(
                f"{what} cannot be read as Parquet, whose end is read first: give a .parquet file"
            )
        if self.path is not None and not self.path.is_file():
            raise DataError(f"{self.path} cannot be read: there is no such file{missing_path(self.path)}")

    @property
    def is_table(self) -> bool:
        """Whether cells are texts without a type, so that a list in one is JSON."""
        return self.format in ("csv", "tsv")

    @property
    def done(self) -> float:
        """Share of the source that was read so far, between 0 and 1; 0 where its size is not known."""
        if self._rows_in_all:
            return self._rows_done / self._rows_in_all
        if self._raw is None or not self._size:
            return 0.0
        return min(1.0, self._raw.tell() / self._size)

    def rows(self) -> Iterator[InputRow]:
        """Every row with its place; empty lines are none.

        Raises:
            DataError: the source is damaged, from its beginning or from some row on.
        """
        if self.format is None:
            from conch.data.files import each_row

            return (InputRow(*row) for row in each_row(self.source))
        if self.format == "parquet":
            return self._parquet()
        return self._text()

    def _text(self) -> Iterator[InputRow]:
        readers = {"jsonl": _json_lines, "json": _json_rows, "txt": _text_lines}
        with self._opened() as file:
            if self.format in readers:
                yield from readers[self.format](file)
            else:
                yield from _table(file, "\t" if self.format == "tsv" else ",")

    @contextmanager
    def _opened(self) -> Iterator[io.TextIOWrapper]:
        where = "standard input" if self.path is None else str(self.path)
        try:
            # Standard input is left open for whoever started this process.
            file, is_own = (sys.stdin.fileno(), False) if self.path is None else (self.path, True)
            with open(file, "rb", closefd=is_own) as raw:
                self._raw, self._size = raw, 0 if self.path is None else self.path.stat().st_size
                # Bytes that are no UTF-8 make one row that cannot be sent, not the end of all.
                yield io.TextIOWrapper(
                    self._unpacked(raw), encoding="utf-8-sig", errors="surrogateescape", newline=""
                )
        # gzip says EOFError of a file that was cut short, and zlib.error of one with damage inside.
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{where} cannot be read ({reason}): give a whole file") from error
        finally:
            self._raw = None

    def _unpacked(self, raw: io.BufferedReader) -> Any:
        if self._packing == ".gz":
            return gzip.GzipFile(fileobj=raw)
        if self._packing == ".zst":
            import pyarrow

            return io.BufferedReader(
                _Unpacked(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd"))
            )
        return raw

    def _parquet(self) -> Iterator[InputRow]:
        numbers = itertools.count(1)
        for batch in self.batches():
            for row in batch.to_pylist():
                yield InputRow(f"row {next(numbers)}", row)
                self._rows_done += 1

    def batches(self) -> Iterator[Any]:
        """Record batches of a Parquet file, with its own types.

        Raises:
            DataError: the file is damaged.
        """
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(self.path, pre_buffer=False) as file:
                self._rows_done, self._rows_in_all = 0, file.metadata.num_rows
                yield from file.iter_batches(batch_size=_ROWS_OF_A_TABLE)
        except (pyarrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self.path} cannot be read as Parquet ({reason}): give a whole file") from error


class _Unpacked(io.RawIOBase):
    """A stream of pyarrow as Python's own readers take it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._stream.read(len(buffer))
        buffer[: len(part)] = part
        return len(part)


def _format_of(suffix: str) -> Any:
    name = suffix.removeprefix(".")
    return name if name in get_args(InputFormat) else None


# ---------------------------------------------------------------------------------------------- kinds of text


def _lines(file: Iterable[str]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, line


def _text_lines(file: io.TextIOWrapper) -> Iterator[InputRow]:
    return (InputRow(f"line {number}", line.rstrip("\r\n")) for number, line in _lines(file))


def _json_lines(file: Iterable[str]) -> Iterator[InputRow]:
    for number, line in _lines(file):
        try:
            yield InputRow(f"line {number}", json.loads(line))
        except (ValueError, RecursionError) as error:
            yield InputRow(f"line {number}", broken=f"is no JSON ({error}): give one value a line")


def _json_rows(file: io.TextIOWrapper) -> Iterator[InputRow]:
    """Items of an array, which is never held as a whole; of a file that begins with anything else, lines."""
    head = ""
    while not head.strip():
        head = file.read(_CHARS)
        if not head:
            return
    if not head.lstrip().startswith("["):
        # What was read may end in the midst of a line. A text may hold U+2028 and the like, which end a line
        # for `splitlines` and for no file.
        begun = io.StringIO(head + file.readline(), newline="")
        yield from _json_lines(itertools.chain(begun, file))
        return
    yield from _items(file, head.lstrip()[1:])


def _items(file: io.TextIOWrapper, text: str) -> Iterator[InputRow]:
    """Items of an array whose opening bracket was read. text: what was read behind it."""
    decoder, numbers, size = json.JSONDecoder(), itertools.count(1), _CHARS
    while True:
        text = text.lstrip().removeprefix(",").lstrip()
        if text.startswith("]"):
            _check_end(file, text[1:], next(numbers) - 1)
            return
        problem = "it ends before its array does"
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError) as error:
            value, end, problem = None, 0, str(error)
        # Only what stands behind a value shows that it is whole.
        if end and text[end:].strip():
            yield InputRow(f"row {next(numbers)}", value)
            text, size = text[end:], _CHARS
            continue
        more = file.read(size)
        if not more:
            if end:
                yield InputRow(f"row {next(numbers)}", value)
            raise DataError(f"row {next(numbers)} is no JSON ({problem}): give a whole array")
        text, size = text + more, 2 * size  # a long row is not tried again for each of its parts


def _check_end(file: io.TextIOWrapper, text: str, rows: int) -> None:
    """Raise DataError where something stands behind an array: rows of a second one would be lost."""
    while not text.strip():
        text = file.read(_CHARS)
        if not text:
            return
    raise DataError(
        f"behind the array of {rows} rows stands {text.strip()[:20]!r}: give one array, or one value a line"
    )


def _table(file: io.TextIOWrapper, delimiter: str) -> Iterator[InputRow]:
    """Rows of a table with a header; cells stay texts as they stand, and an empty one is none."""
    csv.field_size_limit(_LONGEST_CELL)
    cells = csv.reader(file, delimiter=delimiter, strict=True)
    header = _cells(cells)
    if header is None:
        return
    if isinstance(header, str):
        raise DataError(f"line 1 {header}")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"the header names {', '.join(twice)} twice: give each column a name of its own")
    while (row := _cells(cells)) is not None:
        place = f"line {cells.line_num}"
        if isinstance(row, str):
            yield InputRow(place, broken=row)
        elif row and len(row) != len(header):
            broken = (
                f"has {len(row)} cells, and the header {len(header)}: quote cells that hold {delimiter!r}"
            )
            yield InputRow(place, broken=broken)
        elif row:
            yield InputRow(place, {name: cell or None for name, cell in zip(header, row, strict=True)})


def _cells(rows: Iterator[list[str]]) -> list[str] | str | None:
    """The next row of a table, or why it is none; None behind the last."""
    try:
        return next(rows, None)
    except csv.Error as error:
        return f'is no row of a table ({error}): quote cells by "'


def fingerprint(path: Path) -> dict[str, Any]:
    """What tells a file from another one: its size, and a hash of its content, which takes a second or two
    for each GB."""
    import hashlib

    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return {"bytes": path.stat().st_size, "blake2b": digest.hexdigest()}


def readable_text(text: str) -> str:
    """The text with bytes that were no UTF-8 written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")

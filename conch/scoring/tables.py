"""Scores as a table, CSV or Parquet, made of the lines of a journal in two passes, with memory for a few."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conch.atomic_files import sync
from conch.scoring.asking import output_name, own_columns
from conch.scoring.journal import Journal
from conch.scoring.reading import RowReader, readable_text

_ROWS = 1024
_FIRST = ("index", "status")
_LAST = ("model", "version", "detail")


def flat(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line with a column for each objective, those of the other reward behind `against_`."""
    columns = {name: line[name] for name in line if name not in ("scores", "members", "against", *_LAST)}
    columns |= {str(name): score for name, score in line.get("scores", {}).items()}
    against = line.get("against", {})
    columns |= {f"against_{name}": score for name, score in against.get("scores", {}).items()}
    pair = ("chosen_score", "rejected_score", "margin", "correct")
    columns |= {f"against_{name}": against[name] for name in pair if name in against}
    return columns | {name: line.get(name) for name in _LAST}


@dataclass(frozen=True)
class _Table:
    """The rows of a table.

    journal: has our columns.
    reader: of the input, whose columns stand in front; None for scores alone.
    names: of our columns -> what they are called here.
    own: names of the input's columns.
    """

    journal: Journal
    reader: RowReader | None
    names: Mapping[str, str]
    own: tuple[str, ...]

    def ours(self) -> Iterator[dict[str, Any]]:
        """Our columns, one row at a time."""
        for line in self.journal.lines():
            columns = flat(line)
            yield {called: columns.get(name) for name, called in self.names.items()}

    def rows(self) -> Iterator[dict[str, Any]]:
        """All columns, one row at a time."""
        if self.reader is None:
            yield from self.ours()
            return
        for row, line in zip(self.reader.rows(), self.ours(), strict=False):
            yield {**own_columns(row), **line}


def write_table(journal: Journal, reader: RowReader | None) -> None:
    """Make the table of a journal's lines, and put it in place as a whole.

    reader: of the input, whose columns stand in front; None writes scores alone.

    Raises:
        DataError: the input or the journal is damaged.
    """
    own = () if reader is None else tuple(_keys(own_columns(row) for row in reader.rows()))
    names = {name: output_name(name, own) for name in _columns(flat(line) for line in journal.lines())}
    table = _Table(journal, reader, {name: each for name, each in names.items() if each is not None}, own)
    aside = journal.output.with_name(f".{journal.output.name}.partial")
    if journal.output.suffix == ".csv":
        _write_csv(aside, table)
    elif reader is not None and reader.format == "parquet":
        _write_beside(aside, table, reader)
    else:
        _write_parquet(aside, table)
    sync(aside)
    os.replace(aside, journal.output)


def _columns(lines: Iterator[dict[str, Any]]) -> list[str]:
    """Names of our columns in all lines, in the order that people read them."""
    names = dict.fromkeys(_FIRST) | _keys(lines)
    return [*(name for name in names if name not in _LAST), *_LAST]


def _keys(rows: Iterable[Mapping[str, Any]]) -> dict[str, None]:
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(row)
    return names


def _parts(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while part := list(itertools.islice(rows, _ROWS)):
        yield part


def _write_csv(aside: Path, table: _Table) -> None:
    with aside.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.DictWriter(file, [*table.own, *table.names.values()], restval="")
        writer.writeheader()
        for row in table.rows():
            writer.writerow({name: _cell(value) for name, value in row.items()})


def _cell(value: Any) -> Any:
    """What stands in a cell: numbers so that they are read back to the bit, lists and objects as JSON."""
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return repr(value) if isinstance(value, float) else "" if value is None else value


def _write_parquet(aside: Path, table: _Table) -> None:
    import pyarrow
    from pyarrow import parquet

    types = _types(_parts(table.rows()))
    schema = pyarrow.schema([(name, types[name]) for name in [*table.own, *table.names.values()]])
    with parquet.ParquetWriter(aside, schema) as writer:
        for part in _parts(table.rows()):
            columns = [_array([row.get(name) for row in part], types[name]) for name in schema.names]
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))


def _write_beside(aside: Path, table: _Table, reader: RowReader) -> None:
    """Columns of a Parquet file with their own types, and ours behind them."""
    import pyarrow
    from pyarrow import parquet

    types = _types(_parts(table.ours()))
    lines, writer = table.ours(), None
    try:
        for batch in reader.batches():
            part = list(itertools.islice(lines, batch.num_rows))
            columns = [_array([row[name] for row in part], kind) for name, kind in types.items()]
            fields = [*batch.schema, *(pyarrow.field(name, kind) for name, kind in types.items())]
            schema = pyarrow.schema(fields)
            writer = writer or parquet.ParquetWriter(aside, schema)
            writer.write_batch(pyarrow.record_batch([*batch.columns, *columns], schema=schema))
    finally:
        if writer is not None:
            writer.close()


def _types(parts: Iterator[list[dict[str, Any]]]) -> dict[str, Any]:
    """Column -> a type that all its values have; text where they have none in common that can be written."""
    import pyarrow

    types: dict[str, Any] = {}
    for part in parts:
        for name in _keys(part):
            try:
                new = pyarrow.array([row.get(name) for row in part]).type
                both = [pyarrow.schema([("x", each)]) for each in (types.get(name, new), new)]
                types[name] = pyarrow.unify_schemas(both, promote_options="permissive").field("x").type
            except _unfit():
                types[name] = pyarrow.string()
    return {
        name: each if _is_writable(each) and not pyarrow.types.is_null(each) else pyarrow.string()
        for name, each in types.items()
    }


def _unfit() -> tuple[type[Exception], ...]:
    """What is raised for values that have no type in common, for whole numbers of more than 64 bits, and for
    texts that were no UTF-8."""
    import pyarrow

    return pyarrow.ArrowException, OverflowError, UnicodeEncodeError


def _is_writable(kind: Any) -> bool:
    """Whether Parquet has the type: not that of an empty object."""
    import pyarrow

    inner = [kind.field(place).type for place in range(kind.num_fields)]
    return not (pyarrow.types.is_struct(kind) and not inner) and all(map(_is_writable, inner))


def _array(values: Sequence[Any], kind: Any) -> Any:
    import pyarrow

    try:
        return pyarrow.array(values, type=kind)
    except _unfit():
        return pyarrow.array([None if value is None else _text(value) for value in values], pyarrow.string())


def _text(value: Any) -> str:
    return readable_text(value) if isinstance(value, str) else json.dumps(value, default=str)

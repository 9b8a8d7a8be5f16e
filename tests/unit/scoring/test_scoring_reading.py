"""Rows of every kind of file, and what is said of those that cannot be read."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from conch.errors import DataError
from conch.scoring.reading import InputRow, RowReader, fingerprint

ROWS = [
    {"prompt": 'what, "now"?', "completion": "a\nb", "number": "007"},
    {"prompt": "é 漢", "completion": "", "number": "8"},
    {"prompt": "x" * 100_000, "completion": "[1]", "number": "9"},
]
LINES = "".join(json.dumps(row) + "\n\n" for row in ROWS)


def packed(path: Path, data: bytes) -> None:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    elif path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(data)
    else:
        path.write_bytes(data)


def as_table(delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


CONTENT = {
    "jsonl": LINES.encode(),
    "json": json.dumps(ROWS, indent=1).encode(),
    "csv": as_table(","),
    "tsv": as_table("\t"),
}


def values(reader: RowReader) -> list[Any]:
    rows = list(reader.rows())
    assert not [row.broken for row in rows if row.broken]
    return [row.value for row in rows]


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", CONTENT)
def test_the_same_rows_come_from_every_text_file(kind: str, packing: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{kind}{packing}"
    packed(path, CONTENT[kind])
    reader = RowReader(str(path))
    nothing = None if kind in ("csv", "tsv") else ""
    assert values(reader) == [ROWS[0], {**ROWS[1], "completion": nothing}, ROWS[2]]
    assert values(reader) == values(reader)


def test_parquet_and_texts_are_read(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    reader = RowReader(str(tmp_path / "rows.parquet"))
    rows = list(reader.rows())
    assert [row.value for row in rows] == ROWS and rows[2].place == "row 3" and reader.done == 1.0
    (tmp_path / "rows.txt").write_text("one\r\n\n two \n")
    assert list(RowReader(str(tmp_path / "rows.txt")).rows()) == [
        InputRow("line 1", "one"),
        InputRow("line 3", " two "),
    ]


def test_a_json_file_of_lines_is_read_as_lines(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("\n" + LINES)
    rows = list(RowReader(str(tmp_path / "rows.json")).rows())
    assert [row.value for row in rows] == ROWS


def test_lines_of_a_json_file_end_where_those_of_other_files_do(tmp_path: Path) -> None:
    texts = ["one\u2028two", "three\x85four", "five\u2029"]
    (tmp_path / "rows.json").write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8"
    )
    assert [row["text"] for row in values(RowReader(str(tmp_path / "rows.json")))] == texts


def test_bad_rows_are_rows_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n{"text":\n"\xff"\n')
    good, broken, odd = RowReader(str(tmp_path / "rows.jsonl")).rows()
    assert good.value == {"text": "a"} and broken.place == "line 2" and "is no JSON" in broken.broken
    assert odd.value == "\udcff"
    (tmp_path / "rows.csv").write_text('a,b\n1,2\n1,2,3\n"x"y,2\n3,4\n')
    first, long, quoted, last = RowReader(str(tmp_path / "rows.csv")).rows()
    assert first.value == {"a": "1", "b": "2"} and last.value == {"a": "3", "b": "4"}
    assert "has 3 cells, and the header 2" in long.broken and long.place == "line 3"
    assert "is no row of a table" in quoted.broken and quoted.place == "line 4"


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("cut.jsonl.gz", gzip.compress(LINES.encode())[:-20], "cannot be read .*give a whole file"),
        ("cut.json", b'[{"a": 1}, {"b": ', "row 2 is no JSON"),
        ("short.json", b'[{"a": 1}', "row 2 is no JSON"),
        ("two.json", b'[{"a": 1}, {"a": 2}]\n[{"a": 3}]', "behind the array of 2 rows stands"),
        ("twice.csv", b"a,a\n1,2\n", "the header names a twice"),
        ("no.parquet", b"PAR1 nothing", "cannot be read as Parquet"),
    ],
)
def test_damage_is_an_error_that_names_the_file_or_the_row(
    name: str, data: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=words):
        list(RowReader(str(tmp_path / name)).rows())


def test_what_cannot_be_opened_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(DataError, match=r"did you mean .*rows\.jsonl"):
        RowReader(str(tmp_path / "row.jsonl"))
    with pytest.raises(DataError, match="standard input cannot be read as Parquet"):
        RowReader("-", "parquet")
    with pytest.raises(DataError, match=r"packed once more"):
        RowReader(str(tmp_path / "rows.parquet.gz"))
    with pytest.raises(DataError, match="rows are read from"):
        list(RowReader(str(tmp_path / "rows.docx")).rows())


def test_standard_input_is_read_in_the_format_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").write_bytes(CONTENT["csv"])
    with (tmp_path / "in").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert values(RowReader("-", "csv"))[0] == ROWS[0]


def test_a_long_array_is_read_without_holding_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "x" * 1000}] * 2000))
    reader = RowReader(str(path))
    rows = reader.rows()
    next(rows)
    assert 0 < reader.done < 0.2
    assert sum(1 for _ in rows) == 1999


def test_a_fingerprint_tells_files_apart(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 3_000_000 + b"a")
    (tmp_path / "b").write_bytes(b"x" * 3_000_000 + b"b")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "a")

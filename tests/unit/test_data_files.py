"""Rows of text files, and what is said about files that hold none."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from conch.data.files import read_rows
from conch.errors import DataError


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_text_file_gives_its_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.txt", "one \n\n  two\r\nzwölf\n")

    assert read_rows(path) == ["one ", "  two", "zwölf"]


def test_jsonl_file_gives_its_values(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", '{"text": "a", "score": 0.5}\n\n"b"\n')

    assert read_rows(path) == [{"text": "a", "score": 0.5}, "b"]


def test_gzipped_jsonl_file_gives_its_values(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a": 2}\n'))

    assert read_rows(path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("rows.csv", "a,b\n", "rows are read from .txt, .jsonl and .jsonl.gz files"),
        ("rows.txt", "\n \n", "is empty: give at least one row"),
        ("rows.txt", b"\xff\xfe", "cannot be read"),
        ("rows.jsonl", '{"a": 1}\n\n{"a": \n', "line 3 of .* is not JSON"),
        ("rows.jsonl.gz", b"no gzip", "cannot be read"),
        ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 100)[:-12], "cannot be read"),
    ],
    ids=["another kind", "empty", "no UTF-8", "no JSON", "no gzip", "gzip cut short"],
)
def test_bad_file_is_refused_with_its_name(
    name: str, content: str | bytes, wanted: str, tmp_path: Path
) -> None:
    path = written(tmp_path / name, content)

    with pytest.raises(DataError, match=wanted) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)


def test_missing_file_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt cannot be read: .*No such file"):
        read_rows(tmp_path / "nowhere.txt")

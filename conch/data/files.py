"""Rows of text files, for the trainers' command lines."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from conch.errors import DataError


def read_rows(path: Path) -> list[Any]:
    """Rows of a `.txt` (strings) or `.jsonl` / `.jsonl.gz` (JSON values) file; empty lines are passed over.

    Raises:
        DataError: the file is missing, damaged, of another kind, or empty; or a line, named by number, is no
            JSON.
    """
    name = path.name.removesuffix(".gz")
    if not name.endswith((".txt", ".jsonl")):
        raise DataError(f"{path}: rows are read from .txt, .jsonl and .jsonl.gz files")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            lines = [(number, line.rstrip("\n")) for number, line in enumerate(file, start=1) if line.strip()]
    # gzip says EOFError of a file that was cut short, and zlib.error of one with damage inside
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not lines:
        raise DataError(f"{path} is empty: give at least one row")
    if name.endswith(".txt"):
        return [line for _, line in lines]
    return [_parse(path, number, line) for number, line in lines]


def _parse(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"line {number} of {path} is not JSON: {error}") from error

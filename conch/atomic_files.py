"""Files and folders that are whole or not there: written aside and renamed, and flushed to the disk."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) in one go: readers see the old content or the new one, never a part of it.

    Raises:
        OSError: the disk failed; the old content stays.
    """
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def replace_folder(new: Path, final: Path) -> None:
    """Give the folder `new` the name `final`, instead of a folder that has it.

    Raises:
        OSError: the disk failed; the old folder stays.
    """
    # A folder cannot be renamed over one that is not empty: that one steps aside first.
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    try:
        os.replace(new, final)
    except OSError:
        if old.exists():
            os.replace(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Have the disk take what was written to a file; of a folder, its entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Call `sync` for everything in a folder, and for the folder itself."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def write_ahead(file: sqlite3.Connection, wait_s: float) -> None:
    """Have an SQLite file write ahead, so that readers and a writer do not wait for each other.

    SQLite changes a file's journal without its usual wait for others, so processes that open a new file at
    once would fail ("database is locked").

    Raises:
        sqlite3.OperationalError: the file is held for longer than `wait_s` seconds, or cannot be used.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            file.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)

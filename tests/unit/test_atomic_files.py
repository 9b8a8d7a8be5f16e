from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from conch.atomic_files import replace_folder, replace_text, write_ahead


def test_replace_text_writes_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    replace_text(file, "old")
    replace_text(file, "é")

    assert file.read_bytes() == "é".encode()
    assert list(tmp_path.iterdir()) == [file]


def test_replace_text_that_fails_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "state.json"
    replace_text(file, "old")

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        replace_text(file, "new")
    assert file.read_text() == "old"


def test_replace_folder_takes_the_place_of_a_full_one(tmp_path: Path) -> None:
    for name in ("new", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").touch()
    replace_folder(tmp_path / "new", tmp_path / "final")

    assert [path.name for path in tmp_path.rglob("*")] == ["final", "new.txt"]


def test_replace_folder_that_fails_puts_the_old_one_back(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "file").touch()
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "missing", tmp_path / "final")

    assert (tmp_path / "final" / "file").is_file()


def test_write_ahead_waits_for_who_holds_the_file(tmp_path: Path) -> None:
    path = tmp_path / "kept.sqlite"
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    holder.execute("CREATE TABLE kept (id INTEGER)")
    holder.execute("BEGIN EXCLUSIVE")
    with closing(holder), closing(sqlite3.connect(path, timeout=0.0, isolation_level=None)) as file:
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            write_ahead(file, 0.0)
        release = threading.Timer(0.2, holder.execute, ("COMMIT",))
        release.start()
        write_ahead(file, 60.0)
        release.join()
        assert file.execute("PRAGMA journal_mode").fetchone() == ("wal",)

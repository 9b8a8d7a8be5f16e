from __future__ import annotations

import logging
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from conch.rewards.goals.cache import SharedValues


def test_values_are_found_by_goal_and_text(tmp_path: Path) -> None:
    values = SharedValues(tmp_path / "values", 100)
    values.put("long@1", {"a": 1.0, "\ud800": 2.0, "": 0.5})
    values.put("short@1", {"a": -1.0})
    assert values.get("long@1", ["a", "b", "\ud800", "", "a"]) == [1.0, None, 2.0, 0.5, 1.0]
    assert values.get("short@1", ["a"]) == [-1.0]
    assert values.get("long@2", ["a"]) == [None]
    values.close()


def test_only_so_many_values_are_kept_and_the_oldest_go(tmp_path: Path) -> None:
    values = SharedValues(tmp_path / "values", 1000)
    for start in range(0, 20_000, 500):
        values.put("g", {str(n): float(n) for n in range(start, start + 500)})
        size = sum(file.stat().st_size for file in tmp_path.iterdir())
    found = values.get("g", [str(n) for n in range(20_000)])
    assert found[-1000:] == [float(n) for n in range(19_000, 20_000)]
    assert set(found[:-1000]) == {None}
    assert size < 8_000_000
    values.close()


def test_processes_share_values_while_they_write(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from conch.rewards.goals.cache import SharedValues\n"
        "v = SharedValues(Path(sys.argv[1]), 10000)\n"
        "for n in range(200): v.put(sys.argv[2], {str(n): float(n)}); v.get('other', ['x'])\n"
    )
    path = tmp_path / "values"
    root = Path(__file__).resolve().parents[4]
    command = [sys.executable, "-c", program, path]
    writers = [subprocess.Popen([*command, f"g{n}"], cwd=root, stderr=subprocess.PIPE) for n in range(3)]
    errors = [writer.communicate(timeout=120)[1] for writer in writers]
    assert errors == [b"", b"", b""]
    values = SharedValues(path, 10_000)
    for n in range(3):
        assert values.get(f"g{n}", [str(n) for n in range(200)]) == [float(n) for n in range(200)]
    values.close()


def test_a_file_that_fails_is_told_once_and_costs_no_value(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = SharedValues(tmp_path / "values", 100)
    other = sqlite3.connect(tmp_path / "values")
    other.execute("DROP TABLE kept")
    other.close()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            values.put("g", {"a": 1.0})
            assert values.get("g", ["a"]) == [None]
    assert len(caplog.records) == 1
    values.close()


def test_the_file_holds_no_texts(tmp_path: Path) -> None:
    values = SharedValues(tmp_path / "values", 100)
    values.put("g", {"a private text": 1.0})
    values.close()
    assert all(b"private" not in file.read_bytes() for file in tmp_path.iterdir())
    assert os.listdir(tmp_path) == ["values"]

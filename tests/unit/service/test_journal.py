from __future__ import annotations

import errno
import os
from contextlib import closing
from pathlib import Path

import pytest

from conch.errors import CheckpointError
from conch.service.leases.journal import Journal


def write(journal: Journal, *numbers: int) -> None:
    for number in numbers:
        journal.append({"n": number, "do": "x", "value": 0.1 * number})


def write_in(folder: Path, *numbers: int) -> None:
    with closing(Journal(folder)) as journal:
        write(journal, *numbers)


def numbers(folder: Path) -> list[int]:
    return [event["n"] for event in Journal(folder).read()]


def test_events_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_in(tmp_path / "journal", 1, 2, 3)
    assert Journal(tmp_path / "journal").read() == [
        {"n": number, "do": "x", "value": 0.1 * number} for number in (1, 2, 3)
    ]


def test_event_that_a_kill_cut_short_is_dropped_and_written_anew(tmp_path: Path) -> None:
    write_in(tmp_path, 1, 2)
    segment = tmp_path / "from_1.jsonl"
    segment.write_bytes(segment.read_bytes() + b'{"n":3,"do":')
    assert numbers(tmp_path) == [1, 2]
    write_in(tmp_path, 3, 4)
    assert numbers(tmp_path) == [1, 2, 3, 4]


def test_damage_within_a_segment_is_named(tmp_path: Path) -> None:
    write_in(tmp_path, 1, 2)
    segment = tmp_path / "from_1.jsonl"
    segment.write_bytes(segment.read_bytes().replace(b'"n":1', b'"n:1'))
    with pytest.raises(CheckpointError, match=r"from_1\.jsonl, line 1 is damaged"):
        Journal(tmp_path).read()


def test_segments_that_no_checkpoint_needs_are_deleted(tmp_path: Path) -> None:
    with closing(Journal(tmp_path)) as journal:
        write(journal, 1, 2)
        journal.begin_segment()
        write(journal, 3, 4)
        journal.begin_segment()
        write(journal, 5)
    journal.forget(first_needed=4)
    assert numbers(tmp_path) == [3, 4, 5]
    journal.forget(first_needed=5)
    assert numbers(tmp_path) == [5]
    journal.forget(first_needed=100)
    assert numbers(tmp_path) == [5]


def test_event_that_the_disk_refuses_leaves_no_part_of_itself(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_in(tmp_path / "file" / "journal", 1)


def test_disk_that_does_not_take_what_was_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with closing(Journal(tmp_path)) as journal:
        write(journal, 1)
        # Tests do not wait for the disk: tests/conftest.py takes fsync away.
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="cannot be written"):
            journal.sync()
        monkeypatch.undo()


def test_number_that_json_has_no_word_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        Journal(tmp_path).append({"n": 1, "value": float("nan")})
    assert numbers(tmp_path) == []

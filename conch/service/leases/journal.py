"""What has happened since a checkpoint, on disk before anybody is told.

A folder of segments `from_N.jsonl`, an event a line; N is the number of the first event. A checkpoint begins
a new segment, and segments that no kept checkpoint needs are deleted.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

from conch.atomic_files import sync
from conch.errors import CheckpointError

Event = dict[str, Any]


class Journal:
    """Appends events, and reads them again. One process at a time writes.

    folder: made where it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: BinaryIO | None = None
        self._length = 0
        self._is_synced = True

    def read(self) -> list[Event]:
        """All events in order, each once. One that a kill cut short is dropped: nobody was told of it.

        Raises:
            CheckpointError: a line within a segment cannot be read.
        """
        events: dict[int, Event] = {}
        for _, path in self._segments():
            lines = path.read_bytes().split(b"\n")
            for number, line in enumerate(lines):
                try:
                    event = json.loads(line) if line else None
                except ValueError as error:
                    if number == len(lines) - 1:  # without its end
                        continue
                    raise CheckpointError(f"{path}, line {number + 1} is damaged: {error}") from error
                if event is not None:
                    events[event["n"]] = event
        return [events[number] for number in sorted(events)]

    def append(self, event: Event) -> None:
        """Write an event; `sync` has the disk take it.

        Raises:
            CheckpointError: it cannot be written; the event is not in the journal.
        """
        line = (json.dumps(event, allow_nan=False, separators=(",", ":")) + "\n").encode()
        try:
            if self._file is None:
                self._open(event["n"])
            assert self._file is not None
            if self._file.write(line) < len(line):
                raise OSError("the disk took a part of a line")
        except OSError as error:
            self._undo()
            raise CheckpointError(f"the journal in {self._folder} cannot be written: {error}") from error
        self._length += len(line)
        self._is_synced = False

    def sync(self) -> None:
        """Have the disk take what was written: to be called before anybody is told of it.

        Raises:
            CheckpointError: it does not.
        """
        if self._is_synced or self._file is None:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise CheckpointError(f"the journal in {self._folder} cannot be written: {error}") from error
        self._is_synced = True

    def begin_segment(self) -> None:
        """Have the next event begin a new segment.

        Raises:
            CheckpointError: the disk does not take the one that ends.
        """
        self.sync()
        self.close()

    def forget(self, first_needed: int) -> None:
        """Delete segments whose events all come before this one."""
        segments = self._segments()
        for (_, path), (following, _) in itertools.pairwise(segments):
            if following <= first_needed:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, first: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"from_{first}.jsonl"
        # There is one of this name only where its one event was cut short.
        self._file, self._length = path.open("wb", buffering=0), 0
        sync(self._folder)

    def _undo(self) -> None:
        """Leave no part of a line behind, where the disk allows that."""
        if self._file is None:
            return
        try:
            self._file.truncate(self._length)
            self._file.seek(self._length)
        except OSError:
            self.close()  # what follows begins a segment of its own

    def _segments(self) -> list[tuple[int, Path]]:
        """First event and path of each segment, in order."""
        found = [
            (int(match[1]), path)
            for path in self._folder.glob("from_*.jsonl")
            if (match := re.fullmatch(r"from_(\d+)\.jsonl", path.name))
        ]
        return sorted(found)

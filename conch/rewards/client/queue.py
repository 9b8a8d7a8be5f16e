"""Samples that wait for a place at a server, and how they become requests."""

from __future__ import annotations

import asyncio
import bisect
from collections import deque
from dataclasses import dataclass, field

from conch.rewards.client.transport import ModelInfo, ScoringRow
from conch.types import RewardResult


@dataclass(eq=False, slots=True)
class QueuedRow:
    """One row on its way to a result.

    number: of its own, counting up. submitted: on the clock of `time.monotonic`.
    """

    row: ScoringRow
    number: int
    submitted: float
    done: asyncio.Future[RewardResult]
    is_waiting: bool = True
    order: tuple[int, int] = field(init=False)
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.order = (self.row.length, self.number)
        self.tokens = self.row.tokens


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What goes into one request at most, but for a single row, which always does.

    tokens: counting padding. bytes: of texts or ids.
    """

    rows: int
    tokens: int
    bytes: int
    mixes_lengths: bool = True
    pad_to: int = 1

    def padded(self, tokens: int) -> int:
        """What a row costs in a request whose longest row has `tokens`."""
        return -(-tokens // self.pad_to) * self.pad_to


class RequestQueue:
    """Rows of all submits, sorted by length, so that a request needs little padding.

    A request holds the row that has waited longest and its neighbours by length: nothing is left behind.
    """

    def __init__(self) -> None:
        self._sorted: list[QueuedRow] = []
        self._arrived: deque[QueuedRow] = deque()
        self._filled = asyncio.Event()
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._sorted)

    @property
    def oldest(self) -> QueuedRow | None:
        """The job that has waited longest."""
        while self._arrived and not self._arrived[0].is_waiting:
            self._arrived.popleft()
        return self._arrived[0] if self._arrived else None

    async def filled(self) -> None:
        """Wait until there is a row."""
        await self._filled.wait()

    def add(self, jobs: list[QueuedRow]) -> None:
        """Put the rows of one submit in, in any order."""
        ordered = sorted(jobs, key=lambda job: job.order)
        self._arrived.extend(ordered)
        self._sorted.extend(ordered)
        self._sorted.sort(key=lambda job: job.order)  # two sorted runs: quick
        self.tokens += sum(job.tokens for job in jobs)
        if self._sorted:
            self._filled.set()

    def take(self, limits: BatchLimits, share: float = 1.0) -> list[QueuedRow]:
        """Remove the rows of the next request; none if nothing waits.

        share: of all that waits, what one request should hold at most, so that several servers get some.
        """
        oldest = self.oldest
        if oldest is None:
            return []
        window = _Window(self._sorted, self._place(oldest), limits, share * self.tokens)
        while window.grow():
            pass
        return self._remove(window.start, window.end)

    def drop(self, jobs: list[QueuedRow]) -> None:
        """Remove these."""
        for job in jobs:
            place = self._place(job)
            self._remove(place, place + 1)

    def all(self) -> list[QueuedRow]:
        """All rows, the longest waiting first."""
        return [job for job in self._arrived if job.is_waiting]

    def _place(self, job: QueuedRow) -> int:
        return bisect.bisect_left(self._sorted, job.order, key=lambda other: other.order)

    def _remove(self, start: int, end: int) -> list[QueuedRow]:
        jobs = self._sorted[start:end]
        del self._sorted[start:end]
        for job in jobs:
            job.is_waiting = False
        self.tokens -= sum(job.tokens for job in jobs)
        if not self._sorted:
            self._filled.clear()
            self._arrived.clear()
        return jobs


class _Window:
    """A run of neighbours in the sorted rows that grows towards the row of the nearest length."""

    def __init__(self, jobs: list[QueuedRow], first: int, limits: BatchLimits, fair: float) -> None:
        self._jobs = jobs
        self._limits = limits
        self._fair = fair
        self._bytes = jobs[first].row.size
        self._tokens = jobs[first].tokens
        self.start, self.end = first, first + 1

    def grow(self) -> bool:
        """Take one more row in; False if none fits."""
        return any(self._take(place) for place in self._neighbours())

    def _neighbours(self) -> list[int]:
        places = [place for place in (self.end, self.start - 1) if 0 <= place < len(self._jobs)]
        here = {self.end: self._jobs[self.end - 1], self.start - 1: self._jobs[self.start]}
        return sorted(places, key=lambda place: abs(self._jobs[place].row.length - here[place].row.length))

    def _take(self, place: int) -> bool:
        job, limits = self._jobs[place], self._limits
        rows = self.end - self.start + 1
        longest = limits.padded(max(job.tokens, self._jobs[self.end - 1].tokens))
        is_like = limits.mixes_lengths or job.row.length == self._jobs[self.start].row.length
        if (
            rows > limits.rows
            or rows * longest > limits.tokens
            or self._tokens + job.tokens > self._fair
            or self._bytes + job.row.size > limits.bytes
            or not is_like
        ):
            return False
        self._bytes += job.row.size
        self._tokens += job.tokens
        self.start, self.end = min(self.start, place), max(self.end, place + 1)
        return True


def limits_of(infos: list[ModelInfo], rows: int, tokens: int, size: int) -> BatchLimits:
    """What all replicas take, and the configuration allows."""
    return BatchLimits(
        rows=min(rows, *(info.max_rows for info in infos)),
        tokens=tokens,
        bytes=size,
        mixes_lengths=all(info.mixes_lengths for info in infos),
        pad_to=max(info.pad_to for info in infos),
    )

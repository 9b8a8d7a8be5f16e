"""Samples that wait for a place at a server, and the next request made of them."""

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

    number: unique, counting up.
    submitted: time of its submit, on the clock of `time.monotonic`.
    result: future of its result.
    is_waiting: True until a request takes it.
    """

    row: ScoringRow
    number: int
    submitted: float
    result: asyncio.Future[RewardResult]
    is_waiting: bool = True
    order: tuple[int, int] = field(init=False)
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.order = (self.row.length, self.number)
        self.tokens = self.row.tokens


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Limits of one request. A single row is always allowed.

    rows: most rows.
    tokens: most tokens, padding included.
    bytes: largest sum of texts or ids.
    mixes_lengths: rows of different lengths may share a request.
    pad_to: rows are padded to a multiple of this.
    """

    rows: int
    tokens: int
    bytes: int
    mixes_lengths: bool = True
    pad_to: int = 1

    def padded(self, tokens: int) -> int:
        """Tokens of a row in a request whose longest row has `tokens`."""
        return -(-tokens // self.pad_to) * self.pad_to


class RequestQueue:
    """Rows of all submits, sorted by length, so that a request needs little padding.

    A request holds the row that has waited longest and its neighbours by length: no row is left behind.
    """

    def __init__(self) -> None:
        self._by_length: list[QueuedRow] = []
        self._by_arrival: deque[QueuedRow] = deque()
        self._has_rows = asyncio.Event()
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._by_length)

    @property
    def oldest(self) -> QueuedRow | None:
        """The row that has waited longest."""
        while self._by_arrival and not self._by_arrival[0].is_waiting:
            self._by_arrival.popleft()
        return self._by_arrival[0] if self._by_arrival else None

    async def wait_for_row(self) -> None:
        """Wait until there is a row."""
        await self._has_rows.wait()

    def add(self, rows: list[QueuedRow]) -> None:
        """Add the rows of one submit, in any order."""
        ordered = sorted(rows, key=lambda queued: queued.order)
        self._by_arrival.extend(ordered)
        self._by_length.extend(ordered)
        self._by_length.sort(key=lambda queued: queued.order)  # two sorted runs: quick
        self.tokens += sum(queued.tokens for queued in rows)
        if self._by_length:
            self._has_rows.set()

    def next_batch(self, limits: BatchLimits, share: float = 1.0) -> list[QueuedRow]:
        """Remove and return the rows of the next request; none if none wait.

        share: largest part of all waiting tokens in one request, so that several servers get some.
        """
        oldest = self.oldest
        if oldest is None:
            return []
        window = _Window(self._by_length, self._index(oldest), limits, share * self.tokens)
        while window.grow():
            pass
        return self._pop(window.start, window.end)

    def remove(self, rows: list[QueuedRow]) -> None:
        """Remove these rows."""
        for queued in rows:
            index = self._index(queued)
            self._pop(index, index + 1)

    def all(self) -> list[QueuedRow]:
        """All rows, the longest waiting first."""
        return [queued for queued in self._by_arrival if queued.is_waiting]

    def _index(self, queued: QueuedRow) -> int:
        return bisect.bisect_left(self._by_length, queued.order, key=lambda other: other.order)

    def _pop(self, start: int, end: int) -> list[QueuedRow]:
        rows = self._by_length[start:end]
        del self._by_length[start:end]
        for queued in rows:
            queued.is_waiting = False
        self.tokens -= sum(queued.tokens for queued in rows)
        if not self._by_length:
            self._has_rows.clear()
            self._by_arrival.clear()
        return rows


class _Window:
    """A run of neighbours in the sorted rows that grows towards the row of the nearest length.

    max_share: most tokens in it, by the queue's `share`.
    """

    def __init__(self, rows: list[QueuedRow], first: int, limits: BatchLimits, max_share: float) -> None:
        self._rows = rows
        self._limits = limits
        self._max_share = max_share
        self._bytes = rows[first].row.size
        self._tokens = rows[first].tokens
        self.start, self.end = first, first + 1

    def grow(self) -> bool:
        """Add one more row; False if none fits."""
        return any(self._add(index) for index in self._neighbours())

    def _neighbours(self) -> list[int]:
        """Indices of the next rows on both sides, the one of the nearest length first."""
        indices = [index for index in (self.end, self.start - 1) if 0 <= index < len(self._rows)]
        edges = {self.end: self._rows[self.end - 1], self.start - 1: self._rows[self.start]}
        return sorted(indices, key=lambda index: abs(self._rows[index].row.length - edges[index].row.length))

    def _add(self, index: int) -> bool:
        queued, limits = self._rows[index], self._limits
        count = self.end - self.start + 1
        longest = limits.padded(max(queued.tokens, self._rows[self.end - 1].tokens))
        fits_length = limits.mixes_lengths or queued.row.length == self._rows[self.start].row.length
        if (
            count > limits.rows
            or count * longest > limits.tokens
            or self._tokens + queued.tokens > self._max_share
            or self._bytes + queued.row.size > limits.bytes
            or not fits_length
        ):
            return False
        self._bytes += queued.row.size
        self._tokens += queued.tokens
        self.start, self.end = min(self.start, index), max(self.end, index + 1)
        return True


def limits_of(infos: list[ModelInfo], rows: int, tokens: int, size: int) -> BatchLimits:
    """Limits that all replicas and the configuration allow.

    size: largest request, in bytes.
    """
    return BatchLimits(
        rows=min(rows, *(info.max_rows for info in infos)),
        tokens=tokens,
        bytes=size,
        mixes_lengths=all(info.mixes_lengths for info in infos),
        pad_to=max(info.pad_to for info in infos),
    )

"""RequestQueue: which rows share a request."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest

from conch.rewards.client.queue import BatchLimits, QueuedRow, RequestQueue, limits_of
from conch.rewards.client.transport import ModelInfo, ScoringRow

ROOMY = BatchLimits(rows=64, tokens=10**6, bytes=10**9)
_numbers = itertools.count()


def queued(*lengths: int) -> list[QueuedRow]:
    """One row per length, of that many tokens."""
    loop = asyncio.new_event_loop()
    try:
        return [
            QueuedRow(ScoringRow("x", (1,) * length), next(_numbers), 0.0, loop.create_future())
            for length in lengths
        ]
    finally:
        loop.close()


def queue_of(*submits: list[QueuedRow]) -> RequestQueue:
    queue = RequestQueue()
    for submit in submits:
        queue.add(submit)
    return queue


def lengths(batch: list[QueuedRow]) -> list[int]:
    return [queued.row.length for queued in batch]


def test_one_submit_goes_in_order_of_length() -> None:
    queue = queue_of(queued(5, 1, 9, 3, 7))
    limits = BatchLimits(rows=2, tokens=10**6, bytes=10**9)
    assert [lengths(queue.next_batch(limits)) for _ in range(4)] == [[1, 3], [5, 7], [9], []]
    assert len(queue) == 0 and queue.tokens == 0 and queue.oldest is None


def test_the_one_that_waited_longest_goes_first_with_its_neighbours() -> None:
    queue = queue_of(queued(50), queued(1, 2, 3, 48, 53, 99))
    assert lengths(queue.next_batch(BatchLimits(rows=3, tokens=10**6, bytes=10**9))) == [48, 50, 53]
    assert lengths(queue.next_batch(ROOMY)) == [1, 2, 3, 99]


def test_token_budget_counts_padding() -> None:
    # 3 rows of 10 fill 30; with the row of 12, three rows would cost 36.
    limits = BatchLimits(rows=64, tokens=35, bytes=10**9)
    queue = queue_of(queued(10, 10, 12, 12))
    assert [lengths(queue.next_batch(limits)) for _ in range(2)] == [[10, 10], [12, 12]]


def test_token_budget_counts_buckets() -> None:
    limits = BatchLimits(rows=64, tokens=128, bytes=10**9, pad_to=64)
    queue = queue_of(queued(3, 4, 5, 65))
    assert [lengths(queue.next_batch(limits)) for _ in range(3)] == [[3, 4], [5], [65]]


def test_row_beyond_every_limit_goes_alone() -> None:
    limits = BatchLimits(rows=64, tokens=10, bytes=100)
    queue = queue_of(queued(50, 60))
    assert [lengths(queue.next_batch(limits)) for _ in range(2)] == [[50], [60]]


def test_bytes_are_limited() -> None:
    limits = BatchLimits(rows=64, tokens=10**6, bytes=16 * 20)
    queue = queue_of(queued(9, 10, 11))
    assert [lengths(queue.next_batch(limits)) for _ in range(2)] == [[9, 10], [11]]


def test_lengths_are_not_mixed_where_padding_would_be_read_as_text() -> None:
    limits = BatchLimits(rows=64, tokens=10**6, bytes=10**9, mixes_lengths=False)
    queue = queue_of(queued(4, 2, 4, 2, 2))
    assert [lengths(queue.next_batch(limits)) for _ in range(2)] == [[2, 2, 2], [4, 4]]


def test_idle_servers_share_by_tokens() -> None:
    queue = queue_of(queued(10, 10, 10, 10, 10, 10))
    assert [lengths(queue.next_batch(ROOMY, share)) for share in (1 / 3, 1 / 2, 1.0)] == [[10, 10]] * 3


def test_removed_rows_are_gone() -> None:
    submit = queued(3, 1, 2)
    queue = queue_of(submit)
    queue.remove(submit[:2])
    assert queue.all() == submit[2:] and queue.oldest is submit[2] and queue.tokens == 2
    assert queue.next_batch(ROOMY) == submit[2:]


def test_wait_for_row_ends_with_the_first_row() -> None:
    async def story() -> None:
        queue = RequestQueue()
        waiter = asyncio.create_task(queue.wait_for_row())
        await asyncio.sleep(0)
        assert not waiter.done()
        queue.add(queued(1))
        await asyncio.wait_for(waiter, 10)
        queue.next_batch(ROOMY)
        waiter = asyncio.create_task(queue.wait_for_row())
        await asyncio.sleep(0)
        assert not waiter.done()
        waiter.cancel()

    asyncio.run(story())


def test_whatever_the_order_each_row_goes_exactly_once_within_the_limits() -> None:
    draw = random.Random(0)
    queue, left, taken = RequestQueue(), set[QueuedRow](), list[QueuedRow]()
    limits = BatchLimits(rows=7, tokens=200, bytes=2000)
    for _ in range(300):
        submit = queued(*(draw.randint(1, 90) for _ in range(draw.randint(0, 12))))
        queue.add(submit)
        left.update(submit)
        oldest = queue.oldest
        batch = queue.next_batch(limits, draw.choice([1.0, 0.5]))
        assert (oldest is None and not batch) or oldest in batch
        assert len(batch) <= 1 or len(batch) * max(lengths(batch)) <= 200
        assert len(batch) <= 7
        taken += batch
    while batch := queue.next_batch(limits):
        taken += batch
    assert len(taken) == len(left) and set(taken) == left


def test_texts_are_estimated_from_their_bytes() -> None:
    assert [ScoringRow(text).tokens for text in ("", "abcd", "abcde", "日本語")] == [1, 1, 2, 3]
    assert [ScoringRow(text).size for text in ("", "日本語")] == [4, 13]
    assert (ScoringRow("abc", (7, 8)).tokens, ScoringRow("abc", (7, 8)).size) == (2, 32)


def test_limits_fit_all_replicas() -> None:
    small = ModelInfo(max_rows=4, mixes_lengths=False)
    large = ModelInfo(max_rows=64, pad_to=64)
    assert limits_of([small, large], 32, 100, 1000) == BatchLimits(
        4, 100, 1000, mixes_lengths=False, pad_to=64
    )


@pytest.mark.parametrize(("tokens", "padded"), [(1, 64), (64, 64), (65, 128)])
def test_padding_rounds_up(tokens: int, padded: int) -> None:
    assert BatchLimits(1, 1, 1, pad_to=64).padded(tokens) == padded

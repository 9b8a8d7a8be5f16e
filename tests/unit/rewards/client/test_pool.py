"""Pool: who gets the next request. Nothing is sent: replicas are only counted here."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from conch.addresses import Endpoint
from conch.rewards.client.pool import Pool, ReplicaState
from conch.rewards.client.transport import Failure, ModelInfo
from conch.rewards.client.triton import TritonTransport
from conch.triton.channel import Access
from conch.types import RewardStatus

LONG_S = 120.0
PASSING = Failure(RewardStatus.UNAVAILABLE, "Server exiting", retryable=True)
DOWN = Failure(RewardStatus.UNAVAILABLE, "Connection refused", retryable=True, is_down=True)
REFUSED = Failure(RewardStatus.UNAVAILABLE, "This protocol is restricted", is_down=True)


def run(story: Callable[[Pool], Awaitable[None]], replicas: int, max_in_flight: int = 2) -> None:
    """Tell a story about a pool of replicas that were all reached."""

    async def run_story() -> None:
        transports = [
            TritonTransport(Endpoint("h", port + 1, "m"), Access(), 1.0) for port in range(replicas)
        ]
        pool = Pool("m at h", transports, max_in_flight)
        for replica in pool.replicas:
            replica.info = ModelInfo()
        await asyncio.wait_for(story(pool), LONG_S)

    asyncio.run(run_story())


async def take(pool: Pool, **how: object) -> ReplicaState:
    replica = await pool.acquire(LONG_S, **how)  # pyright: ignore[reportArgumentType]
    assert replica is not None
    return replica


def test_least_loaded_replica_comes_first_and_equals_take_turns() -> None:
    async def story(pool: Pool) -> None:
        a, b, c = pool.replicas
        assert [await take(pool) for _ in range(4)] == [a, b, c, a]
        pool.release(b)
        assert await take(pool) is b
        assert pool.most_in_flight == 4 and pool.in_flight == 4 and pool.idle() == 0
        pool.release(a)
        pool.release(a)
        assert pool.idle() == 1 and await take(pool) is a

    run(story, 3)


def test_no_replica_gets_more_than_max_in_flight_and_waiters_go_in_order() -> None:
    async def story(pool: Pool) -> None:
        (a,) = pool.replicas
        await take(pool)
        first = asyncio.create_task(take(pool))
        second = asyncio.create_task(take(pool))
        retry = asyncio.create_task(take(pool, is_retry=True))
        await asyncio.sleep(0.01)
        assert not (first.done() or second.done() or retry.done())
        for task, later in ((retry, first), (first, second)):
            pool.release(a)
            await task
            await asyncio.sleep(0)
            assert not later.done() and a.in_flight == 1
        pool.release(a)
        await second

    run(story, 1, max_in_flight=1)


def test_replica_to_avoid_is_taken_only_if_there_is_no_other() -> None:
    async def story(pool: Pool) -> None:
        a, b = pool.replicas
        for _ in range(2):
            assert await take(pool, avoid={a}) is b
        waiter = asyncio.create_task(take(pool, avoid={a}))
        await asyncio.sleep(0.01)
        assert not waiter.done()  # the other is busy, not gone
        b.breaker.record_failure(DOWN)
        pool.grant_waiting()
        assert await waiter is a

    run(story, 2)


def test_one_that_just_failed_comes_last_among_equals() -> None:
    async def story(pool: Pool) -> None:
        a, b = pool.replicas
        a.breaker.record_failure(PASSING)
        assert await take(pool) is b
        pool.release(b)
        assert await take(pool) is b

    run(story, 2)


def test_nobody_is_asked_who_was_lost_or_never_reached() -> None:
    async def story(pool: Pool) -> None:
        a, b, c = pool.replicas
        a.breaker.record_failure(DOWN)
        c.info = None
        assert [await take(pool) for _ in range(2)] == [b, b]
        assert await pool.acquire(0.01) is None
        assert not pool.starved.is_set()
        b.breaker.record_failure(DOWN)
        waiter = asyncio.create_task(take(pool))
        await asyncio.sleep(0.01)
        assert pool.starved.is_set()
        a.breaker.close()
        pool.grant_waiting()
        assert await waiter is a
        assert not pool.starved.is_set()

    run(story, 3)


def test_waiting_is_of_no_use_when_all_turn_us_away_for_good() -> None:
    async def story(pool: Pool) -> None:
        a, b = pool.replicas
        a.breaker.record_failure(REFUSED)
        assert pool.permanent_failure() is None
        b.breaker.record_failure(DOWN)
        waiter = asyncio.create_task(pool.acquire(LONG_S))
        await asyncio.sleep(0.01)
        assert pool.permanent_failure() is None and not waiter.done()
        b.breaker.record_probe_failure(REFUSED)
        pool.grant_waiting()
        assert await waiter is None and pool.permanent_failure() is REFUSED

    run(story, 2)


def test_cancelled_waiter_does_not_keep_a_place() -> None:
    async def story(pool: Pool) -> None:
        (a,) = pool.replicas
        await take(pool)
        waiter = asyncio.create_task(take(pool))
        await asyncio.sleep(0.01)
        pool.release(a)  # grants the place ...
        waiter.cancel()  # ... before the waiter has run
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert a.in_flight == 0
        assert await take(pool) is a

    run(story, 1, max_in_flight=1)


def test_ranks_begin_with_different_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(pool: Pool) -> None:
        names = [(await take(pool)).name[-1] for _ in range(3)]
        assert names == ["2", "3", "1"]

    monkeypatch.setenv("RANK", "4")
    run(story, 3)

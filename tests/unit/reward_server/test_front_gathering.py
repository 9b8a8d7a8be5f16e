"""Requests that go together in one call."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from conch.reward_server.gathering import GatheredReward
from conch.rewards.base import RewardSource
from conch.rewards.function import FunctionReward
from conch.types import RewardResult, RewardStatus, Rollout
from tests.fakes.rollouts import rollout

WAIT_S = 60


def gathered(source: RewardSource, samples: int = 8) -> GatheredReward:
    return GatheredReward(source, samples=samples, wait_s=0.0)


def ask(source: GatheredReward, *requests: Sequence[Rollout]) -> list[list[RewardResult]]:
    """All at once."""

    async def run() -> list[list[RewardResult]]:
        futures = [asyncio.wrap_future(source.submit(each)) for each in requests]
        return await asyncio.wait_for(asyncio.gather(*futures), WAIT_S)

    return asyncio.run(run())


def texts(*outputs: str, **row: Any) -> list[Rollout]:
    return [rollout("", output, **row) for output in outputs]


def test_requests_go_together_and_get_their_own_results() -> None:
    calls: list[list[str]] = []

    def reward(samples: list[str], prompts: list[str], outputs: list[str]) -> list[float]:
        calls.append(outputs)
        return [float(len(each)) for each in outputs]

    with FunctionReward(reward) as source:
        found = ask(gathered(source), texts("a", "bb"), texts("ccc"), texts("dddd"))
    assert [[each.scores["reward"] for each in mine] for mine in found] == [[1.0, 2.0], [3.0], [4.0]]
    assert calls == [["a", "bb", "ccc", "dddd"]]


def test_calls_hold_no_more_than_the_limit_and_the_oldest_goes_first() -> None:
    calls: list[list[str]] = []

    def reward(samples: list[str], prompts: list[str], outputs: list[str]) -> list[float]:
        calls.append(outputs)
        return [0.0] * len(outputs)

    with FunctionReward(reward) as source:
        ask(gathered(source, samples=3), texts("a", "b"), texts("c", "d"), texts("e"), texts(*"fghi"))
    assert calls == [["a", "b", "e"], ["c", "d"], ["f", "g", "h", "i"]]


def test_rows_with_other_keys_go_in_a_call_of_their_own() -> None:
    def reward(samples: list[str], prompts: list[str], outputs: list[str]) -> list[float]:
        return [1.0] * len(outputs)

    with FunctionReward(reward) as source:
        found = ask(gathered(source), texts("a"), texts("b", label="x"), texts("c"))
    assert [mine[0].status for mine in found] == [RewardStatus.OK, RewardStatus.INVALID, RewardStatus.OK]


def test_sample_that_breaks_a_function_fails_its_own_request_alone() -> None:
    def reward(samples: list[str], prompts: list[str], outputs: list[str]) -> list[float]:
        if "bad" in outputs:
            raise ValueError("a bad sample")
        return [1.0] * len(outputs)

    with FunctionReward(reward) as source:
        found = ask(gathered(source), texts("a"), texts("bad", "b"), texts("c"))
    assert [[each.ok for each in mine] for mine in found] == [[True], [False, False], [True]]


class Broken(RewardSource):
    """Breaks, in one of two ways."""

    def __init__(self, *, at_once: bool) -> None:
        self._at_once = at_once

    def check(self) -> None:
        return

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        if self._at_once:
            raise RuntimeError("closed")
        future: Future[list[RewardResult]] = Future()
        future.set_result([])
        return future


@pytest.mark.parametrize("at_once", [True, False])
def test_source_that_breaks_leaves_nobody_waiting(at_once: bool) -> None:
    source = gathered(Broken(at_once=at_once))

    async def run() -> None:
        for _ in range(2):
            futures = [asyncio.wrap_future(source.submit(texts("a"))) for _ in range(2)]
            found = await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), WAIT_S)
            assert all(isinstance(each, Exception) for each in found)

    asyncio.run(run())

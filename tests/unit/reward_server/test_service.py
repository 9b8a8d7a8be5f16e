"""Many callers of one source, and how many may wait."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future

import pytest

from conch.reward_server.service import OverloadedError, ScoringService
from conch.rewards import RewardSource
from conch.types import Completion, Prompt, RewardResult, RewardStatus, Rollout


class Held(RewardSource):
    """Scores texts by their length, once it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[Sequence[Rollout], Future[list[RewardResult]]]] = []

    def check(self) -> None:
        return

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        future: Future[list[RewardResult]] = Future()
        self.asked.append((rollouts, future))
        return future

    def answer(self) -> None:
        """Everything that was asked for."""
        for rollouts, future in self.asked:
            future.set_result(
                [RewardResult(RewardStatus.OK, {"reward": float(len(each.sample))}) for each in rollouts]
            )
        self.asked.clear()


def texts(*words: str) -> list[Rollout]:
    return [Rollout(Prompt(word, ()), Completion("", (), (), "eos"), 0) for word in words]


def test_callers_get_their_own_results_in_order() -> None:
    async def run() -> None:
        source = Held()
        service = ScoringService(source, max_waiting=3, deadline_s=60.0)
        asked = [asyncio.create_task(service.score(texts(*words))) for words in (("a", "bbb"), ("cc",))]
        await asyncio.sleep(0)
        assert service.waiting == 3
        source.answer()
        results = await asyncio.gather(*asked)
        assert [[each.scores["reward"] for each in mine] for mine in results] == [[1.0, 3.0], [2.0]]
        await asyncio.sleep(0)
        assert service.waiting == 0

    asyncio.run(run())


def test_too_many_are_refused_and_one_large_request_is_not() -> None:
    async def run() -> None:
        source = Held()
        service = ScoringService(source, max_waiting=2, deadline_s=60.0)
        large = asyncio.create_task(service.score(texts("a", "b", "c")))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match=r"3 samples wait, 1 more would be above .* = 2"):
            await service.score(texts("d"))
        source.answer()
        assert len(await large) == 3
        assert await service.score([]) == []

    asyncio.run(run())


def test_late_scores_are_a_status_and_still_count_as_waiting() -> None:
    async def run() -> None:
        source = Held()
        service = ScoringService(source, max_waiting=1, deadline_s=0.05)
        (result,) = await service.score(texts("a"))
        assert (result.status, result.detail) == (RewardStatus.TIMEOUT, "no score within 0.05 s")
        assert service.waiting == 1

    asyncio.run(run())

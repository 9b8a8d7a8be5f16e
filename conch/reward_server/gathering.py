"""One call for many callers: rewards that are asked for whole chunks, such as a Python function."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

from conch.rewards.base import ClientStats, RewardSource
from conch.types import RewardResult, RewardStatus, Rollout

_Waiting = tuple[Sequence[Rollout], "Future[list[RewardResult]]"]


class GatheredReward(RewardSource):
    """A source whose requests wait until the call before them has ended, and then go together.

    The samples of a request stay together. Requests whose rows have other keys go in calls of their own,
    since a function may not take them. Where a joined call fails for all, each request is asked for by
    itself: what breaks a function is mostly one sample, and not the others' fault.

    Belongs to one event loop, which `submit` is called in.

    samples: most in a call; a larger request goes alone.
    wait_s: how long the first of a call waits for others, in seconds.
    """

    def __init__(self, source: RewardSource, *, samples: int, wait_s: float) -> None:
        self.name = source.name
        self.batched = True
        self.measures_facts = source.measures_facts
        self._source = source
        self._most, self._wait_s = samples, wait_s
        self._waiting: deque[_Waiting] = deque()
        self._task: asyncio.Task[None] | None = None

    def check(self) -> None:
        self._source.check()

    def is_ready(self) -> bool:
        return self._source.is_ready()

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        result: Future[list[RewardResult]] = Future()
        self._waiting.append((rollouts, result))
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._call_until_none_wait())
        return result

    def stats(self) -> ClientStats | None:
        return self._source.stats()

    def close(self) -> None:
        self._source.close()

    async def _call_until_none_wait(self) -> None:
        await asyncio.sleep(self._wait_s)
        while self._waiting:
            await self._ask(self._next())
        self._task = None

    def _next(self) -> list[_Waiting]:
        """Take requests off that go together, the oldest first."""
        chosen = [self._waiting.popleft()]
        keys, number = _keys(chosen[0]), len(chosen[0][0])
        for _ in range(len(self._waiting)):
            waiting = self._waiting.popleft()
            if number + len(waiting[0]) <= self._most and _keys(waiting) == keys:
                chosen.append(waiting)
                number += len(waiting[0])
            else:
                self._waiting.append(waiting)
        return chosen

    async def _ask(self, chosen: list[_Waiting]) -> None:
        """Score these in one call, or one by one where that fails for all. Nothing is raised."""
        try:
            rollouts = [rollout for each, _ in chosen for rollout in each]
            results = await asyncio.wrap_future(self._source.submit(rollouts))
            assert len(results) == len(rollouts), f"{self.name} gave {len(results)} for {len(rollouts)}"
        except Exception as error:  # of a source that broke: whoever waits must hear of it
            for _, result in chosen:
                result.set_exception(error)
            return
        if len(chosen) > 1 and all(each.status is RewardStatus.INVALID for each in results):
            for each in chosen:
                await self._ask([each])
            return
        first = 0
        for each, result in chosen:
            result.set_result(results[first : first + len(each)])
            first += len(each)


def _keys(waiting: _Waiting) -> set[str]:
    return {key for rollout in waiting[0] for key in rollout.prompt.metadata}

"""Rewards that compare the completions of one prompt, and that tell of submits which are no group."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from conch.rewards import RewardSource, groupwise
from conch.types import RewardResult, RewardStatus, Rollout


def places(outputs: Sequence[str]) -> list[float]:
    """Share of the others that an output has more of `a` and `e` than; half of those that have as many."""
    counts = [sum(letter in "ae" for letter in output) for output in outputs]
    others = max(1, len(counts) - 1)
    return [
        (sum(count > other for other in counts) + (counts.count(count) - 1) / 2) / others for count in counts
    ]


@groupwise
def ranked(outputs: Sequence[str], **_: Any) -> list[float]:
    """The same as a function of the user's."""
    return places(outputs)


@groupwise
async def ranked_async(outputs: Sequence[str], **_: Any) -> list[float]:
    """The same, called while completions are sampled."""
    return places(outputs)


class GroupSource(RewardSource):
    """Ranks each group in a thread of its own.

    submitted: prompt and outputs of each submit so far.
    delays: seconds that the first submits take, one after the other.
    status: of the first `failures` submits.
    """

    name = "group source"
    needs_groups = True

    def __init__(
        self,
        *delays: float,
        batched: bool = False,
        failures: int = 0,
        status: RewardStatus = RewardStatus.UNAVAILABLE,
    ) -> None:
        self.batched = batched
        self.submitted: list[tuple[set[str], list[str]]] = []
        self._delays = list(delays)
        self._failures = failures
        self._status = status

    def check(self) -> None:
        """Nothing to check."""

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        outputs = [rollout.completion.text for rollout in rollouts]
        self.submitted.append(({rollout.prompt.text for rollout in rollouts}, outputs))
        future: Future[list[RewardResult]] = Future()
        delay = self._delays.pop(0) if self._delays else 0.0
        fails = self._failures > 0
        self._failures -= fails

        def end() -> None:
            time.sleep(delay)
            if fails:
                future.set_result([RewardResult(self._status, detail="nobody there")] * len(outputs))
                return
            scores = [{"reward": score} for score in places(outputs)]
            future.set_result([RewardResult(RewardStatus.OK, scores=each) for each in scores])

        threading.Thread(target=end, daemon=True).start()
        return future

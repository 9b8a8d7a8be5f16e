"""Goals as a reward: `goals:reading_difficulty,text_length`."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import Future

from conch.rewards.base import ClientStats, RewardSource
from conch.rewards.client.event_loop import LoopThread
from conch.rewards.goals.base import Failure, Value
from conch.rewards.goals.space import GoalSpace
from conch.types import RewardResult, RewardStatus, Rollout


class GoalsReward(RewardSource):
    """Scores the output alone by each goal of a space; the goals are the objectives.

    A sample that a goal has no value for has that goal's status, and no score.

    normalize: scores between 0 and 1, by each goal's range.
    partial: a sample that a goal has no value for keeps the others, and that goal is absent.
    """

    def __init__(self, space: GoalSpace, *, normalize: bool = True, partial: bool = False) -> None:
        self.name = f"goals {', '.join(space.names)}"
        self._space = space
        self._normalize = normalize
        self._partial = partial
        self._calls = 0
        self._thread = LoopThread(f"goals-{','.join(space.names)}")

    @property
    def objectives(self) -> tuple[str, ...]:
        return self._space.names

    @property
    def digest(self) -> str:
        if not self._normalize:
            return ""
        ranges = sorted(self._space.ranges().items())
        return hashlib.sha256(json.dumps(ranges).encode()).hexdigest()[:12]

    @property
    def space(self) -> GoalSpace:
        """The goals."""
        return self._space

    def check(self) -> None:
        self._space.check(normalize=self._normalize)

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        self._calls += 1
        return self._thread.submit(self._score([rollout.completion.text for rollout in rollouts]))

    def stats(self) -> ClientStats:
        return ClientStats(requests=self._calls)

    def close(self) -> None:
        """Join the thread, and close connections; a goal that does not return is left behind."""
        self._thread.close()
        self._space.close()

    async def _score(self, texts: Sequence[str]) -> list[RewardResult]:
        started = time.monotonic()
        columns = self._space.outcomes(texts, normalize=self._normalize)
        latency_s = time.monotonic() - started
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return [self._result(row, latency_s) for row in rows]

    def _result(self, row: dict[str, Value], latency_s: float) -> RewardResult:
        failures = [value for value in row.values() if isinstance(value, Failure)]
        away = any(failure.status.is_infrastructure for failure in failures)
        if failures and (away or not self._partial or len(failures) == len(row)):
            # Bad data before infrastructure: asking again does not cure it.
            status, detail = min(failures, key=lambda failure: failure.status.is_infrastructure)
            return RewardResult(status, model=self.name, latency_s=latency_s, detail=detail)
        scores = {name: value for name, value in row.items() if not isinstance(value, Failure)}
        absent = tuple(name for name in row if name not in scores)
        return RewardResult(
            RewardStatus.OK, scores=scores, model=self.name, latency_s=latency_s, absent=absent
        )

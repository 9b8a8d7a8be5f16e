"""What every address of a reward server asks: samples in, results out, never more waiting than agreed.

address of some wire form -> `ScoringService.score` -> `RewardSource.submit` (the client's queue, batches,
replicas and retries; or a function, a verifier, goals, a judge)
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from conch.errors import RewardError
from conch.rewards.base import RewardSource
from conch.rewards.combined import refuse_groups
from conch.types import RewardResult, RewardStatus, Rollout


class OverloadedError(RewardError):
    """More samples wait than agreed; HTTP says 429.

    retry_after_s: when to ask again, in seconds.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LateError(RewardError):
    """No result within the server's deadline; HTTP says 504."""


class Admission:
    """How many samples of all callers may wait at once; belongs to one event loop.

    A request that does not fit is refused, but one larger than the bound by itself is taken while nothing
    else waits.

    most: that may wait.
    what: they are, in messages.
    """

    def __init__(self, most: int, what: str = "samples") -> None:
        self.waiting = 0
        self._most = most
        self._what = what

    def take(self, number: int) -> None:
        """Let a request in, whose samples wait until they are given back by `end`.

        Raises:
            OverloadedError: too much waits.
        """
        if self.waiting and self.waiting + number > self._most:
            raise OverloadedError(
                f"{self.waiting} {self._what} wait, {number} more would be above this server's "
                f"`max_waiting` = {self._most}",
                retry_after_s=1.0,
            )
        self.waiting += number

    def end(self, number: int) -> None:
        """Count samples as dealt with."""
        self.waiting -= number


class ScoringService:
    """Scores of a source for many callers at once; belongs to one event loop.

    source: one whose `check` has passed.
    max_waiting: most samples under way, of all callers together; see `Admission`.
    deadline_s: longest time for a request; what has not come by then has the status TIMEOUT.
    """

    def __init__(self, source: RewardSource, *, max_waiting: int, deadline_s: float) -> None:
        refuse_groups(source, "a reward server")
        self.source = source
        self._admission = Admission(max_waiting)
        self._deadline_s = deadline_s

    @property
    def waiting(self) -> int:
        """Samples under way."""
        return self._admission.waiting

    async def score(self, rollouts: Sequence[Rollout]) -> list[RewardResult]:
        """One result per rollout, in order; a failure is a status.

        Raises:
            OverloadedError: too much waits.
        """
        if not rollouts:
            return []
        self._admission.take(len(rollouts))
        loop = asyncio.get_running_loop()
        try:
            future = self.source.submit(rollouts)
        except BaseException:
            self._admission.end(len(rollouts))
            raise
        # Counted until the source has ended with it, however long its caller waits.
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._admission.end, len(rollouts)))
        try:
            # A cancelled future could not take the source's results.
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), self._deadline_s)
        except asyncio.TimeoutError:
            late = RewardResult(RewardStatus.TIMEOUT, detail=f"no score within {self._deadline_s:g} s")
            return [late] * len(rollouts)

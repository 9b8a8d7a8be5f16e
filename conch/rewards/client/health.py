"""Reaches replicas for the first time, and again after they were lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from conch.log import get_logger
from conch.rewards.base import ServerTimes
from conch.rewards.client.pool import ReplicaState
from conch.rewards.client.retry import RetryingScorer, check_shape
from conch.rewards.client.transport import Failure, ModelInfo, ReplicaError, ScoringRow
from conch.rewards.results import ReplyParser
from conch.types import RewardStatus

_log = get_logger(__name__)


class HealthChecker:
    """Brings a pool's replicas into use. A lost one counts as back when it scores: health flags lie.

    make_probe: a row that any model of this form scores.
    """

    def __init__(self, asker: RetryingScorer, make_probe: Callable[[ModelInfo], ScoringRow]) -> None:
        self._asker = asker
        self._pool = asker.pool
        self._config = asker.config
        self._make_probe = make_probe
        self._times: dict[ReplicaState, ServerTimes] = {}

    async def keep(self, link: ReplicaState) -> None:
        """Run for as long as the replica is of use to somebody."""
        if not link.is_usable and link.breaker.cause is None:
            await self._try(link, is_probe=False)
        while True:
            while not link.is_usable:
                await self._rest(link)
                await self._try(link, is_probe=True)
            link.lost.clear()
            await link.lost.wait()

    async def reach(self, link: ReplicaState, timeout_s: float, *, with_score: bool) -> None:
        """Learn what the model is and take the replica into use.

        with_score: only if it scores a row.

        Raises:
            ReplicaError: not reached, or not a replica of the same model.
        """
        replica, identity = link.replica, self._asker.identity
        self._asker.counts.requests += 1
        try:
            info = await replica.open(timeout_s)
        except ReplicaError as error:
            raise _told(error, f"{replica.name} does not tell what it serves") from error
        if refusal := identity.refusal(replica.name, info, is_new=link.info is None):
            raise ReplicaError(Failure(RewardStatus.INVALID, refusal))
        is_first, link.info = link.info is None, info
        try:
            if with_score:
                await self._score_one(link, info, timeout_s)
        except ReplicaError as error:
            link.info = None if is_first else info
            raise _told(error, f"a probe sample was not scored: {replica.name}") from error
        link.breaker.close()
        self._pool.serve()
        await self.gained(link, timeout_s)

    async def gained(self, link: ReplicaState, timeout_s: float) -> ServerTimes:
        """What the server's statistics gained since the call before; nothing if it does not tell."""
        try:
            now = await link.replica.times(timeout_s)
        except ReplicaError:
            return ServerTimes()
        if now is None:
            return ServerTimes()
        before = self._times.get(link, now)
        self._times[link] = now
        if now.requests < before.requests:  # loaded anew in between
            return now
        return ServerTimes(
            now.requests - before.requests, now.queue_s - before.queue_s, now.compute_s - before.compute_s
        )

    async def _try(self, link: ReplicaState, *, is_probe: bool) -> None:
        if is_probe:
            self._asker.counts.retries["probe"] += 1
        try:
            await self.reach(link, self._config.client.request_timeout_s, with_score=is_probe)
        except ReplicaError as error:
            link.breaker.probe_failed(error.failure)
            if not error.failure.retryable and not is_probe:
                _log.error("%s is not used: %s", link.replica.name, error.failure.detail)
            self._pool.serve()
            return
        if is_probe:
            _log.info("%s scores again", link.replica.name)

    async def _score_one(self, link: ReplicaState, info: ModelInfo, timeout_s: float) -> None:
        row = self._asker.known_row or self._make_probe(info)
        self._asker.counts.requests += 1
        answer = await link.replica.ask([row], timeout_s)
        check_shape(answer, 1, link)
        call = ReplyParser(
            link.replica.name, [row.sample], self._pool.model, score_range=self._config.score_range
        )
        (result,) = call.read_columns(answer.columns)
        if not result.ok:
            problem = result.detail.removeprefix(f"{link.replica.name} ")
            raise ReplicaError(Failure(RewardStatus.INVALID, problem))
        self._asker.heard_from(link, answer.version, info.content)

    async def _rest(self, link: ReplicaState) -> None:
        """Until the next probe is due; much sooner where samples wait and there is nobody else to ask."""
        pause_s = link.breaker.pause_s(urgent=False)
        try:
            await asyncio.wait_for(self._pool.wanted.wait(), pause_s)
        except asyncio.TimeoutError:
            return
        await asyncio.sleep(min(pause_s, link.breaker.pause_s(urgent=True)))


def _told(error: ReplicaError, what: str) -> ReplicaError:
    return ReplicaError(replace(error.failure, detail=f"{what}: {error.failure.detail}"))

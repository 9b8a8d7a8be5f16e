"""Reaches replicas for the first time, and again after failures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from conch.log import get_logger
from conch.rewards.base import ServerTimes
from conch.rewards.client.pool import ReplicaState
from conch.rewards.client.retry import RetryingScorer, check_shape
from conch.rewards.client.transport import Failure, ModelInfo, ReplicaError, ScoringRow, Transport
from conch.rewards.results import ReplyParser
from conch.types import RewardStatus

_log = get_logger(__name__)


class HealthChecker:
    """Brings a pool's replicas into use. After a failure a replica must score a row: health flags lie.

    make_probe: makes a row that any model of this form scores.
    """

    def __init__(self, scorer: RetryingScorer, make_probe: Callable[[ModelInfo], ScoringRow]) -> None:
        self._scorer = scorer
        self._pool = scorer.pool
        self._config = scorer.config
        self._make_probe = make_probe
        self._last_statistics: dict[ReplicaState[Transport], ServerTimes] = {}

    async def watch(self, replica: ReplicaState[Transport]) -> None:
        """Bring a replica into use, and again whenever its breaker opens, until cancelled."""
        if not replica.is_usable and replica.breaker.cause is None:
            await self._try_to_connect(replica, is_probe=False)
        while True:
            while not replica.is_usable:
                await self._wait_for_probe(replica)
                await self._try_to_connect(replica, is_probe=True)
            replica.breaker_opened.clear()
            await replica.breaker_opened.wait()

    async def connect(self, replica: ReplicaState[Transport], timeout_s: float, *, with_score: bool) -> None:
        """Ask for the model's description and bring the replica into use.

        with_score: only if it scores a row.

        Raises:
            ReplicaError: not reached, or not a replica of the same model.
        """
        identity = self._scorer.identity
        self._scorer.counts.requests += 1
        try:
            info = await replica.transport.describe(timeout_s)
        except ReplicaError as error:
            raise _prefixed(error, f"{replica.name} does not tell what it serves") from error
        if mismatch := identity.mismatch(replica.name, info, is_new=replica.info is None):
            raise ReplicaError(Failure(RewardStatus.INVALID, mismatch))
        is_first, replica.info = replica.info is None, info
        try:
            if with_score:
                await self._score_probe(replica, info, timeout_s)
        except ReplicaError as error:
            replica.info = None if is_first else info
            raise _prefixed(error, f"a probe sample was not scored: {replica.name}") from error
        replica.breaker.close()
        self._pool.grant_waiting()
        await self.statistics_gain(replica, timeout_s)

    async def answers(self, replica: ReplicaState[Transport]) -> bool:
        """Whether a replica in use scores a row; counts as a failed request where it does not."""
        assert replica.info is not None, "in use"
        try:
            await self._score_probe(replica, replica.info, self._config.request_timeout_s)
        except ReplicaError as error:
            self._scorer.record_failure(replica, error.failure)
            return False
        return True

    async def statistics_gain(self, replica: ReplicaState[Transport], timeout_s: float) -> ServerTimes:
        """Gain of the server's statistics since the last call; zeros if it does not tell."""
        try:
            now = await replica.transport.server_statistics(timeout_s)
        except ReplicaError:
            return ServerTimes()
        if now is None:
            return ServerTimes()
        last = self._last_statistics.get(replica, now)
        self._last_statistics[replica] = now
        if now.requests < last.requests:  # loaded anew in between
            return now
        return ServerTimes(
            now.requests - last.requests, now.queue_s - last.queue_s, now.compute_s - last.compute_s
        )

    async def _try_to_connect(self, replica: ReplicaState[Transport], *, is_probe: bool) -> None:
        if is_probe:
            self._scorer.counts.retries["probe"] += 1
        try:
            await self.connect(replica, self._config.request_timeout_s, with_score=is_probe)
        except ReplicaError as error:
            replica.breaker.record_probe_failure(error.failure)
            if not error.failure.retryable and not is_probe:
                _log.error("%s is not used: %s", replica.name, error.failure.detail)
            self._pool.grant_waiting()
            return
        if is_probe:
            _log.info("%s scores again", replica.name)

    async def _score_probe(self, replica: ReplicaState[Transport], info: ModelInfo, timeout_s: float) -> None:
        row = self._scorer.probe_row or self._make_probe(info)
        self._scorer.counts.requests += 1
        reply = await replica.transport.infer([row], timeout_s)
        check_shape(reply, 1, replica)
        parser = ReplyParser(
            replica.name, [row.sample], self._pool.model, score_range=self._scorer.score_range
        )
        (result,) = parser.parse_columns(reply.columns)
        if not result.ok:
            problem = result.detail.removeprefix(f"{replica.name} ")
            raise ReplicaError(Failure(RewardStatus.INVALID, problem))
        self._scorer.record_reply(replica, reply.version, info.content)

    async def _wait_for_probe(self, replica: ReplicaState[Transport]) -> None:
        """Wait until the next probe is due; much shorter where samples wait and no replica is usable."""
        pause_s = replica.breaker.pause_s(urgent=False)
        try:
            await asyncio.wait_for(self._pool.starved.wait(), pause_s)
        except asyncio.TimeoutError:
            return
        await asyncio.sleep(min(pause_s, replica.breaker.pause_s(urgent=True)))


def _prefixed(error: ReplicaError, prefix: str) -> ReplicaError:
    return ReplicaError(replace(error.failure, detail=f"{prefix}: {error.failure.detail}"))

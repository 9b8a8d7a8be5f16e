"""From a batch to one result per row, whatever happens on the way.

A request is repeated, on another replica if there is one, while that can help. Where one bad row may have
failed it, it is bisected down to that row, which gets one more chance by itself at another replica. If that
one scores what the first refused, the first is at fault.

    score_batch -> _score -> _retry_until_deadline -> _send_once -> Transport.infer
                      └-> _isolate_bad_row -> _bisect, or _retry_elsewhere -> _score
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from conch.config import RewardClientConfig
from conch.log import get_logger
from conch.rewards.client.cache import ModelIdentity, ScoreCache
from conch.rewards.client.pool import Pool, ReplicaState, backoff_s
from conch.rewards.client.transport import Failure, ReplicaError, Reply, ScoringRow, Transport
from conch.rewards.results import ReplyParser, name_row
from conch.types import RewardResult, RewardStatus

_log = get_logger(__name__)


@dataclass(slots=True)
class RequestCounts:
    """Counts of a client since it was made; fields as in `ClientStats`.

    retries: reason -> number.
    """

    requests: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    deduplicated: int = 0
    replica_faults: int = 0


@dataclass(slots=True)
class _Attempt:
    """Rows that are sent together until they have a reply or their deadline has passed.

    tokens: of all rows.
    submitted: time of the rows' submit; this and the next two on the clock of `time.monotonic`.
    started: time of the first attempt at these rows.
    deadline: time after which nothing is sent.
    reason: why these rows are sent again; "" at the first time.
    refusals: replicas that replied, but without scores of these rows.
    refuser: the latest of them.
    avoid: replicas that get the rows only if there is no other.
    is_last: a single row's chance at another replica, after which nothing more is tried.
    requests: number of requests sent.
    failure: the latest one.
    """

    rows: Sequence[ScoringRow]
    tokens: int
    submitted: float
    started: float
    deadline: float
    reason: str = ""
    refusals: frozenset[ReplicaState[Transport]] = frozenset()
    refuser: ReplicaState[Transport] | None = None
    avoid: frozenset[ReplicaState[Transport]] = frozenset()
    is_last: bool = False
    requests: int = 0
    failure: Failure | None = None

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()


@dataclass(frozen=True, slots=True)
class _RowResult:
    """A row's result.

    replica: source of the reply; None for a failure without one.
    """

    result: RewardResult
    replica: ReplicaState[Transport] | None

    @property
    def is_invalid(self) -> bool:
        return self.result.status is RewardStatus.INVALID


@dataclass(slots=True)
class RetryingScorer:
    """Scores batches with a pool's replicas.

    score_range: lowest and highest score; None takes any finite one.
    last_reply_at: time of the latest reply of any replica, on the clock of `time.monotonic`.
    probe_row: a row that was scored, for probes.
    """

    pool: Pool[Transport]
    config: RewardClientConfig
    score_range: tuple[float, float] | None
    identity: ModelIdentity
    counts: RequestCounts
    cache: ScoreCache
    last_reply_at: float = float("-inf")
    probe_row: ScoringRow | None = None

    async def score_batch(
        self, rows: Sequence[ScoringRow], replica: ReplicaState[Transport], submitted: float
    ) -> list[RewardResult]:
        """Score one batch: one result per row, in order.

        Never takes longer than `deadline_s` after a replica's latest sign of life.

        replica: acquired for this; released here.
        submitted: time of the latest submit among the rows.
        """
        scored = await self._score(self._new_attempt(rows, submitted, replica.tokens), replica)
        results = [each.result for each in scored]
        bad = [each.result for each in scored if each.is_invalid]
        if bad:
            _log.warning("%d of %d samples got no valid score; first: %s", len(bad), len(rows), bad[0].detail)
        for row, each in zip(rows, scored, strict=True):
            self._cache_result(row, each)
        return results

    def record_reply(self, replica: ReplicaState[Transport], version: str, content: str) -> None:
        """Note that a replica has replied with this version of the model, which has this content."""
        self.last_reply_at = time.monotonic()
        replica.contents[version] = content
        if self.identity.record_reply(replica.name, version, content):
            self.cache.clear()

    def deadline_failure(self, since: float, failure: Failure | None, requests: int) -> Failure:
        """The failure to report for rows whose deadline has passed.

        since: start of the wait, on the clock of `time.monotonic`.
        failure: the latest one of these rows, if there was one.
        requests: number of requests that were sent.
        """
        failure = failure or self.pool.permanent_failure() or self._latest_breaker_cause()
        elapsed = time.monotonic() - since
        if failure is None:
            return Failure(RewardStatus.UNAVAILABLE, f"no answer for {elapsed:.1f} s, not asked again")
        if requests == 0:
            return replace(failure, detail=f"{failure.detail}, not back after {elapsed:.1f} s")
        if requests == 1 and failure.is_lasting:
            return failure
        attempts = "1 attempt" if requests == 1 else f"{requests} attempts"
        return replace(failure, detail=f"{failure.detail}, {attempts} in {elapsed:.1f} s")

    def _new_attempt(self, rows: Sequence[ScoringRow], submitted: float, tokens_ahead: int = 0) -> _Attempt:
        """tokens_ahead: tokens that the server works through before these rows."""
        started = time.monotonic()
        # From the last sign of life: when the server is gone, queued rows end with those sent before.
        alive = min(started, max(submitted, self.last_reply_at))
        tokens = sum(row.tokens for row in rows)
        deadline = alive + self.config.deadline_s + self._extra_s(tokens_ahead + tokens)
        return _Attempt(rows, tokens, submitted, started, deadline)

    def _extra_s(self, tokens: int) -> float:
        """Seconds that a number of tokens adds to a deadline."""
        return self.config.timeout_per_1k_tokens_s * tokens / 1000

    async def _score(
        self, attempt: _Attempt, replica: ReplicaState[Transport] | None = None
    ) -> list[_RowResult]:
        outcome = await self._retry_until_deadline(attempt, replica)
        if isinstance(outcome, Failure):
            return await self._isolate_bad_row(attempt, outcome)
        reply, replica = outcome
        scored = [_RowResult(result, replica) for result in self._parse(attempt, reply, replica)]
        if self.identity.change:
            return scored
        refusals = attempt.refusals | {replica}
        for index, row in enumerate(attempt.rows):
            if scored[index].is_invalid and self._may_retry(attempt, refusals):
                scored[index] = await self._retry_elsewhere(row, attempt, refusals, scored[index])
        return scored

    async def _isolate_bad_row(self, attempt: _Attempt, failure: Failure) -> list[_RowResult]:
        """After a failure that one row may have caused: bisect, or try a single row at another replica."""
        is_data = failure.status is RewardStatus.INVALID
        if is_data and failure.maybe_one_row and len(attempt.rows) > 1:
            return await self._bisect(attempt, failure)
        failed = [_RowResult(result, None) for result in self._failures(attempt, failure)]
        others = self.pool.usable(but=attempt.refusals)
        if not (is_data and failure.elsewhere and others) or attempt.is_last:
            return failed
        again = self._next_attempt(attempt, attempt.rows, attempt.refusals)
        scored = await self._score(replace(again, is_last=len(attempt.rows) == 1))
        self._count_replica_fault(attempt.refuser, scored, failure)
        return scored

    async def _bisect(self, attempt: _Attempt, failure: Failure) -> list[_RowResult]:
        middle = len(attempt.rows) // 2
        scored: list[_RowResult] = []
        for half in (attempt.rows[:middle], attempt.rows[middle:]):
            scored += await self._score(self._next_attempt(attempt, half, attempt.refusals))
        self._count_replica_fault(attempt.refuser, scored, failure)
        return scored

    def _may_retry(self, attempt: _Attempt, refusals: frozenset[ReplicaState[Transport]]) -> bool:
        """Whether a row without a valid score is sent again: not if all replicas had it alone."""
        was_alone = len(attempt.rows) == 1
        return not attempt.is_last and (not was_alone or bool(self.pool.usable(but=refusals)))

    async def _retry_elsewhere(
        self,
        row: ScoringRow,
        attempt: _Attempt,
        refusals: frozenset[ReplicaState[Transport]],
        refused: _RowResult,
    ) -> _RowResult:
        """Send one row alone, for the last time, to another replica if there is one.

        refused: its result so far.
        """
        again = replace(self._next_attempt(attempt, [row], refusals), is_last=True)
        (scored,) = await self._score(again)
        failure = Failure(RewardStatus.INVALID, refused.result.detail)
        self._count_replica_fault(refused.replica, [scored], failure)
        return scored

    def _next_attempt(
        self, attempt: _Attempt, rows: Sequence[ScoringRow], refusals: frozenset[ReplicaState[Transport]]
    ) -> _Attempt:
        """The same rows, or some of them, once more, with a deadline of their own."""
        again = self._new_attempt(rows, attempt.submitted)
        return replace(again, started=attempt.started, reason="data", refusals=refusals, avoid=refusals)

    def _count_replica_fault(
        self, refuser: ReplicaState[Transport] | None, scored: Sequence[_RowResult], failure: Failure
    ) -> None:
        """Count a fault of a replica that refused rows which others then scored in full."""
        scorers = {each.replica for each in scored}
        if refuser is None or refuser in scorers or not all(each.result.ok for each in scored):
            return
        self.counts.replica_faults += 1
        _log.warning("%s refused what another replica scored: %s", refuser.name, failure.detail)
        self.record_failure(refuser, failure)

    async def _retry_until_deadline(
        self, attempt: _Attempt, replica: ReplicaState[Transport] | None
    ) -> tuple[Reply, ReplicaState] | Failure:
        """Send until there is a reply, or a failure after which sending again is useless or too late."""
        while True:
            if replica is None:
                replica = await self.pool.acquire(attempt.left_s, avoid=attempt.avoid, is_retry=True)
            if replica is None or attempt.left_s <= 0:
                if replica is not None:
                    self.pool.release(replica)
                return self.deadline_failure(attempt.started, attempt.failure, attempt.requests)
            try:
                reply = await self._send_once(attempt, replica)
            finally:
                self.pool.release(replica)
            if not isinstance(reply, Failure):
                return reply, replica
            attempt.failure, attempt.avoid = reply, attempt.avoid | {replica}
            if not reply.status.is_infrastructure:
                attempt.refusals, attempt.refuser = attempt.refusals | {replica}, replica
                return reply
            if not reply.retryable and not self.pool.usable(but=attempt.avoid):
                return reply
            await asyncio.sleep(min(backoff_s(attempt.requests), max(0.0, attempt.left_s)))
            attempt.reason = reply.status.value
            replica = None

    async def _send_once(self, attempt: _Attempt, replica: ReplicaState[Transport]) -> Reply | Failure:
        replica.tokens += attempt.tokens
        timeout_s = min(self.config.request_timeout_s + self._extra_s(replica.tokens), attempt.left_s)
        self.counts.requests += 1
        if attempt.reason:
            self.counts.retries[attempt.reason] += 1
        attempt.requests += 1
        try:
            reply = await replica.transport.infer(attempt.rows, timeout_s)
            check_shape(reply, len(attempt.rows), replica)
            await self._check_version(replica, reply.version, timeout_s)
        except ReplicaError as error:
            failure = error.failure
            if failure.status.is_infrastructure:
                self.record_failure(replica, failure)
            else:
                self.last_reply_at = time.monotonic()
            return failure
        finally:
            replica.tokens -= attempt.tokens
        self.last_reply_at = time.monotonic()
        replica.breaker.record_success()
        return reply

    async def _check_version(self, replica: ReplicaState[Transport], version: str, timeout_s: float) -> None:
        """Ask for the content of a version that has not replied before."""
        if version in replica.contents:
            return
        assert replica.info is not None
        if replica.contents:
            self.counts.requests += 1
            info = await replica.transport.describe(timeout_s)
            replica.info = info
        self.record_reply(replica, version, replica.info.content)

    def record_failure(self, replica: ReplicaState[Transport], failure: Failure) -> None:
        """Count a failed request; the replica may go out of use, or rest for as long as it asked for."""
        if failure.retry_after_s > 0:
            self.pool.defer(replica, failure.retry_after_s)
            return
        was_closed = replica.breaker.is_closed
        replica.breaker.record_failure(failure)
        if was_closed and not replica.breaker.is_closed:
            _log.warning("%s is left alone until a probe succeeds: %s", replica.name, failure.detail)
            replica.breaker_opened.set()
            self.pool.grant_waiting()

    def _latest_breaker_cause(self) -> Failure | None:
        causes = [replica.breaker.cause for replica in self.pool.replicas]
        return next((cause for cause in causes if cause is not None), None)

    def _parse(self, attempt: _Attempt, reply: Reply, replica: ReplicaState[Transport]) -> list[RewardResult]:
        parser = self._parser(attempt, replica.name, reply.version)
        if self.identity.change:
            return parser.failures(RewardStatus.INVALID, self.identity.change)
        results = (
            parser.parse(reply.token_scores, [len(row.bounds) - 1 for row in attempt.rows])
            if reply.token_scores
            else parser.parse_columns(reply.columns)
        )
        if not (reply.members or any(reply.notes)):
            return results
        rows = zip(
            results, reply.notes or [""] * len(results), reply.members or [{}] * len(results), strict=True
        )
        return [
            replace(result, detail=note, members=members) if result.ok else result
            for result, note, members in rows
        ]

    def _failures(self, attempt: _Attempt, failure: Failure) -> list[RewardResult]:
        names = " or ".join(sorted(replica.name for replica in attempt.refusals)) or self.pool.name
        where = ""
        if failure.status is RewardStatus.INVALID and len(attempt.rows) == 1:
            # Of a row that was refused alone the server says "row 0"; the caller's number is of more use.
            where = f" refused {name_row(attempt.rows[0].position, attempt.rows[0].sample)}"
        parser = self._parser(attempt, self.pool.name, version="")
        return parser.failures(failure.status, f"{names}{where}: {failure.detail}")

    def _parser(self, attempt: _Attempt, who: str, version: str) -> ReplyParser:
        return ReplyParser(
            who,
            [row.sample for row in attempt.rows],
            self.pool.model,
            version=version,
            latency_s=time.monotonic() - attempt.started,
            positions=[row.position for row in attempt.rows],
            score_range=self.score_range,
        )

    def _cache_result(self, row: ScoringRow, scored: _RowResult) -> None:
        # One with a note is not the full score: asked again later, it may be.
        if not scored.result.ok or scored.result.detail or scored.replica is None:
            return
        self.probe_row = self.probe_row or row
        version = scored.result.version
        if self.identity.is_current(version, scored.replica.contents.get(version, "")):
            self.cache.add(row, scored.result)


def check_shape(reply: Reply, rows: int, replica: ReplicaState[Transport]) -> None:
    """Refuse a reply that has not one number per row and objective: its scores belong to unknown rows.

    rows: number of rows in the request.

    Raises:
        ReplicaError: says what came instead.
    """
    assert replica.info is not None
    names = set(replica.info.reward_names or reply.columns)
    problem = ""
    if set(reply.columns) != names or not names:
        problem = f"the rewards {sorted(reply.columns)}, expected {sorted(names) or 'at least one'}"
    for name, values in reply.columns.items():
        if len(values) != rows:
            problem = f"{len(values)} scores of `{name}` for {rows} samples"
    if problem:
        raise ReplicaError(Failure(RewardStatus.INVALID, f"the reply has {problem}", maybe_one_row=rows > 1))

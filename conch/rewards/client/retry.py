"""From a micro-batch to one result per row, whatever happens on the way.

A request is repeated, on another replica if there is one, while that can help. Where one bad row may have
failed it, its halves are asked, and theirs, down to the row; that row gets one more chance by itself at
another replica. If that one scores what the first refused, the first is at fault.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from conch.config import RewardConfig
from conch.log import get_logger
from conch.rewards.base import Counts
from conch.rewards.client.cache import ModelIdentity, ScoreCache
from conch.rewards.client.pool import Pool, ReplicaState, backoff_s
from conch.rewards.client.transport import Failure, ReplicaError, Reply, ScoringRow
from conch.rewards.results import ReplyParser, name_row
from conch.types import RewardResult, RewardStatus

_log = get_logger(__name__)


@dataclass(slots=True)
class _Attempt:
    """Rows that are asked for together, and what was tried.

    reason: why these rows are asked for again; "" at the first time.
    refused: replicas that answered, but not with scores of these rows; the latest is `refuser`.
    avoid: replicas not to be asked if there is another.
    is_last: a single row's chance at another replica, after which nothing more is tried.
    """

    rows: Sequence[ScoringRow]
    tokens: int
    submitted: float
    started: float
    deadline: float
    reason: str = ""
    refused: frozenset[ReplicaState] = frozenset()
    refuser: ReplicaState | None = None
    avoid: frozenset[ReplicaState] = frozenset()
    is_last: bool = False
    attempts: int = 0
    failure: Failure | None = None

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()


@dataclass(frozen=True, slots=True)
class Scored:
    """A row's result, and who had the last word; None if nobody had."""

    result: RewardResult
    link: ReplicaState | None


@dataclass(slots=True)
class RetryingScorer:
    """Asks a pool's replicas.

    last_answer: when any of them last answered anything, on the clock of `time.monotonic`.
    known_row: one that was scored, for probes.
    """

    pool: Pool
    config: RewardConfig
    identity: ModelIdentity
    counts: Counts
    memory: ScoreCache
    last_answer: float = float("-inf")
    known_row: ScoringRow | None = None

    async def settle(
        self, rows: Sequence[ScoringRow], link: ReplicaState, submitted: float
    ) -> list[RewardResult]:
        """One result per row, in order; releases `link`, which was acquired for this.

        Never takes longer than `deadline_s` after a replica's latest sign of life.
        """
        scored = await self._settle(self._effort(rows, submitted, link.tokens), link)
        results = [each.result for each in scored]
        bad = [result for result in results if result.status is RewardStatus.INVALID]
        if bad:
            _log.warning("%d of %d samples got no valid score; first: %s", len(bad), len(rows), bad[0].detail)
        for row, each in zip(rows, scored, strict=True):
            self._remember(row, each)
        return results

    def _effort(self, rows: Sequence[ScoringRow], submitted: float, ahead: int = 0) -> _Attempt:
        """ahead: tokens that the server will work through before these."""
        started = time.monotonic()
        # From the last sign of life: when the server is gone, what queued gives up with what went before.
        alive = min(started, max(submitted, self.last_answer))
        tokens = sum(row.tokens for row in rows)
        deadline = alive + self.config.client.deadline_s + self._extra_s(ahead + tokens)
        return _Attempt(rows, tokens, submitted, started, deadline)

    def _extra_s(self, tokens: int) -> float:
        """What so many tokens add to a deadline, in seconds."""
        return self.config.client.timeout_per_1k_tokens_s * tokens / 1000

    async def _settle(self, effort: _Attempt, link: ReplicaState | None = None) -> list[Scored]:
        reply = await self._persist(effort, link)
        if isinstance(reply, Failure):
            return await self._look_closer(effort, reply)
        answer, link = reply
        scored = [Scored(result, link) for result in self._read(effort, answer, link)]
        if self.identity.change or not any(_is_bad(each) for each in scored):
            return scored
        refused = effort.refused | {link}
        for index, row in enumerate(effort.rows):
            if _is_bad(scored[index]) and self._deserves_more(effort, refused):
                scored[index] = await self._again([row], effort, refused, link, scored[index])
        return scored

    async def _look_closer(self, effort: _Attempt, failure: Failure) -> list[Scored]:
        """After a failure that may be one row's: ask the halves, or a single row elsewhere."""
        is_data = failure.status is RewardStatus.INVALID
        if is_data and failure.maybe_one_row and len(effort.rows) > 1:
            return await self._halves(effort, failure)
        verdict = [Scored(result, None) for result in self._failed(effort, failure)]
        others = self.pool.usable(but=effort.refused)
        if not (is_data and failure.elsewhere and others) or effort.is_last:
            return verdict
        second = replace(self._next(effort, effort.rows, effort.refused), is_last=len(effort.rows) == 1)
        scored = await self._settle(second)
        self._blame(effort.refuser, scored, failure)
        return scored

    async def _halves(self, effort: _Attempt, failure: Failure) -> list[Scored]:
        middle = len(effort.rows) // 2
        scored: list[Scored] = []
        for half in (effort.rows[:middle], effort.rows[middle:]):
            scored += await self._settle(self._next(effort, half, effort.refused))
        self._blame(effort.refuser, scored, failure)
        return scored

    def _deserves_more(self, effort: _Attempt, refused: frozenset[ReplicaState]) -> bool:
        """Whether a row whose score was not valid is asked again: not where it was asked alone, by all."""
        was_alone = len(effort.rows) == 1
        return not effort.is_last and (not was_alone or bool(self.pool.usable(but=refused)))

    async def _again(
        self,
        rows: Sequence[ScoringRow],
        effort: _Attempt,
        refused: frozenset[ReplicaState],
        link: ReplicaState,
        before: Scored,
    ) -> Scored:
        second = replace(self._next(effort, rows, refused), is_last=True)
        (scored,) = await self._settle(second)
        self._blame(link, [scored], Failure(RewardStatus.INVALID, before.result.detail))
        return scored

    def _next(
        self, effort: _Attempt, rows: Sequence[ScoringRow], refused: frozenset[ReplicaState]
    ) -> _Attempt:
        """The same rows, or some of them, once more, with a deadline of their own."""
        effort = replace(self._effort(rows, effort.submitted), started=effort.started)
        return replace(effort, reason="data", refused=refused, avoid=refused)

    def _blame(self, refuser: ReplicaState | None, scored: Sequence[Scored], failure: Failure) -> None:
        """Count it against a replica that refused what others then scored in full."""
        answered = {each.link for each in scored}
        if refuser is None or refuser in answered or not all(each.result.ok for each in scored):
            return
        self.counts.replica_faults += 1
        _log.warning("%s refused what another replica scored: %s", refuser.replica.name, failure.detail)
        self._note_failure(refuser, failure)

    async def _persist(
        self, effort: _Attempt, link: ReplicaState | None
    ) -> tuple[Reply, ReplicaState] | Failure:
        """An answer, or the failure after which asking again does not help or is too late."""
        while True:
            if link is None:
                link = await self.pool.acquire(effort.left_s, avoid=effort.avoid, is_retry=True)
            if link is None or effort.left_s <= 0:
                if link is not None:
                    self.pool.release(link)
                return self.give_up(effort.started, effort.failure, effort.attempts)
            try:
                reply = await self._try(effort, link)
            finally:
                self.pool.release(link)
            if not isinstance(reply, Failure):
                return reply, link
            effort.failure, effort.avoid = reply, effort.avoid | {link}
            if not reply.status.is_infrastructure:
                effort.refused, effort.refuser = effort.refused | {link}, link
                return reply
            if not reply.retryable and not self.pool.usable(but=effort.avoid):
                return reply
            await asyncio.sleep(min(backoff_s(effort.attempts), max(0.0, effort.left_s)))
            effort.reason = reply.status.value
            link = None

    def give_up(self, since: float, failure: Failure | None, attempts: int) -> Failure:
        """What is said of rows whose time is over. since: on the clock of `time.monotonic`."""
        failure = failure or self.pool.hopeless() or self._latest_cause()
        elapsed = time.monotonic() - since
        if failure is None:
            return Failure(RewardStatus.UNAVAILABLE, f"no answer for {elapsed:.1f} s, not asked again")
        if attempts == 0:
            return replace(failure, detail=f"{failure.detail}, not back after {elapsed:.1f} s")
        if attempts == 1 and failure.is_lasting:
            return failure
        return replace(failure, detail=f"{failure.detail}, {_counted(attempts)} in {elapsed:.1f} s")

    def _latest_cause(self) -> Failure | None:
        causes = [link.breaker.cause for link in self.pool.links]
        return next((cause for cause in causes if cause is not None), None)

    async def _try(self, effort: _Attempt, link: ReplicaState) -> Reply | Failure:
        link.tokens += effort.tokens
        timeout_s = min(self.config.client.request_timeout_s + self._extra_s(link.tokens), effort.left_s)
        self.counts.requests += 1
        if effort.reason:
            self.counts.retries[effort.reason] += 1
        effort.attempts += 1
        try:
            answer = await link.replica.ask(effort.rows, timeout_s)
            check_shape(answer, len(effort.rows), link)
            await self._recognise(link, answer.version, timeout_s)
        except ReplicaError as error:
            failure = error.failure
            if failure.status.is_infrastructure:
                self._note_failure(link, failure)
            else:
                self.last_answer = time.monotonic()
            return failure
        finally:
            link.tokens -= effort.tokens
        self.last_answer = time.monotonic()
        link.breaker.succeeded()
        return answer

    def _note_failure(self, link: ReplicaState, failure: Failure) -> None:
        was_closed = link.breaker.is_closed
        link.breaker.failed(failure)
        if was_closed and not link.breaker.is_closed:
            _log.warning("%s is left alone until a probe succeeds: %s", link.replica.name, failure.detail)
            link.lost.set()
            self.pool.serve()

    async def _recognise(self, link: ReplicaState, version: str, timeout_s: float) -> None:
        """Find out which content a version that has not answered before stands for."""
        if version in link.contents:
            return
        assert link.info is not None
        if link.contents:
            self.counts.requests += 1
            link.info = await link.replica.open(timeout_s)
        self.heard_from(link, version, link.info.content)

    def heard_from(self, link: ReplicaState, version: str, content: str) -> None:
        """Note that a replica has answered with this version, which stands for this content."""
        self.last_answer = time.monotonic()
        link.contents[version] = content
        if self.identity.answered(link.replica.name, version, content):
            self.memory.clear()

    def _read(self, effort: _Attempt, answer: Reply, link: ReplicaState) -> list[RewardResult]:
        call = self._call(effort, link, answer.version)
        if self.identity.change:
            return call.failed(RewardStatus.INVALID, self.identity.change)
        results = (
            call.read(answer.token_scores, [len(row.bounds) - 1 for row in effort.rows])
            if answer.token_scores
            else call.read_columns(answer.columns)
        )
        return [
            replace(result, detail=note) if note and result.ok else result
            for result, note in zip(results, answer.notes or [""] * len(results), strict=True)
        ]

    def _failed(self, effort: _Attempt, failure: Failure) -> list[RewardResult]:
        names = " or ".join(sorted(link.replica.name for link in effort.refused)) or self.pool.name
        where = ""
        if failure.status is RewardStatus.INVALID and len(effort.rows) == 1:
            # Of a row that was refused alone the server says "row 0"; the caller's number is of more use.
            where = f" refused {name_row(effort.rows[0].position, effort.rows[0].sample)}"
        call = self._call(effort, None, "")
        return call.failed(failure.status, f"{names}{where}: {failure.detail}")

    def _call(self, effort: _Attempt, link: ReplicaState | None, version: str) -> ReplyParser:
        return ReplyParser(
            self.pool.name if link is None else link.replica.name,
            [row.sample for row in effort.rows],
            self.pool.model,
            version=version,
            latency_s=time.monotonic() - effort.started,
            positions=[row.position for row in effort.rows],
            score_range=self.config.score_range,
        )

    def _remember(self, row: ScoringRow, scored: Scored) -> None:
        # One with a note is not the full score: asked again later, it may be.
        if not scored.result.ok or scored.result.detail or scored.link is None:
            return
        self.known_row = self.known_row or row
        version = scored.result.version
        if self.identity.is_current(version, scored.link.contents.get(version, "")):
            self.memory.keep(row, scored.result)


def check_shape(answer: Reply, count: int, link: ReplicaState) -> None:
    """Refuse a reply that has not one number per row and objective: nobody knows whose scores those are.

    Raises:
        ReplicaError: says what came instead.
    """
    assert link.info is not None
    names = set(link.info.reward_names or answer.columns)
    problem = ""
    if set(answer.columns) != names or not names:
        problem = f"the rewards {sorted(answer.columns)}, expected {sorted(names) or 'at least one'}"
    for name, values in answer.columns.items():
        if len(values) != count:
            problem = f"{len(values)} scores of `{name}` for {count} samples"
    if problem:
        raise ReplicaError(Failure(RewardStatus.INVALID, f"the reply has {problem}", maybe_one_row=count > 1))


def _counted(attempts: int) -> str:
    return "1 attempt" if attempts == 1 else f"{attempts} attempts"


def _is_bad(scored: Scored) -> bool:
    return scored.result.status is RewardStatus.INVALID

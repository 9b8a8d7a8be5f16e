"""Asking a judge: replicas, retries until a deadline, rate limits, known answers, and what all this costs.

    ask -> the cache, or an equal question under way, or _ask_until_deadline
        -> a replica of the pool -> its Limits -> JudgeEndpoint.ask

A replica that fails as a whole, or asks to be left alone, gets nothing for a while; the others get its
requests.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from conch.config import JudgeConfig, OnModelChange
from conch.errors import ConfigError, RewardUnavailableError
from conch.log import get_logger
from conch.rewards.base import ClientStats
from conch.rewards.client.cache import ModelIdentity
from conch.rewards.client.pool import Pool, ReplicaState, backoff_s
from conch.rewards.client.transport import Failure, ModelInfo, ReplicaError
from conch.rewards.judge.cache import AnswerCache, key_of
from conch.rewards.judge.endpoint import Answer, JudgeEndpoint, PausedError, check_model
from conch.rewards.judge.limits import Limits
from conch.types import Metrics, RewardStatus

_log = get_logger(__name__)
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0


@dataclass(slots=True)
class Spending:
    """What a judge has cost this process.

    tokens_in, tokens_out: read and written.
    cost: in the currency of the prices.
    earlier: cost of the run that this process goes on with, its share.
    reserved: that requests under way may cost at most.
    known: answers that cost nothing.
    unread: answers that were no score.
    """

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    earlier: float = 0.0
    reserved: float = 0.0
    known: int = 0
    unread: int = 0


@dataclass(slots=True)
class _Counts:
    requests: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    deduplicated: int = 0


class JudgeClient:
    """Asks the replicas of one judge. All coroutines run in the same loop.

    name: the judge with its servers, in messages.
    num_processes: that share limits and budget evenly.
    """

    def __init__(
        self,
        name: str,
        endpoints: Sequence[JudgeEndpoint],
        config: JudgeConfig,
        on_model_change: OnModelChange = "raise",
        num_processes: int | None = None,
    ) -> None:
        self._name = name
        self._config = config
        self._endpoints = list(endpoints)
        share = num_processes or int(os.environ.get("WORLD_SIZE", "1"))
        self._pool = Pool(name, self._endpoints, config.max_in_flight)
        for replica in self._pool.replicas:
            replica.info = ModelInfo()
        self._limits = {
            id(replica): Limits(
                _part(config.requests_per_minute, share), _part(config.tokens_per_minute, share)
            )
            for replica in self._pool.replicas
        }
        self._budget = _part(config.budget, share)
        self._identity = ModelIdentity(on_model_change)
        self._cache = AnswerCache(config.cache_size, config.cache_file)
        servers = ",".join(sorted(endpoint.url for endpoint in endpoints))
        self._cached_as = config.cache_as or f"{servers} {config.model}"
        self._under_way: dict[str, asyncio.Task[Answer | Failure]] = {}
        self._resume_at: dict[int, float] = {}
        self._pauses: Counter[int] = Counter()
        self._last_answer_at = float("-inf")
        self._counts = _Counts()
        self._last: Spending | None = None
        self.spending = Spending()

    def stats(self) -> ClientStats:
        """Snapshot of the counts; may be called from any thread."""
        most, self._pool.most_in_flight = self._pool.most_in_flight, self._pool.in_flight
        retries = dict(self._counts.retries)
        return ClientStats(
            requests=self._counts.requests,
            retries=sum(retries.values()),
            retries_by=retries,
            deduplicated=self._counts.deduplicated,
            most_in_flight=most,
            model_change=self._identity.change,
        )

    def metrics(self) -> Metrics:
        """Figures of this process since the last call; from any thread."""
        now, last = replace(self.spending), self._last or Spending()
        self._last = now
        return {
            "judge/tokens_in": float(now.tokens_in - last.tokens_in),
            "judge/tokens_out": float(now.tokens_out - last.tokens_out),
            "judge/cost": now.cost - last.cost,
            "judge/cost_total": now.earlier + now.cost,
            "judge/known_answers": float(now.known - last.known),
            "judge/unread_answers": float(now.unread - last.unread),
        }

    async def check(self, body: Mapping[str, Any]) -> list[Answer]:
        """Ask every server once, within `deadline_s`; returns the answers.

        Raises:
            ConfigError: a server has no such model, or gives no log-probabilities where they are needed.
            RewardUnavailableError: no server answers.
        """
        outcomes = await asyncio.gather(*(self._try(endpoint, body) for endpoint in self._endpoints))
        answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
        problems = [outcome for outcome in outcomes if isinstance(outcome, str)]
        if not answers:
            raise RewardUnavailableError("; ".join(problems))
        for problem in problems:
            _log.warning("one of %d servers cannot be used yet: %s", len(outcomes), problem)
        return answers

    async def ask(
        self, body: Mapping[str, Any], is_read: Callable[[Answer], bool] = lambda _: True, *, vote: int = 0
    ) -> Answer | Failure:
        """Ask one question, unless its answer is known or under way.

        body: of the request.
        is_read: whether an answer says something; only such answers are kept.
        vote: of several; without seeds their requests are equal, and their answers are not.
        """
        key = key_of(self._cached_as, {**body, "vote": vote})
        known = self._cache.get(key)
        if known is not None:
            self._counts.deduplicated += 1
            self.spending.known += 1
            return known
        task = self._under_way.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._ask_until_deadline(body))
            self._under_way[key] = task
            task.add_done_callback(lambda _: self._under_way.pop(key, None))
        else:
            self._counts.deduplicated += 1
        answer = await asyncio.shield(task)
        if isinstance(answer, Answer):
            if is_read(answer):
                self._cache.add(key, answer)
            else:
                self.spending.unread += 1
        return answer

    async def close(self) -> None:
        """Close connections and the cache's file; tell what was spent."""
        for endpoint in self._endpoints:
            await endpoint.close()
        self._cache.close()
        spent = self.spending
        if spent.requests:
            _log.info(
                "%s: %d answers, %d tokens read and %d written, cost %.4f; %d answers were known",
                *(self._name, spent.requests, spent.tokens_in, spent.tokens_out, spent.cost, spent.known),
            )

    async def _try(self, endpoint: JudgeEndpoint, body: Mapping[str, Any]) -> Answer | str:
        """A server's answer to a trial, or why there is none."""
        deadline = time.monotonic() + self._config.deadline_s
        attempts = 0
        while True:
            attempts += 1
            left_s = deadline - time.monotonic()
            try:
                answer = await endpoint.ask(body, min(self._config.request_timeout_s, left_s))
                break
            except ReplicaError as error:
                failure = error.failure
                pause_s = error.pause_s if isinstance(error, PausedError) else backoff_s(attempts)
            # A server that is not there is told at once: it may not be started at all.
            is_away = failure.is_down or time.monotonic() + pause_s >= deadline
            if is_away or not failure.retryable:
                check_model(await endpoint.models(self._config.connect_timeout_s), self._config, endpoint.url)
                return f"{endpoint.name}: {failure.detail}"
            await asyncio.sleep(pause_s)
        self._count(answer)
        if self._config.parser == "logprobs" and not answer.tokens:
            raise ConfigError(
                f"{endpoint.name} gives no log-probabilities: take `judge.parser` = choice, or a server and "
                "a model that give `logprobs`"
            )
        return answer

    async def _ask_until_deadline(self, body: Mapping[str, Any]) -> Answer | Failure:
        estimate = estimated_tokens(body)
        cost, spent = self._price(estimate, self._config.max_tokens), self.spending
        if self._budget is not None and spent.earlier + spent.cost + spent.reserved + cost > self._budget:
            return Failure(
                RewardStatus.SKIPPED, f"the budget of {self._config.budget:g} is spent (`judge.budget`)"
            )
        self.spending.reserved += cost
        try:
            return await self._retry(body, estimate)
        finally:
            self.spending.reserved -= cost

    async def _retry(self, body: Mapping[str, Any], estimate: int) -> Answer | Failure:
        """Send until there is an answer, or a failure after which sending again is useless or too late."""
        submitted, started = time.monotonic(), None
        failure: Failure | None = None
        avoid: frozenset[ReplicaState[JudgeEndpoint]] = frozenset()
        attempts = 0
        while True:
            # From the last sign of life: when the servers are gone, what waits ends with what was sent.
            since = started if started is not None else max(submitted, self._last_answer_at)
            left_s = since + self._config.deadline_s - time.monotonic()
            replica = await self._pool.acquire(max(0.0, left_s), avoid=avoid, is_retry=attempts > 0)
            if replica is None:
                if started is None and self._last_answer_at > since and not self._pool.permanent_failure():
                    continue
                return self._given_up(failure, attempts, time.monotonic() - since)
            try:
                await self._limits[id(replica)].wait(estimate)
                if not replica.is_usable:  # it has asked to be left alone meanwhile
                    continue
                started = started or time.monotonic()
                left_s = started + self._config.deadline_s - time.monotonic()
                if left_s <= 0:
                    return self._given_up(failure, attempts, self._config.deadline_s)
                attempts += 1
                outcome = await self._send_once(body, estimate, replica, left_s, failure)
            finally:
                self._pool.release(replica)
            if isinstance(outcome, Answer):
                return outcome
            failure, avoid = outcome, avoid | {replica}
            is_useless = not failure.retryable and not self._pool.usable(but=avoid)
            if not failure.status.is_infrastructure or is_useless:
                return failure
            await asyncio.sleep(min(backoff_s(attempts), max(0.0, left_s)))

    async def _send_once(
        self,
        body: Mapping[str, Any],
        estimate: int,
        replica: ReplicaState[JudgeEndpoint],
        left_s: float,
        before: Failure | None,
    ) -> Answer | Failure:
        self._counts.requests += 1
        if before is not None:
            self._counts.retries[before.status.value] += 1
        endpoint = replica.transport
        try:
            answer = await endpoint.ask(body, min(self._config.request_timeout_s, left_s))
        except PausedError as error:
            self._last_answer_at = time.monotonic()
            self._leave_alone(replica, error.pause_s, error.failure)
            return replace(error.failure, detail=f"{replica.name}: {error.failure.detail}")
        except ReplicaError as error:
            self._record_failure(replica, error.failure)
            return replace(error.failure, detail=f"{replica.name}: {error.failure.detail}")
        self._last_answer_at = time.monotonic()
        replica.breaker.record_success()
        self._pauses[id(replica)] = 0
        if answer.pause_s > 0:
            nothing_left = Failure(RewardStatus.UNAVAILABLE, "its rate limit is reached", retryable=True)
            self._leave_alone(replica, answer.pause_s, nothing_left)
        self._limits[id(replica)].correct(answer.tokens_in + answer.tokens_out - estimate)
        self._count(answer)
        self._identity.record_reply(replica.name, answer.model, "")
        if self._identity.change:
            return Failure(RewardStatus.INVALID, self._identity.change)
        return answer

    def _count(self, answer: Answer) -> None:
        self._cache.model = answer.model
        self.spending.requests += 1
        self.spending.tokens_in += answer.tokens_in
        self.spending.tokens_out += answer.tokens_out
        self.spending.cost += self._price(answer.tokens_in, answer.tokens_out)

    def _price(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self._config.price_in + tokens_out * self._config.price_out) / 1e6

    def _record_failure(self, replica: ReplicaState[JudgeEndpoint], failure: Failure) -> None:
        if not failure.status.is_infrastructure:  # it answered; the sample is at fault
            self._last_answer_at = time.monotonic()
            return
        replica.breaker.record_failure(failure)
        if not replica.breaker.is_closed:
            self._pauses[id(replica)] += 1
            pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(self._pauses[id(replica)] - 1, 10))
            self._leave_alone(replica, pause_s, failure)

    def _leave_alone(self, replica: ReplicaState[JudgeEndpoint], pause_s: float, failure: Failure) -> None:
        """Send nothing to a replica for a while; what asks next then tries it."""
        replica.breaker.record_probe_failure(failure)
        self._pool.grant_waiting()
        resume_at = time.monotonic() + pause_s
        if resume_at > self._resume_at.get(id(replica), 0.0):
            self._resume_at[id(replica)] = resume_at
            asyncio.get_running_loop().call_later(pause_s, self._take_up, replica)

    def _take_up(self, replica: ReplicaState[JudgeEndpoint]) -> None:
        left_s = self._resume_at[id(replica)] - time.monotonic()
        if left_s > 0.001:  # it was asked for a longer pause meanwhile, which has a timer of its own
            return
        replica.breaker.close()
        self._pool.grant_waiting()

    def _given_up(self, failure: Failure | None, attempts: int, elapsed_s: float) -> Failure:
        cause = self._pool.permanent_failure() or failure
        if cause is None:
            cause = next((each.breaker.cause for each in self._pool.replicas if each.breaker.cause), None)
        if cause is None:
            return Failure(RewardStatus.UNAVAILABLE, f"no answer for {elapsed_s:.1f} s, not asked again")
        if attempts < 2:
            return cause
        return replace(cause, detail=f"{cause.detail}, {attempts} attempts in {elapsed_s:.1f} s")


def estimated_tokens(body: Mapping[str, Any]) -> int:
    """Estimate the tokens that a judge reads: 4 bytes each."""
    content = "".join(str(message.get("content", "")) for message in body["messages"])
    return max(1, len(content.encode("utf-8", "replace")) // 4)


def _part(total: float | None, share: int) -> float | None:
    return None if total is None else total / share

"""Everything between lists of rollouts and the replicas of a served model; runs inside one asyncio loop.

Rows of all submits wait together. Whenever a replica has a free place, the row that has waited longest goes,
with as many neighbours by length as fit: while places are free nothing waits, and while none is, rows gather.
A row that equals one under way, or one that was scored before, is not sent. Whatever happens, a row ends in a
`RewardResult`.

From rollouts to what a served model reads, text or token ids.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from conch.config import RewardConfig
from conch.errors import RewardError, RewardInvalidError, RewardUnavailableError
from conch.log import get_logger
from conch.rewards.base import ClientStats, Counts, ServerTimes
from conch.rewards.client.cache import ModelIdentity, ScoreCache
from conch.rewards.client.health import HealthChecker
from conch.rewards.client.pool import Pool, ReplicaState
from conch.rewards.client.queue import BatchLimits, QueuedRow, RequestQueue, limits_of
from conch.rewards.client.retry import RetryingScorer
from conch.rewards.client.transport import Failure, ModelInfo, ReplicaError, ScoringRow, Transport
from conch.rewards.results import ReplyParser, name_row
from conch.rewards.token_rewards import Decode, response_bounds
from conch.types import Completion, Prompt, RewardResult, RewardStatus, Rollout

_log = get_logger(__name__)


class RewardClient:
    """One client of one served model on one server or several. All coroutines must run in the same loop.

    name: how messages call the model with its servers.
    """

    def __init__(
        self,
        name: str,
        replicas: Sequence[Transport],
        config: RewardConfig,
        tokenizer: Tokenizer | None = None,
        decode: Decode | None = None,
    ) -> None:
        self._config = config
        self._make_row = partial(
            make_row, tokenizer=tokenizer, max_bytes=self._max_bytes, dense=config.dense, decode=decode
        )
        self._counts = Counts()
        self._identity = ModelIdentity(config.failure.on_model_change)
        self._memory = ScoreCache(config.client.cache_size)
        self._pool = Pool(name, replicas, config.client.max_in_flight)
        self._asker = RetryingScorer(self._pool, config, self._identity, self._counts, self._memory)
        self._keeper = HealthChecker(self._asker, self._probe)
        self._waiting = RequestQueue()
        self._under_way: dict[ScoringRow, QueuedRow] = {}
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._broken = ""

    @property
    def requests(self) -> int:
        """See `ClientStats`."""
        return self._counts.requests

    @property
    def retries(self) -> int:
        """See `ClientStats`."""
        return sum(self._counts.retries.values())

    @property
    def model_change(self) -> str:
        """See `ReportsTraffic`."""
        return self._identity.change

    def traffic(self) -> ClientStats:
        """See `ReportsTraffic`. May be called from any thread."""
        most, self._pool.most_in_flight = self._pool.most_in_flight, self._pool.in_flight
        retries = dict(self._counts.retries)
        return ClientStats(
            requests=self._counts.requests,
            retries=sum(retries.values()),
            retries_by=retries,
            deduplicated=self._counts.deduplicated,
            replica_faults=self._counts.replica_faults,
            most_in_flight=most,
        )

    async def server_times(self) -> ServerTimes:
        """See `ReportsTraffic`."""
        links = self._pool.usable()
        timeout_s = self._config.client.request_timeout_s
        gained = await asyncio.gather(*(self._keeper.gained(link, timeout_s) for link in links))
        return ServerTimes(
            sum(each.requests for each in gained),
            sum(each.queue_s for each in gained),
            sum(each.compute_s for each in gained),
        )

    async def check(self) -> None:
        """Ask every replica for its model and one score, within `deadline_s`; see `TritonReward.check`."""
        links = self._pool.links
        problems = await asyncio.gather(*(self._problem(link) for link in links))
        found = [problem for problem in problems if problem is not None]
        misfits = [problem for problem in found if isinstance(problem, RewardInvalidError)]
        if misfits or len(found) == len(links):
            error = _joined(misfits or found, len(links))
            del problems, found, misfits
            try:
                raise error
            finally:  # else the error would hold this frame and the frame the error, connections and all
                del error
        for problem in found:
            _log.warning("one of %d replicas cannot be used yet: %s", len(links), problem)

    async def score(self, rollouts: Sequence[Rollout]) -> list[RewardResult]:
        """One result per rollout, in order."""
        if not rollouts:
            return []
        self._start()
        submitted = time.monotonic()
        failure = await self._unreachable(submitted)
        if failure is not None:
            call = ReplyParser(
                self._pool.name,
                [rollout.sample for rollout in rollouts],
                self._pool.model,
                latency_s=time.monotonic() - submitted,
            )
            return call.failed(failure.status, f"{self._pool.name}: {failure.detail}")
        fresh: dict[ScoringRow, QueuedRow] = {}
        results = [self._ask_for(place, rollout, submitted, fresh) for place, rollout in enumerate(rollouts)]
        self._under_way.update(fresh)
        self._waiting.add(list(fresh.values()))
        await asyncio.wait(set(results))  # unlike `gather`, it leaves rows of others alone when cancelled
        return [result.result() for result in results]

    async def close(self) -> None:
        """Close the connections; the tasks are ended by whoever runs the loop."""
        for link in self._pool.links:
            await link.replica.close()

    async def _problem(self, link: ReplicaState) -> RewardError | None:
        """Why a replica cannot be used; None once it is in use."""
        deadline = time.monotonic() + self._config.client.deadline_s
        # Four requests: server live, model ready, configuration, one score.
        timeout_s = min(self._config.client.request_timeout_s, self._config.client.deadline_s / 4)
        failure: Failure | None = None
        try:
            await link.replica.check(timeout_s)
        except RewardError as error:
            link.breaker.probe_failed(Failure(RewardStatus.UNAVAILABLE, str(error), retryable=True))
            return error.with_traceback(None)
        while failure is None or (failure.retryable and time.monotonic() < deadline):
            try:
                await self._keeper.reach(link, timeout_s, with_score=True)
                return None
            except ReplicaError as error:
                failure = error.failure
            await asyncio.sleep(link.breaker.pause_s(urgent=True))
            link.breaker.probe_failed(failure)
        kind = RewardUnavailableError if failure.status.is_infrastructure else RewardInvalidError
        return kind(failure.detail)

    def _start(self) -> None:
        if not self._tasks:
            for link in self._pool.links:
                self._spawn(self._keeper.keep(link))
            self._spawn(self._dispatch())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself holds no task fast
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """One that fails is a mistake of ours or of a transport: without it, others would wait for ever."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        _log.error("%s: the client broke", self._pool.name, exc_info=error)
        self._broken = self._told(error)
        waiting = self._waiting.all()
        self._waiting.drop(waiting)
        for job in waiting:
            self._end(job, self._no_score(self._broken))

    def _told(self, error: BaseException) -> str:
        return f"{self._pool.name}: the client broke: {type(error).__name__}: {error}"

    def _no_score(self, detail: str) -> RewardResult:
        return RewardResult(RewardStatus.INVALID, model=self._pool.model, detail=detail)

    async def _unreachable(self, submitted: float) -> Failure | None:
        """Why no replica was ever reached; None once one was, since what it takes is then known."""
        if self._infos():
            return None
        link = await self._pool.acquire(self._config.client.deadline_s)
        if link is None:
            return self._asker.give_up(submitted, None, 0)
        self._pool.release(link)
        return None

    def _infos(self) -> list[ModelInfo]:
        return [link.info for link in self._pool.links if link.info is not None]

    def _ask_for(
        self, position: int, rollout: Rollout, submitted: float, fresh: dict[ScoringRow, QueuedRow]
    ) -> asyncio.Future[RewardResult]:
        """The future result of one rollout; a row that has to be sent is added to `fresh`."""
        row = self._row(position, rollout)
        if isinstance(row, RewardResult):
            return _done(row)
        if (known := self._memory.find(row)) is not None:
            self._counts.deduplicated += 1
            return _done(known)
        job = self._under_way.get(row) or fresh.get(row)
        if job is not None:
            self._counts.deduplicated += 1
            return job.done
        fresh[row] = job = QueuedRow(
            row, next(self._numbers), submitted, asyncio.get_running_loop().create_future()
        )
        return job.done

    def _row(self, position: int, rollout: Rollout) -> ScoringRow | RewardResult:
        infos = self._infos()
        lengths = [info.max_length for info in infos if info.max_length]
        info = replace(infos[0], max_length=min(lengths, default=0))
        if problem := self._broken or self.model_change:
            return self._no_score(problem)
        made = self._make_row(rollout, position, info)
        if isinstance(made, ScoringRow):
            return made
        return self._no_score(f"{self._pool.name}: {name_row(position, rollout.sample)} {made}")

    def _probe(self, info: ModelInfo) -> ScoringRow:
        made = self._make_row(PROBE, 0, info)
        if isinstance(made, str):
            raise ReplicaError(Failure(RewardStatus.INVALID, f"a probe sample {made}"))
        return made

    @property
    def _max_bytes(self) -> int:
        return int(self._config.client.max_request_mb * 1e6)

    async def _dispatch(self) -> None:
        while True:
            await self._waiting.filled()
            await asyncio.sleep(0)  # what was submitted together arrives together
            link = await self._pool.acquire(self._patience_s())
            if link is None:
                self._give_up()
                continue
            # Replicas that have nothing to do either get a like share of what there is.
            jobs = self._waiting.take(self._limits(), share=1 / (1 + self._pool.idle()))
            if jobs:
                self._spawn(self._settle(jobs, link))
            else:
                self._pool.release(link)

    def _limits(self) -> BatchLimits:
        config = self._config.client
        return limits_of(self._infos(), config.batch_rows, config.batch_tokens, self._max_bytes)

    def _time_up(self, job: QueuedRow) -> float:
        return max(job.submitted, self._asker.last_answer) + self._config.client.deadline_s

    def _patience_s(self) -> float:
        oldest = self._waiting.oldest
        return self._time_up(oldest) - time.monotonic() if oldest is not None else 0.0

    def _give_up(self) -> None:
        """Fail what waits for replicas of which none has given a sign of life for `deadline_s`."""
        now, is_hopeless = time.monotonic(), self._pool.hopeless() is not None
        over = [job for job in self._waiting.all() if is_hopeless or self._time_up(job) <= now]
        self._waiting.drop(over)
        for job in over:
            since = min(now, max(job.submitted, self._asker.last_answer))
            failure = self._asker.give_up(since, None, 0)
            call = ReplyParser(
                self._pool.name, [job.row.sample], self._pool.model, latency_s=now - job.submitted
            )
            self._end(job, *call.failed(failure.status, f"{self._pool.name}: {failure.detail}"))

    async def _settle(self, jobs: list[QueuedRow], link: ReplicaState) -> None:
        rows = [job.row for job in jobs]
        try:
            results = await self._asker.settle(rows, link, max(job.submitted for job in jobs))
        except Exception as error:  # a mistake of ours or of a transport: whoever waits must hear of it
            _log.exception("%s: a request could not be dealt with", self._pool.name)
            results = [self._no_score(self._told(error))] * len(jobs)
        for job, result in zip(jobs, results, strict=True):
            self._end(job, result)

    def _end(self, job: QueuedRow, result: RewardResult) -> None:
        del self._under_way[job.row]
        if not job.done.done():
            job.done.set_result(result)


def _done(result: RewardResult) -> asyncio.Future[RewardResult]:
    future: asyncio.Future[RewardResult] = asyncio.get_running_loop().create_future()
    future.set_result(result)
    return future


def _joined(problems: Sequence[RewardError], replicas: int) -> RewardError:
    """One error of all that is wrong."""
    if replicas == 1:
        return problems[0]
    told = "; ".join(dict.fromkeys(str(problem) for problem in problems))
    return type(problems[0])(f"{len(problems)} of {replicas} replicas cannot be used: {told}")


# One token or letter that any vocabulary has; only whether it is scored matters, not how.
PROBE = Rollout(Prompt("a", (1,)), Completion("", (), (), "length"), policy_version=0)

Tokenizer = Callable[[str], list[int]]


def make_row(
    rollout: Rollout,
    position: int,
    info: ModelInfo,
    tokenizer: Tokenizer | None,
    max_bytes: int,
    *,
    dense: bool = False,
    decode: Decode | None = None,
) -> ScoringRow | str:
    """The row, or why the sample cannot be sent.

    tokenizer: makes a sample's ids for models that take tokens; None sends the sampled ids as they are.
    dense: whether the row's tokens are to get rewards of their own; models that take text need `decode` then.
    """
    sample = rollout.sample
    try:
        sample.encode("utf-8")
        ids = _token_ids(rollout, tokenizer) if info.takes_tokens else ()
        bounds = response_bounds(rollout, None if info.takes_tokens else decode) if dense else ()
    except Exception as error:  # the tokenizer is the user's: whatever it raises is about this sample
        return f"cannot be encoded: {type(error).__name__}: {error}"
    if dense and not info.takes_tokens and decode is None:
        return "cannot get dense scores: its tokens have no places in the text unless `decode` is given"
    if info.takes_tokens and not ids:
        return "has no tokens"
    if info.max_length and len(ids) > info.max_length:
        return f"has {len(ids)} tokens, the model takes {info.max_length} at most"
    row = ScoringRow(sample, ids, bounds, position)
    if row.size > max_bytes:
        return f"takes {row.size / 1e6:.1f} MB, more than reward.client.max_request_mb={max_bytes / 1e6:g}"
    return row


def _token_ids(rollout: Rollout, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    if tokenizer is not None:
        return tuple(tokenizer(rollout.sample))
    return rollout.prompt.token_ids + rollout.completion.token_ids

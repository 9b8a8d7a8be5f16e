"""Client of one served model on one server or several; runs inside one asyncio loop.

    score           rollouts become rows; a row that equals one under way, or one in the cache, is not sent
    _dispatch       a replica with a free place gets the next batch of the queue
    _score_batch    the batch's results end the futures that `score` waits for

Rows of all submits wait in one queue. Whenever a replica has a free place, the row that has waited longest
goes, with as many neighbours by length as fit: while places are free nothing waits, and while none is, rows
gather. Whatever happens, a row ends in a `RewardResult`.
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
from conch.rewards.base import ClientStats, ServerTimes
from conch.rewards.client.cache import ModelIdentity, ScoreCache
from conch.rewards.client.health import HealthChecker
from conch.rewards.client.pool import Pool, ReplicaState
from conch.rewards.client.queue import QueuedRow, RequestQueue, limits_of
from conch.rewards.client.retry import RequestCounts, RetryingScorer
from conch.rewards.client.transport import FIRST_TEXT, Failure, ModelInfo, ReplicaError, ScoringRow, Transport
from conch.rewards.results import ReplyParser, name_row
from conch.rewards.token_rewards import Decode, response_bounds
from conch.triton.dialogues import dialogue_json
from conch.types import Completion, Dialogue, Prompt, RewardResult, RewardStatus, Rollout

_log = get_logger(__name__)

Tokenizer = Callable[[str], list[int]]

# One token or letter that any vocabulary has; only whether it is scored matters, not how.
_PROBE_DIALOGUE = Dialogue(tuple({"role": role, "content": "a"} for role in ("user", "assistant")))
PROBE = Rollout(
    Prompt("a", (1,), dialogue=_PROBE_DIALOGUE), Completion("", (), (), "length"), policy_version=0
)
# Of a completion alone any measure must say something, also one of sentences.
OUTPUT_PROBE = Rollout(Prompt("a", (1,)), Completion(FIRST_TEXT, (), (), "length"), policy_version=0)

_NO_DIALOGUE = (
    "is a text, and the model reads dialogues: give prompts as lists of messages, or convert the model with "
    "--template '{text}'"
)


class RewardClient:
    """Scores rollouts with the replicas of one model. All coroutines must run in the same loop.

    name: the model with its servers, in messages.
    transports: one per server.
    tokenizer: makes a sample's ids for models that take tokens; None sends the sampled ids as they are.
    decode: the policy's ids -> text, for dense rewards of models that take text.
    """

    def __init__(
        self,
        name: str,
        transports: Sequence[Transport],
        config: RewardConfig,
        tokenizer: Tokenizer | None = None,
        decode: Decode | None = None,
    ) -> None:
        self._config = config.client
        self._max_bytes = int(config.client.max_request_mb * 1e6)
        self._make_row = partial(
            make_row, tokenizer=tokenizer, max_bytes=self._max_bytes, dense=config.dense, decode=decode
        )
        self._counts = RequestCounts()
        self._identity = ModelIdentity(config.failure.on_model_change)
        self._cache = ScoreCache(config.client.cache_size)
        self._pool = Pool(name, transports, config.client.max_in_flight)
        self._scorer = RetryingScorer(
            self._pool, config.client, config.score_range, self._identity, self._counts, self._cache
        )
        self._health = HealthChecker(self._scorer, self._probe_row)
        self._queue = RequestQueue()
        self._under_way: dict[ScoringRow, QueuedRow] = {}
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._broken = ""

    def stats(self) -> ClientStats:
        """Snapshot of the counts; may be called from any thread."""
        most, self._pool.most_in_flight = self._pool.most_in_flight, self._pool.in_flight
        retries = dict(self._counts.retries)
        return ClientStats(
            requests=self._counts.requests,
            retries=sum(retries.values()),
            retries_by=retries,
            deduplicated=self._counts.deduplicated,
            replica_faults=self._counts.replica_faults,
            most_in_flight=most,
            model_change=self._identity.change,
        )

    async def server_statistics(self) -> ServerTimes:
        """Gain of the servers' statistics since the last call, summed over the replicas."""
        replicas, timeout_s = self._pool.usable(), self._config.request_timeout_s
        gains = await asyncio.gather(*(self._health.statistics_gain(each, timeout_s) for each in replicas))
        return ServerTimes(
            sum(gain.requests for gain in gains),
            sum(gain.queue_s for gain in gains),
            sum(gain.compute_s for gain in gains),
        )

    async def check(self) -> None:
        """Ask every replica for its model and one score, within `deadline_s`.

        Raises:
            RewardInvalidError: a replica serves no reward model, or another one than the others.
            RewardUnavailableError: no replica can be used.
        """
        replicas = self._pool.replicas
        checks = await asyncio.gather(*(self._problem(replica) for replica in replicas))
        problems = [problem for problem in checks if problem is not None]
        misfits = [problem for problem in problems if isinstance(problem, RewardInvalidError)]
        if misfits or len(problems) == len(replicas):
            error = _joined(misfits or problems, len(replicas))
            del checks, problems, misfits
            try:
                raise error
            finally:  # else the error would hold this frame and the frame the error, connections and all
                del error
        for problem in problems:
            _log.warning("one of %d replicas cannot be used yet: %s", len(replicas), problem)

    async def is_ready(self) -> bool:
        """Whether a replica gives a score now, within `request_timeout_s`; one that does not leaves use."""
        self._start()  # what brings replicas back into use
        return any(await asyncio.gather(*(self._health.answers(each) for each in self._pool.usable())))

    @property
    def has_info(self) -> bool:
        """Whether a replica has told what the model takes."""
        return bool(self._infos())

    def info(self) -> ModelInfo:
        """What the model takes, once `check` has asked a replica."""
        infos = self._infos()
        assert infos, "checked before"
        return infos[0]

    async def score(self, rollouts: Sequence[Rollout]) -> list[RewardResult]:
        """Return one result per rollout, in order."""
        if not rollouts:
            return []
        self._start()
        submitted = time.monotonic()
        failure = await self._unreachable(submitted)
        if failure is not None:
            parser = ReplyParser(
                self._pool.name,
                [rollout.sample for rollout in rollouts],
                self._pool.model,
                latency_s=time.monotonic() - submitted,
            )
            return parser.failures(failure.status, f"{self._pool.name}: {failure.detail}")
        new: dict[ScoringRow, QueuedRow] = {}
        results = [
            self._result_of(position, rollout, submitted, new) for position, rollout in enumerate(rollouts)
        ]
        self._under_way.update(new)
        self._queue.add(list(new.values()))
        await asyncio.wait(set(results))  # unlike `gather`, it leaves rows of others alone when cancelled
        return [result.result() for result in results]

    async def close(self) -> None:
        """Close the connections; the thread that runs the loop ends the tasks."""
        for replica in self._pool.replicas:
            await replica.transport.close()

    async def _problem(self, replica: ReplicaState[Transport]) -> RewardError | None:
        """Bring a replica into use; the reason if that fails, else None."""
        deadline = time.monotonic() + self._config.deadline_s
        # Four requests: server live, model ready, configuration, one score.
        timeout_s = min(self._config.request_timeout_s, self._config.deadline_s / 4)
        failure: Failure | None = None
        try:
            await replica.transport.check(timeout_s)
        except RewardError as error:
            down = Failure(RewardStatus.UNAVAILABLE, str(error), retryable=True)
            replica.breaker.record_probe_failure(down)
            return error.with_traceback(None)
        while failure is None or (failure.retryable and time.monotonic() < deadline):
            try:
                await self._health.connect(replica, timeout_s, with_score=True)
                return None
            except ReplicaError as error:
                failure = error.failure
            pause_s = max(replica.breaker.pause_s(urgent=True), failure.retry_after_s)
            await asyncio.sleep(min(pause_s, max(0.0, deadline - time.monotonic())))
            replica.breaker.record_probe_failure(failure)
        kind = RewardUnavailableError if failure.status.is_infrastructure else RewardInvalidError
        return kind(failure.detail)

    def _start(self) -> None:
        if not self._tasks:
            for replica in self._pool.replicas:
                self._spawn(self._health.watch(replica))
            self._spawn(self._dispatch())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself keeps no reference to a task
        task.add_done_callback(self._on_task_end)

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        """A task that fails is a mistake of ours or of a transport: without it, rows would wait for ever."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        _log.error("%s: the client broke", self._pool.name, exc_info=error)
        self._broken = self._break_message(error)
        rows = self._queue.all()
        self._queue.remove(rows)
        for queued in rows:
            self._finish(queued, self._invalid(self._broken))

    def _break_message(self, error: BaseException) -> str:
        return f"{self._pool.name}: the client broke: {type(error).__name__}: {error}"

    def _invalid(self, detail: str) -> RewardResult:
        return RewardResult(RewardStatus.INVALID, model=self._pool.model, detail=detail)

    async def _unreachable(self, submitted: float) -> Failure | None:
        """The failure if no replica was ever reached; None once one was, since its model is then known."""
        if self._infos():
            return None
        replica = await self._pool.acquire(self._config.deadline_s)
        if replica is None:
            return self._scorer.deadline_failure(submitted, None, requests=0)
        self._pool.release(replica)
        return None

    def _infos(self) -> list[ModelInfo]:
        return [replica.info for replica in self._pool.replicas if replica.info is not None]

    def _result_of(
        self, position: int, rollout: Rollout, submitted: float, new: dict[ScoringRow, QueuedRow]
    ) -> asyncio.Future[RewardResult]:
        """The future result of one rollout.

        new: gets the row if it has to be sent.
        """
        row = self._row(position, rollout)
        if isinstance(row, RewardResult):
            return _done(row)
        if (cached := self._cache.get(row)) is not None:
            self._counts.deduplicated += 1
            return _done(cached)
        queued = self._under_way.get(row) or new.get(row)
        if queued is not None:
            self._counts.deduplicated += 1
            return queued.result
        result = asyncio.get_running_loop().create_future()
        new[row] = QueuedRow(row, next(self._numbers), submitted, result)
        return result

    def _row(self, position: int, rollout: Rollout) -> ScoringRow | RewardResult:
        """The rollout as a row; the failure if it cannot be sent."""
        infos = self._infos()
        lengths = [info.max_length for info in infos if info.max_length]
        info = replace(infos[0], max_length=min(lengths, default=0))
        if problem := self._broken or self._identity.change:
            return self._invalid(problem)
        row = self._make_row(rollout, position, info)
        if isinstance(row, ScoringRow):
            return row
        return self._invalid(f"{self._pool.name}: {name_row(position, rollout.sample)} {row}")

    def _probe_row(self, info: ModelInfo) -> ScoringRow:
        row = self._make_row(OUTPUT_PROBE if info.reads == "outputs" else PROBE, 0, info)
        if isinstance(row, str):
            raise ReplicaError(Failure(RewardStatus.INVALID, f"a probe sample {row}"))
        return row

    async def _dispatch(self) -> None:
        """Give each replica that has a free place the next batch, until cancelled."""
        while True:
            await self._queue.wait_for_row()
            await asyncio.sleep(0)  # rows that were submitted together arrive together
            oldest = self._queue.oldest
            left_s = self._deadline(oldest) - time.monotonic() if oldest is not None else 0.0
            replica = await self._pool.acquire(left_s)
            if replica is None:
                self._fail_expired()
                continue
            limits = limits_of(
                self._infos(), self._config.batch_rows, self._config.batch_tokens, self._max_bytes
            )
            # Replicas that have nothing to do either get a like share of what there is.
            batch = self._queue.next_batch(limits, share=1 / (1 + self._pool.idle()))
            if batch:
                self._spawn(self._score_batch(batch, replica))
            else:
                self._pool.release(replica)

    def _deadline(self, queued: QueuedRow) -> float:
        return max(queued.submitted, self._scorer.last_reply_at) + self._config.deadline_s

    def _fail_expired(self) -> None:
        """Fail the rows whose replicas have given no sign of life for `deadline_s`, or never will."""
        now, is_useless = time.monotonic(), self._pool.permanent_failure() is not None
        expired = [queued for queued in self._queue.all() if is_useless or self._deadline(queued) <= now]
        self._queue.remove(expired)
        for queued in expired:
            since = min(now, max(queued.submitted, self._scorer.last_reply_at))
            failure = self._scorer.deadline_failure(since, None, requests=0)
            parser = ReplyParser(
                self._pool.name, [queued.row.sample], self._pool.model, latency_s=now - queued.submitted
            )
            self._finish(queued, *parser.failures(failure.status, f"{self._pool.name}: {failure.detail}"))

    async def _score_batch(self, batch: list[QueuedRow], replica: ReplicaState[Transport]) -> None:
        rows, submitted = [queued.row for queued in batch], max(queued.submitted for queued in batch)
        try:
            results = await self._scorer.score_batch(rows, replica, submitted)
        except Exception as error:  # a mistake of ours or of a transport: the caller must hear of it
            _log.exception("%s: a request could not be dealt with", self._pool.name)
            results = [self._invalid(self._break_message(error))] * len(batch)
        for queued, result in zip(batch, results, strict=True):
            self._finish(queued, result)

    def _finish(self, queued: QueuedRow, result: RewardResult) -> None:
        del self._under_way[queued.row]
        if not queued.result.done():
            queued.result.set_result(result)


def _done(result: RewardResult) -> asyncio.Future[RewardResult]:
    future: asyncio.Future[RewardResult] = asyncio.get_running_loop().create_future()
    future.set_result(result)
    return future


def _joined(problems: Sequence[RewardError], replicas: int) -> RewardError:
    """One error with all problems."""
    if replicas == 1:
        return problems[0]
    details = "; ".join(dict.fromkeys(str(problem) for problem in problems))
    return type(problems[0])(f"{len(problems)} of {replicas} replicas cannot be used: {details}")


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
    """Make the row of a rollout, text, dialogue or token ids; or return why the sample cannot be sent.

    position: index of the rollout in its submit.
    tokenizer: makes a sample's ids for models that take tokens; None sends the sampled ids as they are.
    max_bytes: largest row.
    dense: the row's tokens get rewards of their own; models that take text need `decode` then.
    """
    sample, dialogue = rollout.sample, ""
    if info.reads == "outputs":
        # What has neither a prompt's ids nor an output is a text by itself.
        is_text = not (rollout.prompt.token_ids or rollout.completion.text)
        sample = rollout.prompt.text if is_text else rollout.completion.text
    elif not info.takes_tokens and info.reads != "texts":
        if rollout.dialogue is None and info.reads == "dialogues":
            return _NO_DIALOGUE
        try:
            dialogue = "" if rollout.dialogue is None else dialogue_json(rollout.dialogue)
        except (TypeError, ValueError) as error:
            return f"cannot be sent as messages: {error}"
    try:
        (sample + dialogue).encode("utf-8")
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
    row = ScoringRow(sample, ids, bounds, dialogue, position)
    if row.size > max_bytes:
        return f"takes {row.size / 1e6:.1f} MB, more than reward.client.max_request_mb={max_bytes / 1e6:g}"
    return row


def _token_ids(rollout: Rollout, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    if tokenizer is not None:
        return tuple(tokenizer(rollout.sample))
    return rollout.prompt.token_ids + rollout.completion.token_ids

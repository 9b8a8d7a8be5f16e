"""Everything between a list of rollouts and a Triton server's scores; runs inside one asyncio loop.

A micro-batch goes: slot -> request -> reply checks. What fails is repeated with full-jitter back-off while
that can help, and asked row by row where one bad row may have failed the whole batch. Whatever happens, a row
ends in a `RewardResult`.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from tritonclient.grpc import MAX_GRPC_MESSAGE_SIZE, InferResult
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from conch.config import RewardConfig
from conch.errors import RewardInvalidError, RewardUnavailableError
from conch.log import get_logger
from conch.rewards.endpoint import Endpoint
from conch.rewards.replica import Failure, Row
from conch.rewards.triton_check import read_spec, require_model, require_server
from conch.rewards.triton_failure import classify
from conch.rewards.triton_wire import (
    infer_inputs,
    infer_outputs,
    micro_batches,
    read_members_used,
    read_scores,
)
from conch.rewards.validate import ScoringCall, name_row
from conch.serving.spec import RewardModelSpec
from conch.serving.triton_channel import configured_access, open_aio_client
from conch.types import Completion, Prompt, RewardResult, RewardStatus, Rollout

ReplyT = TypeVar("ReplyT")

_log = get_logger(__name__)

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MAX_GRPC_MESSAGE_SIZE),
    ("grpc.max_receive_message_length", MAX_GRPC_MESSAGE_SIZE),
    # gRPC's own pauses between attempts to connect grow to 2 minutes: a server that was away for 75 s was
    # found again 32 s after its return, and with these after 0.6 s.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A proxy set for the internet does not lead to a machine of one's own cluster.
    ("grpc.enable_http_proxy", 0),
    # No keep-alive: pings below the server's 300 s make it hang up; deadlines find a frozen server sooner.
]
# One token or letter that any vocabulary has; only whether it is scored matters, not how.
_PROBE = Rollout(Prompt("a", (1,)), Completion("", (), (), "length"), policy_version=0)


class TritonSession:
    """One client of one served model. All coroutines must run in the same loop.

    requests, retries: as in `CountsTraffic`.
    """

    def __init__(
        self, endpoint: Endpoint, config: RewardConfig, tokenizer: Callable[[str], list[int]] | None
    ) -> None:
        self.requests = 0
        self.retries = 0
        self._endpoint = endpoint
        self._config = config
        self._tokenizer = tokenizer
        self._access = configured_access(config.tls, config.secret_env)
        self._who = f"reward model `{endpoint.model}` at {endpoint.address}"
        self._slots = asyncio.Semaphore(config.max_in_flight)
        self._opening = asyncio.Lock()
        self._client: InferenceServerClient | None = None
        self._spec: RewardModelSpec | None = None
        self._last_answer = -math.inf
        self._members_used = -1  # in the latest reply

    async def check(self) -> None:
        """Ask for server, model, its config and one score, within `deadline_s`; see `TritonReward.check`."""
        started = time.monotonic()
        client = self._connect()
        timeout_s = min(self._config.attempt_timeout_s, self._config.deadline_s / 4)  # four questions
        await require_server(client, self._endpoint, timeout_s, self._access)
        await require_model(client, self._endpoint, timeout_s, self._access)
        try:
            self._spec = await read_spec(client, self._endpoint, timeout_s)
        except InferenceServerException as error:
            detail = classify(error).detail
            raise RewardUnavailableError(f"{self._who} does not tell its configuration: {detail}") from error
        row = self._row(0, _PROBE, self._spec)
        result = row if isinstance(row, RewardResult) else (await self._ask([row], self._spec, started))[0]
        if not result.ok:
            kind = RewardUnavailableError if result.status.is_infrastructure else RewardInvalidError
            raise kind(f"a probe sample was not scored: {result.detail}")

    async def score(self, rollouts: Sequence[Rollout]) -> list[RewardResult]:
        """One result per rollout, in order; equal samples are sent once."""
        if not rollouts:
            return []
        submitted = time.monotonic()
        spec = await self._known_spec(submitted)
        if isinstance(spec, Failure):
            samples = [rollout.sample for rollout in rollouts]
            call = ScoringCall(
                self._who, samples, self._endpoint.model, latency_s=time.monotonic() - submitted
            )
            return call.failed(spec.status, f"{self._who}: {spec.detail}")
        rows = [self._row(position, rollout, spec) for position, rollout in enumerate(rollouts)]
        distinct = list(dict.fromkeys(row for row in rows if isinstance(row, Row)))
        scored = await self._score_distinct(distinct, spec, submitted)
        return [scored[row] if isinstance(row, Row) else row for row in rows]

    async def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            await self._client.close()

    def _connect(self) -> InferenceServerClient:
        # Made at first use because a channel belongs to the loop it is made in.
        if self._client is None:
            self._client = open_aio_client(self._endpoint.address, self._access, _CHANNEL_OPTIONS)
        return self._client

    async def _known_spec(self, submitted: float) -> RewardModelSpec | Failure:
        async with self._opening:
            if self._spec is None:
                client = self._connect()
                try:
                    spec = await self._persist(
                        lambda left: read_spec(client, self._endpoint, left), submitted
                    )
                except RewardInvalidError as error:
                    return Failure(RewardStatus.INVALID, str(error))
                if isinstance(spec, Failure):
                    return spec
                self._spec = spec
            return self._spec

    def _row(self, position: int, rollout: Rollout, spec: RewardModelSpec) -> Row | RewardResult:
        """The rollout as the model takes it, or the result that says why it cannot be sent."""
        sample = rollout.sample
        try:
            sample.encode("utf-8")
            ids = self._token_ids(rollout) if spec.form == "token" else ()
        except Exception as error:  # the tokenizer is the user's: whatever it raises is about this sample
            return self._unfit(position, sample, f"cannot be encoded: {type(error).__name__}: {error}")
        if spec.form == "token" and not ids:
            return self._unfit(position, sample, "has no tokens")
        if spec.max_length and len(ids) > spec.max_length:
            return self._unfit(
                position, sample, f"has {len(ids)} tokens, the model takes {spec.max_length} at most"
            )
        return Row(sample, ids, position)

    def _token_ids(self, rollout: Rollout) -> tuple[int, ...]:
        if self._tokenizer is not None:
            return tuple(self._tokenizer(rollout.sample))
        return rollout.prompt.token_ids + rollout.completion.token_ids

    def _unfit(self, position: int, sample: str, problem: str) -> RewardResult:
        detail = f"{self._who}: {name_row(position, sample)} {problem}"
        return RewardResult(RewardStatus.INVALID, model=self._endpoint.model, detail=detail)

    async def _score_distinct(
        self, rows: Sequence[Row], spec: RewardModelSpec, submitted: float
    ) -> dict[Row, RewardResult]:
        limit = min(self._config.micro_batch_size, spec.max_batch_size)
        batches = [[rows[index] for index in batch] for batch in micro_batches(rows, limit, spec)]
        replies = await asyncio.gather(*(self._ask_in_slot(batch, spec, submitted) for batch in batches))
        pairs = zip(batches, replies, strict=True)
        return {row: result for batch, results in pairs for row, result in zip(batch, results, strict=True)}

    async def _ask_in_slot(
        self, rows: list[Row], spec: RewardModelSpec, submitted: float
    ) -> list[RewardResult]:
        async with self._slots:
            return await self._ask(rows, spec, submitted)

    async def _ask(self, rows: list[Row], spec: RewardModelSpec, submitted: float) -> list[RewardResult]:
        """Score one micro-batch; where one bad row may have failed it, each row by itself."""
        started = time.monotonic()
        client, inputs, outputs = self._connect(), infer_inputs(rows, spec), infer_outputs(spec)

        async def attempt(timeout_s: float) -> InferResult:
            reply = await client.infer(
                self._endpoint.model, inputs, outputs=outputs, client_timeout=timeout_s
            )
            assert reply is not None  # tritonclient returns a reply or raises
            return reply

        reply = await self._persist(attempt, submitted)
        if isinstance(reply, Failure) and reply.maybe_one_row and len(rows) > 1:
            return [(await self._ask([row], spec, submitted))[0] for row in rows]
        call = ScoringCall(
            self._who,
            [row.sample for row in rows],
            self._endpoint.model,
            version="" if isinstance(reply, Failure) else reply.get_response().model_version,
            latency_s=time.monotonic() - started,
            positions=[row.position for row in rows],
        )
        if isinstance(reply, Failure):
            # Of a row that was refused alone the server says "row 0"; the caller's number is of more use.
            where = f" refused {name_row(rows[0].position, rows[0].sample)}" if reply.maybe_one_row else ""
            return call.failed(reply.status, f"{self._who}{where}: {reply.detail}")
        try:
            results = call.read_columns(read_scores(reply, len(rows), spec))
            return self._told_of_members(results, read_members_used(reply, len(rows), spec), spec)
        except RewardInvalidError as error:
            return call.failed(RewardStatus.INVALID, f"{self._who}: {error}")

    def _told_of_members(
        self, results: list[RewardResult], members_used: list[int], spec: RewardModelSpec
    ) -> list[RewardResult]:
        """The results of an ensemble, those with a note in `detail` that not all members stand behind."""
        fewest = min(members_used, default=len(spec.members))
        if fewest != self._members_used and fewest < len(spec.members):
            _log.warning("%s: only %d of %d members score", self._who, fewest, len(spec.members))
        self._members_used = fewest
        return [
            replace(result, detail=f"scored by {used} of {len(spec.members)} members")
            if used < len(spec.members) and result.ok
            else result
            for result, used in zip(results, members_used or [len(spec.members)] * len(results), strict=True)
        ]

    async def _persist(
        self, attempt: Callable[[float], Awaitable[ReplyT]], submitted: float
    ) -> ReplyT | Failure:
        """Call `attempt(timeout_s)` until it answers, repeating cannot help, or the deadline is reached.

        The deadline counts from the first attempt, or from the server's last sign of life after `submitted`
        if that was earlier: when the server is gone, what queues for a slot gives up with what went before.
        """
        started = time.monotonic()
        alive = max(submitted, self._last_answer)
        deadline = min(started, alive) + self._config.deadline_s
        failure = Failure(RewardStatus.UNAVAILABLE, f"no answer for {started - alive:.1f} s, not asked again")
        attempts = 0
        while (left := deadline - time.monotonic()) > 0:
            self.retries += attempts > 0
            reply = await self._try(attempt, min(self._config.attempt_timeout_s, left))
            if not isinstance(reply, Failure):
                return reply
            attempts, failure = attempts + 1, reply
            if not failure.retryable:
                return failure
            await asyncio.sleep(min(_pause_s(attempts), max(0.0, deadline - time.monotonic())))
        if attempts < 2:
            return failure
        elapsed = time.monotonic() - started
        return replace(failure, detail=f"{failure.detail}, {attempts} attempts in {elapsed:.1f} s")

    async def _try(self, attempt: Callable[[float], Awaitable[ReplyT]], timeout_s: float) -> ReplyT | Failure:
        self.requests += 1
        try:
            reply = await attempt(timeout_s)
        except InferenceServerException as error:
            failure = classify(error)
            if not failure.status.is_infrastructure:
                self._last_answer = time.monotonic()
            return failure
        self._last_answer = time.monotonic()
        return reply


def _pause_s(attempts: int) -> float:
    # Full jitter: ranks that failed together must not come back together.
    return random.uniform(0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(attempts - 1, 10)))

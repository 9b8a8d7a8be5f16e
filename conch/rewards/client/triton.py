"""One Triton server that is asked for scores over gRPC; see `Replica`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tritonclient.grpc import MAX_GRPC_MESSAGE_SIZE
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from conch.addresses import Endpoint
from conch.errors import RewardInvalidError, ServingError
from conch.log import get_logger
from conch.rewards.base import ServerTimes
from conch.rewards.client.transport import Failure, ModelInfo, ReplicaError, Reply, ScoringRow
from conch.rewards.client.triton_errors import classify, require_model, require_server
from conch.rewards.client.triton_messages import (
    Steps,
    infer_inputs,
    infer_outputs,
    read_members_used,
    read_scores,
    read_steps,
)
from conch.rewards.token_rewards import token_scores
from conch.triton.channel import Access, open_aio_client
from conch.triton.config_pbtxt import spec_from_model_config
from conch.triton.contract import RewardModelSpec
from conch.types import RewardStatus

_log = get_logger(__name__)

ReplyT = TypeVar("ReplyT")

# Back ends in C++ put requests into one batch only if they are equally long.
_BUCKET = 64
_NOT_DENSE = (
    "{} gives one score a sample, and reward.dense wants those of its steps or tokens: convert it with "
    "--granularity step or token, or set reward.dense=false"
)
# gRPC's own thread reports the end of a cancelled call a moment later, and complains if the loop is closed.
_LAST_EVENTS_S = 0.1
_UNACKNOWLEDGED_MS = 10_000


@dataclass(slots=True)
class _Line:
    """A connection, the requests that are on it, and when (monotonic clock) it last carried a reply."""

    client: InferenceServerClient
    in_flight: int = 0
    last_reply: float = 0.0


class TritonReplica:
    """The model of one server. `name` and `model` as in `Replica`.

    A connection may die without a word: its machine vanished, or a firewall forgot it. gRPC would go on using
    it for ever, so one on which a request timed out, and nothing came meanwhile, is left for a new one.

    dense: whether the scores of steps or tokens are asked for; rows have `bounds` then.
    """

    def __init__(
        self, endpoint: Endpoint, access: Access, connect_timeout_s: float, *, dense: bool = False
    ) -> None:
        self.name = f"reward model `{endpoint.model}` at {endpoint.address}"
        self.model = endpoint.model
        self._endpoint = endpoint
        self._access = access
        self._dense = dense
        self._options = _channel_options(connect_timeout_s)
        self._line: _Line | None = None
        self._left: list[_Line] = []
        self._spec: RewardModelSpec | None = None
        self._bucket = 1
        self._was_cut_short = False
        self._members_used = 0

    async def check(self, timeout_s: float) -> None:
        """See `Replica.check`."""
        await require_server(self._connect().client, self._endpoint, timeout_s, self._access)
        await require_model(self._connect().client, self._endpoint, timeout_s, self._access)

    async def open(self, timeout_s: float) -> ModelInfo:
        """See `Replica.open`."""
        reply: Any = await self._asked(
            lambda client: client.get_model_config(self._endpoint.model, client_timeout=timeout_s)
        )
        try:
            spec = spec_from_model_config(reply.config)
        except ServingError as error:
            raise ReplicaError(
                Failure(RewardStatus.INVALID, f"what {self._endpoint.address} serves cannot score: {error}")
            ) from error
        if self._dense and not spec.is_dense:
            raise ReplicaError(Failure(RewardStatus.INVALID, _NOT_DENSE.format(self.name)))
        self._spec, self._bucket = spec, _bucket(reply.config, spec)
        return ModelInfo(
            takes_tokens=spec.form == "token",
            reward_names=spec.reward_names,
            max_rows=spec.max_batch_size,
            max_length=spec.max_length,
            # A token-form model without a mask cannot tell padding from text.
            mixes_lengths=spec.form == "text" or spec.takes_attention_mask,
            pad_to=self._bucket,
            content=spec.content_sha256,
        )

    async def ask(self, rows: Sequence[ScoringRow], timeout_s: float) -> Reply:
        """See `Replica.ask`."""
        spec = self._spec
        assert spec is not None, "opened before"
        inputs, outputs = infer_inputs(rows, spec, self._bucket), infer_outputs(spec, self._dense)
        reply = await self._asked(
            lambda client: client.infer(
                self._endpoint.model, inputs, outputs=outputs, client_timeout=timeout_s
            )
        )
        assert reply is not None  # tritonclient returns a reply or raises
        try:
            columns = read_scores(reply, len(rows), spec)
            used = read_members_used(reply, len(rows), spec)
            placed = _placed(rows, read_steps(reply, rows, spec), spec) if self._dense else []
        except RewardInvalidError as error:
            raise ReplicaError(Failure(RewardStatus.INVALID, str(error), maybe_one_row=True)) from error
        self._warn_of_members(min(used, default=0), len(spec.members))
        version = reply.get_response().model_version
        return Reply(columns, version, _notes(used, len(spec.members)), placed)

    async def times(self, timeout_s: float) -> ServerTimes | None:
        """See `Replica.times`."""
        reply: Any = await self._asked(
            lambda client: client.get_inference_statistics(self._endpoint.model, client_timeout=timeout_s)
        )
        stats = [entry.inference_stats for entry in reply.model_stats]
        return ServerTimes(
            requests=sum(each.success.count for each in stats),
            queue_s=sum(each.queue.ns for each in stats) / 1e9,
            compute_s=sum(
                each.compute_input.ns + each.compute_infer.ns + each.compute_output.ns for each in stats
            )
            / 1e9,
        )

    async def close(self) -> None:
        """See `Replica.close`."""
        lines, self._left = self._left, []
        if self._line is not None:
            lines.append(self._line)
        for line in lines:
            await line.client.close()
        if self._was_cut_short:
            await asyncio.sleep(_LAST_EVENTS_S)

    def _warn_of_members(self, used: int, members: int) -> None:
        if used < members and used != self._members_used:
            _log.warning("%s: only %d of %d members score", self.name, used, members)
        self._members_used = used

    async def _asked(self, question: Callable[[InferenceServerClient], Awaitable[ReplyT]]) -> ReplyT:
        line, started = self._connect(), time.monotonic()
        line.in_flight += 1
        try:
            reply = await question(line.client)
            line.last_reply = time.monotonic()
            return reply
        except InferenceServerException as error:
            failure = classify(error)
            if failure.status is RewardStatus.TIMEOUT and line.last_reply < started:
                self._leave(line)
            raise ReplicaError(failure) from error
        except asyncio.CancelledError:
            self._was_cut_short = True
            raise
        finally:
            line.in_flight -= 1
            await self._close_what_was_left()

    def _connect(self) -> _Line:
        # Made at first use because a channel belongs to the loop it is made in.
        if self._line is None:
            self._line = _Line(open_aio_client(self._endpoint.address, self._access, self._options))
        return self._line

    def _leave(self, line: _Line) -> None:
        if self._line is line:
            self._line = None
            self._left.append(line)

    async def _close_what_was_left(self) -> None:
        """Closing cancels what is under way, so a line goes once nothing is."""
        idle = [line for line in self._left if not line.in_flight]
        self._left = [line for line in self._left if line.in_flight]
        for line in idle:
            await line.client.close()


def _placed(
    rows: Sequence[ScoringRow], steps: Sequence[Steps], spec: RewardModelSpec
) -> list[tuple[float, ...]]:
    return [
        token_scores(ends, scores, row.bounds, may_be_cut=spec.form == "text")
        for row, (ends, scores) in zip(rows, steps, strict=True)
    ]


def _channel_options(connect_timeout_s: float) -> list[tuple[str, int]]:
    return [
        ("grpc.max_send_message_length", MAX_GRPC_MESSAGE_SIZE),
        ("grpc.max_receive_message_length", MAX_GRPC_MESSAGE_SIZE),
        # gRPC's own pauses between attempts to connect grow to 2 minutes: a server that was away for 75 s was
        # found again 32 s after its return, and with these after 0.6 s.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # By its name a pause; what it sets is how long one attempt to connect may take.
        ("grpc.min_reconnect_backoff_ms", max(1, int(connect_timeout_s * 1000))),
        # Or a new channel would be given the old one's connection.
        ("grpc.use_local_subchannel_pool", 1),
        # A proxy set for the internet does not lead to a machine of one's own cluster.
        ("grpc.enable_http_proxy", 0),
        # A connection that was cut without a word (a firewall forgot it, a machine lost power) is given up
        # when what was sent went unacknowledged for so long; the kernel would go on for 15 minutes. gRPC sets
        # that limit only along with pings. Those go at most every 310 s: below 300 s servers hang up.
        ("grpc.keepalive_timeout_ms", _UNACKNOWLEDGED_MS),
        ("grpc.keepalive_time_ms", 310_000),
    ]


def _bucket(config: Any, spec: RewardModelSpec) -> int:
    """What requests are padded to a multiple of; 1 where padding gains nothing or would be read as text."""
    is_ragged = all(tensor.allow_ragged_batch for tensor in config.input)
    is_batched = config.HasField("dynamic_batching")
    is_padded = spec.form == "token" and spec.takes_attention_mask
    return _BUCKET if is_padded and is_batched and not is_ragged else 1


def _notes(used: Sequence[int], members: int) -> list[str]:
    return [f"scored by {count} of {members} members" if count < members else "" for count in used]

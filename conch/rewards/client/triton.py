"""Transport to one Triton server over gRPC."""

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
    encode,
    read_member_scores,
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
class _Connection:
    """A gRPC channel.

    in_flight: requests under way on it.
    last_reply_at: time of its latest reply, on the clock of `time.monotonic`.
    """

    client: InferenceServerClient
    in_flight: int = 0
    last_reply_at: float = 0.0


class TritonTransport:
    """The model of one server; see `Transport`.

    A connection may die without a word: its machine vanished, or a firewall forgot it. gRPC would go on using
    it for ever, so one on which a request timed out, and nothing came meanwhile, is replaced by a new one.

    dense: asks for the scores of steps or tokens; rows have `bounds` then.
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
        self._connection: _Connection | None = None
        self._old_connections: list[_Connection] = []
        self._spec: RewardModelSpec | None = None
        self._bucket = 1
        self._had_cancelled_call = False
        self._fewest_members = 0

    async def check(self, timeout_s: float) -> None:
        client = self._open_connection().client
        await require_server(client, self._endpoint, timeout_s, self._access)
        await require_model(client, self._endpoint, timeout_s, self._access)

    async def describe(self, timeout_s: float) -> ModelInfo:
        reply: Any = await self._call(
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
            reads=spec.reads if spec.form == "text" else "texts",
            special_tokens=spec.special_tokens,
            reward_names=spec.reward_names,
            max_rows=spec.max_batch_size,
            max_length=spec.max_length,
            # A token-form model without a mask cannot tell padding from text.
            mixes_lengths=spec.form == "text" or spec.takes_attention_mask,
            pad_to=self._bucket,
            content=spec.content_sha256,
        )

    async def infer(self, rows: Sequence[ScoringRow], timeout_s: float) -> Reply:
        spec = self._spec
        assert spec is not None, "described before"
        inputs, outputs = encode(rows, spec, self._bucket, dense=self._dense)
        reply = await self._call(
            lambda client: client.infer(
                self._endpoint.model, inputs, outputs=outputs, client_timeout=timeout_s
            )
        )
        assert reply is not None  # tritonclient returns a reply or raises
        try:
            columns = read_scores(reply, len(rows), spec)
            used = read_members_used(reply, len(rows), spec)
            member_scores = read_member_scores(reply, len(rows), spec)
            dense = []
            if self._dense:
                dense = [
                    token_scores(ends, scores, row.bounds, may_be_cut=spec.form == "text")
                    for row, (ends, scores) in zip(rows, read_steps(reply, rows, spec), strict=True)
                ]
        except RewardInvalidError as error:
            raise ReplicaError(Failure(RewardStatus.INVALID, str(error), maybe_one_row=True)) from error
        members = len(spec.members)
        self._warn_of_missing_members(min(used, default=0), members)
        notes = [f"scored by {count} of {members} members" if count < members else "" for count in used]
        return Reply(columns, reply.get_response().model_version, notes, dense, member_scores)

    async def server_statistics(self, timeout_s: float) -> ServerTimes | None:
        reply: Any = await self._call(
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
        connections, self._old_connections = self._old_connections, []
        if self._connection is not None:
            connections.append(self._connection)
        for connection in connections:
            await connection.client.close()
        if self._had_cancelled_call:
            await asyncio.sleep(_LAST_EVENTS_S)

    def _warn_of_missing_members(self, used: int, members: int) -> None:
        """used: fewest members that scored a row of the latest reply."""
        if used < members and used != self._fewest_members:
            _log.warning("%s: only %d of %d members score", self.name, used, members)
        self._fewest_members = used

    async def _call(self, method: Callable[[InferenceServerClient], Awaitable[ReplyT]]) -> ReplyT:
        """Await one call of the client; its errors become a `ReplicaError`."""
        connection, started = self._open_connection(), time.monotonic()
        connection.in_flight += 1
        try:
            reply = await method(connection.client)
            connection.last_reply_at = time.monotonic()
            return reply
        except InferenceServerException as error:
            failure = classify(error)
            if failure.status is RewardStatus.TIMEOUT and connection.last_reply_at < started:
                self._replace(connection)
            raise ReplicaError(failure) from error
        except asyncio.CancelledError:
            self._had_cancelled_call = True
            raise
        finally:
            connection.in_flight -= 1
            await self._close_old_connections()

    def _open_connection(self) -> _Connection:
        # Made at first use because a channel belongs to the loop it is made in.
        if self._connection is None:
            client = open_aio_client(self._endpoint.address, self._access, self._options)
            self._connection = _Connection(client)
        return self._connection

    def _replace(self, connection: _Connection) -> None:
        if self._connection is connection:
            self._connection = None
            self._old_connections.append(connection)

    async def _close_old_connections(self) -> None:
        """Closing cancels what is under way, so a connection is closed once nothing is."""
        idle = [connection for connection in self._old_connections if not connection.in_flight]
        self._old_connections = [each for each in self._old_connections if each.in_flight]
        for connection in idle:
            await connection.client.close()


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
    """Multiple that requests are padded to; 1 where padding gains nothing or would be read as text."""
    is_ragged = all(tensor.allow_ragged_batch for tensor in config.input)
    is_batched = config.HasField("dynamic_batching")
    is_padded = spec.form == "token" and spec.takes_attention_mask
    return _BUCKET if is_padded and is_batched and not is_ragged else 1

"""What a transport gives the reward client: one server of one model, asked for scores.

`TritonReplica` is the gRPC one. A transport only speaks: it sends what it is given, once, and says what came
back. Queueing, micro-batches, retries, the choice of the replica, bisection and the checks of scores are the
session's (`session.py`), the same for every transport. All methods run in one asyncio loop, which must never
be blocked; what belongs to the loop (a channel, a connection pool) is made at first use, not in `__init__`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from conch.errors import RewardError
from conch.rewards.base import ServerTimes
from conch.types import RewardStatus

_BYTES_PER_TOKEN = 4  # of UTF-8 text under a usual vocabulary; only how much goes into a request hangs on it


@dataclass(frozen=True, slots=True)
class ScoringRow:
    """One sample to score. Equal rows get equal scores.

    sample: prompt and output; can be encoded as UTF-8.
    token_ids: empty for models that take text.
    position: where the sample stands in its `submit`, for messages; no part of equality.
    bounds: where dense rewards are asked for, `dense.response_bounds`; else empty.
    """

    sample: str
    token_ids: tuple[int, ...] = ()
    bounds: tuple[int, ...] = ()
    position: int = field(default=0, compare=False)

    @property
    def tokens(self) -> int:
        """Tokens that the model reads; of a text an estimate from its size, 1 at least."""
        return len(self.token_ids) or max(1, -(-len(self.sample.encode("utf-8")) // _BYTES_PER_TOKEN))

    @property
    def size(self) -> int:
        """Bytes that it takes on the wire, about."""
        return 16 * len(self.token_ids) or 4 + len(self.sample.encode("utf-8"))

    @property
    def length(self) -> int:
        """What rows are sorted by, so that a request needs little padding: tokens, or letters."""
        return len(self.token_ids) or len(self.sample)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request got no scores.

    status: what a sample's result says if this is the last word.
    detail: for a person; names no sample by its text.
    retryable: the same request may well succeed later.
    is_down: the replica is out of order for every request (connection refused, model process dead, secret
        refused): none is sent until a probe was scored. Others count towards that only when they pile up.
    maybe_one_row: one bad row may have failed the whole request: it is bisected.
    elsewhere: another replica may do better. False where the request itself is at fault.
    """

    status: RewardStatus
    detail: str
    retryable: bool = False
    is_down: bool = False
    maybe_one_row: bool = False
    elsewhere: bool = True

    @property
    def is_lasting(self) -> bool:
        """A fault of the infrastructure that waiting does not cure."""
        return self.status.is_infrastructure and not self.retryable


class ReplicaError(RewardError):
    """A request to a replica failed; `failure` says how."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.detail)
        self.failure = failure


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a server tells about its model. Replicas of one model agree in all but the limits.

    takes_tokens: rows go as token ids, not as text.
    reward_names: objectives of every score; empty if only the replies tell.
    max_rows: most rows in a request.
    max_length: tokens that a row may have; 0 if the server does not say.
    mixes_lengths: rows of different lengths may share a request.
    pad_to: a request's rows are padded to the longest of them, rounded up to a multiple of this.
    content: hash of weights, tokenizer and template; "" if the server does not say.
    """

    takes_tokens: bool = False
    reward_names: tuple[str, ...] = ()
    max_rows: int = 64
    max_length: int = 0
    mixes_lengths: bool = True
    pad_to: int = 1
    content: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """The reply to one request.

    columns: objective -> one number per row, in their order. What is no finite number in the allowed range,
        or not one per row, is found by the session.
    version: of the model, as the reply states it; "" if it does not.
    notes: per row what a person should know of its score ("scored by 1 of 2 members"), or ""; empty for none.
    token_scores: per row one number for each token of the response, in place of `columns` where rows have
        `bounds`; empty elsewhere.
    """

    columns: Mapping[str, Sequence[float]]
    version: str = ""
    notes: Sequence[str] = ()
    token_scores: Sequence[Sequence[float]] = ()


@runtime_checkable
class Transport(Protocol):
    """One server. Every method ends within its `timeout_s`, whatever the other side does, frozen or gone.

    name: as messages call it: "reward model `walks` at 10.0.0.7:8001". No secret is in it.
    model: goes into `RewardResult.model`.
    """

    name: str
    model: str

    async def check(self, timeout_s: float) -> None:
        """Say in one clear sentence why it cannot be used: asked once, before long work.

        Raises:
            RewardError: what is wrong, where, what to do.
        """
        ...

    async def open(self, timeout_s: float) -> ModelInfo:
        """What the model is now; asked before the first request, and again after a failure or a new version.

        Raises:
            ReplicaError: no answer, or not a model that gives rewards (INVALID).
        """
        ...

    async def ask(self, rows: Sequence[ScoringRow], timeout_s: float) -> Reply:
        """Score `rows` with one request; `open` has succeeded before.

        Raises:
            ReplicaError: no reply, an error, or a reply of wrong types or shape (INVALID, `maybe_one_row`).
        """
        ...

    async def times(self, timeout_s: float) -> ServerTimes | None:
        """The server's own statistics; None if it keeps none.

        Raises:
            ReplicaError: no answer.
        """
        ...

    async def close(self) -> None:
        """Close connections. A second call does nothing."""
        ...

"""Interface between the reward client and a server: one server of one model, asked for scores.

`TritonTransport` speaks gRPC, `HttpTransport` JSON. A transport only speaks: it sends each request once and
returns the reply. Queueing, batches, retries, the choice of the replica, bisection and the checks of scores
are the client's (`client.py`), the same for every transport. All methods run in one asyncio loop, which must
never be blocked; what belongs to the loop (a channel, a connection pool) is made at first use, not in
`__init__`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from conch.errors import RewardError
from conch.rewards.base import ServerTimes
from conch.types import RewardStatus

FIRST_TEXT = "A small dog slept beside the old gate, and nobody in the village wanted to wake it."
"""A completion that any measure has a value for, also one of words and sentences: what probes send to a
server that reads completions alone."""

_BYTES_PER_TOKEN = 4  # of UTF-8 text under a usual vocabulary; decides only how much goes into a request


@dataclass(frozen=True, slots=True)
class ScoringRow:
    """One sample to score. Equal rows get equal scores.

    sample: prompt and output as one text, or the output alone where the model reads that; messages name the
        row by it; can be encoded as UTF-8.
    token_ids: empty for models that take text.
    bounds: for dense rewards, `token_rewards.response_bounds`; else empty.
    dialogue: prompt and output as messages, the JSON of `conch.triton.contract`; "" where the model reads
        texts, or where the prompt is none.
    position: index of the sample in its `submit`, for messages; no part of equality.
    """

    sample: str
    token_ids: tuple[int, ...] = ()
    bounds: tuple[int, ...] = ()
    dialogue: str = ""
    position: int = field(default=0, compare=False)

    @property
    def text(self) -> str:
        """What a text-form model is sent: the dialogue where there is one, else the sample."""
        return self.dialogue or self.sample

    @property
    def tokens(self) -> int:
        """Tokens that the model reads; of a text an estimate from its size, 1 at least."""
        return len(self.token_ids) or max(1, -(-len(self.text.encode("utf-8")) // _BYTES_PER_TOKEN))

    @property
    def size(self) -> int:
        """Approximate bytes on the wire."""
        return 16 * len(self.token_ids) or 4 + len(self.text.encode("utf-8"))

    @property
    def length(self) -> int:
        """Sort key of the queue, so that a request needs little padding: tokens, or characters."""
        return len(self.token_ids) or len(self.text)


@dataclass(frozen=True, slots=True)
class Failure:
    """Reason why a request got no scores.

    status: status of the samples if nothing else is tried.
    detail: message for a person; names no sample by its text.
    retryable: the same request may well succeed later.
    is_down: the replica is out of order for every request (connection refused, model process dead, secret
        refused): it gets none until a probe was scored. Other failures count only when they pile up.
    maybe_one_row: one bad row may have failed the whole request: it is bisected.
    elsewhere: another replica may succeed. False where the request itself is at fault.
    retry_after_s: seconds after which a replica that has too much to do wants to be asked again; 0 where it
        does not say. It gets nothing until then, which is no fault of its.
    """

    status: RewardStatus
    detail: str
    retryable: bool = False
    is_down: bool = False
    maybe_one_row: bool = False
    elsewhere: bool = True
    retry_after_s: float = 0.0

    @property
    def is_lasting(self) -> bool:
        """Whether this is a fault of the infrastructure that waiting does not cure."""
        return self.status.is_infrastructure and not self.retryable


class ReplicaError(RewardError):
    """A request to a replica failed.

    failure: the reason.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.detail)
        self.failure = failure


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Description of a server's model. Replicas of one model agree in all but the limits.

    takes_tokens: rows go as token ids, not as text.
    reads: of models that take text: `texts`; `outputs`, completions without their prompts; `dialogues` and
        nothing else; or `both`, and then a dialogue goes beside its text.
    special_tokens: what the model's tokenizer takes for one token, see `RewardModelSpec`; empty if not known.
    reward_names: objectives of every score; empty if only the replies name them.
    max_rows: most rows in a request.
    max_length: most tokens in a row; 0 if the server does not say.
    mixes_lengths: rows of different lengths may share a request.
    pad_to: a request's rows are padded to the longest of them, rounded up to a multiple of this.
    content: hash of weights, tokenizer and template; "" if the server does not say.
    """

    takes_tokens: bool = False
    reads: Literal["texts", "outputs", "dialogues", "both"] = "texts"
    special_tokens: tuple[str, ...] = ()
    reward_names: tuple[str, ...] = ()
    max_rows: int = 64
    max_length: int = 0
    mixes_lengths: bool = True
    pad_to: int = 1
    content: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """The reply to one request.

    columns: objective -> one number per row, in order; None where, of several objectives, one does not apply.
        The client checks for numbers that are not finite, out of range, or not one per row.
    version: of the model, as the reply states it; "" if it does not.
    notes: per row a note on its score for a person ("scored by 1 of 2 members"), or ""; empty for none.
    token_scores: per row one number for each token of the response, in place of `columns` where rows have
        `bounds`; empty elsewhere.
    members: of an ensemble, per row each member's own score, None where it gave none; empty elsewhere.
    """

    columns: Mapping[str, Sequence[float | None]]
    version: str = ""
    notes: Sequence[str] = ()
    token_scores: Sequence[Sequence[float]] = ()
    members: Sequence[Mapping[str, float | None]] = ()


@runtime_checkable
class NamedServer(Protocol):
    """What a pool of replicas knows of one: of a reward model's server, or of a judge's.

    name: in messages.
    model: goes into `RewardResult.model`.
    """

    name: str
    model: str


@runtime_checkable
class Transport(Protocol):
    """Connection to one server. Every method ends within its `timeout_s`, even if the server is gone.

    name: in messages: "reward model `walks` at 10.0.0.7:8001". Holds no secret.
    model: goes into `RewardResult.model`.
    """

    name: str
    model: str

    async def check(self, timeout_s: float) -> None:
        """Raise one clear sentence if the server cannot be used; called once, before long work.

        Raises:
            RewardError: what is wrong, where, what to do.
        """
        ...

    async def describe(self, timeout_s: float) -> ModelInfo:
        """Ask for the model's description; before the first request, after a failure and for a new version.

        Raises:
            ReplicaError: no reply, or not a model that gives rewards (INVALID).
        """
        ...

    async def infer(self, rows: Sequence[ScoringRow], timeout_s: float) -> Reply:
        """Score `rows` with one request; `describe` has succeeded before.

        Raises:
            ReplicaError: no reply, an error, or a reply of wrong types or shape (INVALID, `maybe_one_row`).
        """
        ...

    async def server_statistics(self, timeout_s: float) -> ServerTimes | None:
        """Ask for the server's own statistics; None if it has none.

        Raises:
            ReplicaError: no reply.
        """
        ...

    async def close(self) -> None:
        """Close connections. A second call does nothing."""
        ...

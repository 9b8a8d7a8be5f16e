"""What a reward source is, what a user may pass as one, and what its client counts for metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from conch.types import RewardResult, Rollout


@dataclass(frozen=True, slots=True)
class ClientStats:
    """Counts since the source was made, but for the last field.

    requests: sent, those that failed, repeats and probes among them.
    retries: requests that repeated an earlier one, and probes of a replica that had failed.
    retries_by: why they were needed -> how many; the values sum to `retries`. `unavailable`, `timeout`: the
        request was sent again; `data`: a part of it, to find the bad row; `probe`: is the replica back?
    deduplicated: samples that needed no row of their own, since an equal one was under way or known.
    replica_faults: requests that one replica refused and another answered in full.
    most_in_flight: most requests under way at once since the snapshot before.
    """

    requests: int = 0
    retries: int = 0
    retries_by: Mapping[str, int] = field(default_factory=dict)
    deduplicated: int = 0
    replica_faults: int = 0
    most_in_flight: int = 0


@runtime_checkable
class ReportsStats(Protocol):
    """A source of served rewards; the scorer asks it once a step."""

    def traffic(self) -> ClientStats:
        """A snapshot; starts `most_in_flight` anew."""
        ...

    def server_times(self) -> Future[ServerTimes]:
        """What the servers' own statistics gained since the call before, summed over the replicas.

        Ends within `client.request_timeout_s`; a server that does not answer, or keeps none, adds nothing. Requests
        of other clients are among them.
        """
        ...

    @property
    def model_change(self) -> str:
        """With `on_model_change=raise`: one sentence once the model has changed, else "".

        Every later result is then INVALID with the same sentence.
        """
        ...


@dataclass(slots=True)
class Counts:
    """As in `ClientStats`."""

    requests: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    deduplicated: int = 0
    replica_faults: int = 0


@runtime_checkable
class RewardSource(Protocol):
    """Something that scores rollouts in the background.

    name: how messages call it, for example "walks at 127.0.0.1:8001".
    """

    name: str

    def check(self) -> None:
        """Find out before long work starts whether scoring can work at all.

        Raises:
            RewardError, ConfigError: one sentence: what is wrong, where, and what to do.
        """
        ...

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        """Start scoring and return at once: one result per rollout, in order.

        A failed reward is a status in its result, never an exception of the future.
        """
        ...

    def close(self) -> None:
        """Cancel what is under way and release threads and connections. A second call does nothing."""
        ...

    def __enter__(self) -> RewardSource: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class CountsTraffic(Protocol):
    """A source that counts what it sent since it was made.

    requests: calls of the function, or requests sent, retries among them.
    retries: requests that repeated an earlier one.
    """

    @property
    def requests(self) -> int: ...

    @property
    def retries(self) -> int: ...


@runtime_checkable
class WantsChunks(Protocol):
    """A source that may ask for the whole of a chunk at once instead of completions as they end.

    wants_chunks: True where what is scored together matters, in cost or in the scores.
    """

    wants_chunks: bool


UserReward = Callable[..., Any] | str | RewardSource
"""What a user may pass as a reward."""


@dataclass(frozen=True, slots=True)
class ServerTimes:
    """A server's own sums over all its clients' requests since the model was loaded.

    requests: answered. queue_s: seconds that they waited. compute_s: seconds in the model, each request
    counted with the whole of its batch.
    """

    requests: int = 0
    queue_s: float = 0.0
    compute_s: float = 0.0

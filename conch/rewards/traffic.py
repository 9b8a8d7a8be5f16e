"""What a reward client counts, for the scorer's metrics."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from conch.rewards.replica import ServerTimes


@dataclass(frozen=True, slots=True)
class Traffic:
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
class ReportsTraffic(Protocol):
    """A source of served rewards; the scorer asks it once a step."""

    def traffic(self) -> Traffic:
        """A snapshot; starts `most_in_flight` anew."""
        ...

    def server_times(self) -> Future[ServerTimes]:
        """What the servers' own statistics gained since the call before, summed over the replicas.

        Ends within `attempt_timeout_s`; a server that does not answer, or keeps none, adds nothing. Requests
        of other clients are among them.
        """
        ...

    @property
    def model_change(self) -> str:
        """With `on_model_change=raise`: one sentence once the model has changed, else "".

        Every later result is then INVALID with the same sentence.
        """
        ...

"""What may be read of the policy's weights, and for how long: for the duration of one rollout."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from conch.errors import RolloutUnavailableError
from conch.rollouts.protocol import Part, WeightVersion


class LeaseEndedError(RolloutUnavailableError):
    """The rollout has ended for which the weights were to be read, or newer ones stand in their place."""


class WeightLease:
    """Lets the threads that send weights to servers read them from the beginning to the end of a rollout.

    A thread may outlast the rollout. The weights are others by then: an update has changed them, and under
    ZeRO-3 a rank holds its own shard only.

    weights: version that may be read.
    read: gives the tensors of a part.
    goes_on: see `WeightUpdate`.
    """

    def __init__(
        self, weights: WeightVersion, read: Callable[[Part], dict[str, Tensor]], *, goes_on: bool = False
    ) -> None:
        self.weights = weights
        self.goes_on = goes_on
        self._read = read
        self._lock = threading.Lock()
        self._registered: list[dict[str, Tensor]] = []
        self._has_ended = False

    @property
    def has_ended(self) -> bool:
        """True once `end` was called."""
        return self._has_ended

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep the weights unchanged inside. Never wait for a server inside: `end` waits for readers.

        Raises:
            LeaseEndedError: the rollout has ended.
        """
        with self._lock:
            if self._has_ended:
                raise LeaseEndedError("the rollout ended before these weights were read")
            yield

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Surrounds all that is done to bring one server these weights."""
        yield

    def tensors(self, part: Part) -> dict[str, Tensor]:
        """Names and weights. Call it inside `reading`."""
        return self._read(part)

    def register(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give the same tensors in a dict that `end` empties, whoever holds it. Call it inside `reading`."""
        self._registered.append(dict(tensors))
        return self._registered[-1]

    def copies(self, tensors: dict[str, Tensor]) -> Iterator[Tensor]:
        """Yield copies of registered tensors, in their order; removes each from the dict once it is copied.

        Raises:
            LeaseEndedError: the rollout has ended in between.
        """
        with self.reading():
            names = list(tensors)
        for name in names:
            with self.reading():
                copy = tensors.pop(name).clone()
            yield copy

    def end(self) -> None:
        """Allow no further reading. Waits for a thread that is reading, and for no server."""
        with self._lock:
            self._has_ended = True
            for tensors in self._registered:
                tensors.clear()

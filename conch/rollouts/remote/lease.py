"""Leave to read the policy's weights while a rollout lasts."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from conch.errors import RolloutUnavailableError
from conch.rollouts.protocol import WeightVersion


class LeaseOverError(RolloutUnavailableError):
    """The rollout has ended for which the weights were wanted."""


class WeightLease:
    """From a rollout's beginning to its end, for the threads that give servers their weights.

    These may outlast a rollout, and afterwards the weights are others: an update changes them, and under
    ZeRO-3 a rank is left with its own part of them.

    stamp: of the weights.
    """

    def __init__(self, stamp: WeightVersion) -> None:
        self.stamp = stamp
        self._lock = threading.Lock()
        self._lent: list[dict[str, Tensor]] = []
        self._is_over = False

    @property
    def is_over(self) -> bool:
        """True once `end` was called."""
        return self._is_over

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, the weights stay what they are. Never wait for a server there: `end` waits for you.

        Raises:
            LeaseOverError: the rollout has ended.
        """
        with self._lock:
            if self._is_over:
                raise LeaseOverError("the rollout ended before these weights were read")
            yield

    def lend(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inside `reading`: the same tensors, of which `end` keeps hold of none, whoever still has them."""
        self._lent.append(dict(tensors))
        return self._lent[-1]

    def copies(self, lent: dict[str, Tensor]) -> Iterator[Tensor]:
        """Copies of lent tensors, in their order; each tensor is given back once it is copied.

        Raises:
            LeaseOverError: the rollout has ended in between.
        """
        with self.reading():
            names = list(lent)
        for name in names:
            with self.reading():
                copy = lent.pop(name).clone()
            yield copy

    def end(self) -> None:
        """Nobody reads the weights any more. Waits for whoever is reading, and for no server."""
        with self._lock:
            self._is_over = True
            for tensors in self._lent:
                tensors.clear()

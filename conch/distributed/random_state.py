"""The random generators of a process, read and restored together."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """State of every generator that training draws from.

    python: of `random`.
    numpy: of `numpy.random`.
    torch: of torch on the CPU.
    devices: of torch on each GPU.
    """

    python: Any
    numpy: Any
    torch: Tensor
    devices: list[Tensor]

    @classmethod
    def capture(cls) -> RandomState:
        """Read all generators of this process."""
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), devices)

    def restore(self) -> None:
        """Set all generators of this process."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.devices:
            torch.cuda.set_rng_state_all(self.devices)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Set all generators inside the block; afterwards they are as they were before it."""
        present = RandomState.capture()
        self.restore()
        try:
            yield
        finally:
            present.restore()


@contextmanager
def own_generators(*seed: int) -> Iterator[None]:
    """Draw from generators of this `seed` inside the block; afterwards they are as they were before it.

    seed: whole numbers from 0 on, each of which makes other generators.
    """
    present = RandomState.capture()
    set_seed(int(np.random.SeedSequence(list(seed)).generate_state(1)[0]))
    try:
        yield
    finally:
        present.restore()

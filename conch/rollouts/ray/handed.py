"""Weights as numpy arrays: Ray writes those to shared memory in one copy, and reads them without any.

Ray pickles a torch tensor through torch, which copies it several times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class HandedTensors:
    """Tensors that travel through Ray.

    arrays: of each tensor its bytes; numpy does not know every type of number.
    dtypes, shapes: of the tensors.
    """

    arrays: dict[str, np.ndarray]
    dtypes: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> HandedTensors:
        """These tensors, which are not copied where they lie in the CPU's memory in one piece."""
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        return cls(
            {name: tensor.reshape(-1).view(torch.uint8).numpy() for name, tensor in plain.items()},
            {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in plain.items()},
            {name: tuple(tensor.shape) for name, tensor in plain.items()},
        )

    def as_torch(self) -> dict[str, Tensor]:
        """The tensors, which share the arrays' memory: read them only."""
        return {
            name: torch.from_numpy(array).view(getattr(torch, self.dtypes[name])).reshape(self.shapes[name])
            for name, array in self.arrays.items()
        }

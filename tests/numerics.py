"""How far rounding may move a result: what a test allows where it cannot compute in float64."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from tests.tiny import FLOAT32_INSIDE

EPS = torch.finfo(torch.float32).eps


def rounding(values: Tensor | np.ndarray, times: int) -> float:
    """What so many roundings to float32, one after the other, make of values of this size at most."""
    largest = values.detach().abs().max() if isinstance(values, Tensor) else np.abs(values).max()
    return times * EPS * max(1.0, float(largest))


def network_rounding(outputs: Tensor | np.ndarray, *, layers: int = 3, width: int = 32) -> float:
    """What float32 makes of a network's outputs between two orders of its sums.

    About eight operations a layer round; each sums up to `width` products, whose errors add up like the
    steps of a random walk (Higham and Mary 2019, doi:10.1137/18M1226312). The defaults are those of
    `tests.tiny`.
    """
    return rounding(outputs, 8 * (layers + 1)) * math.sqrt(width)


def family_rounding(family: str, outputs: Tensor) -> float:
    """What two layouts of a batch may differ by in a float64 model of `tests.tiny`."""
    return network_rounding(outputs) if family in FLOAT32_INSIDE else 1e-10


def assert_scores_close(found: ArrayLike, expected: ArrayLike, *, layers: int = 2, width: int = 32) -> None:
    """Scores of a network that is served in float32 are the expected ones, whatever order its sums are in.

    NaN equals NaN. The defaults are those of `tests.tiny.reward_checkpoint`.
    """
    wanted = np.asarray(expected, dtype=np.float64)
    bound = network_rounding(np.nan_to_num(wanted), layers=layers, width=width)
    np.testing.assert_allclose(np.asarray(found, dtype=np.float64), wanted, rtol=0, atol=bound)

"""Mean and standard deviation of raw scores that a checkpoint of somebody else's holds: in its config or
buffers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# What Safe RLHF adds to the standard deviation before it divides (safe_rlhf/models/normalizer.py).
_EPSILON = 1e-8


@dataclass(frozen=True, slots=True)
class Statistics:
    """A score is (raw - mean) / std where `applied`, else the raw one.

    mean, std: one number per output.
    found: where they stand.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    applied: bool
    found: str


def statistics_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Statistics | None:
    """Return the statistics of a checkpoint; None where it has none.

    OpenRLHF writes `mean`, `std` and `normalize_reward` into config.json (openrlhf/models/model.py); Safe
    RLHF keeps `normalizer.mean` and `normalizer.var` with the weights: a reward is centred and scaled, a cost
    only scaled.
    """
    if isinstance(config.get("mean"), (int, float)) and isinstance(config.get("std"), (int, float)):
        applied = bool(config.get("normalize_reward", False))
        return Statistics((float(config["mean"]),), (float(config["std"]),), applied, "config.json")
    found = {name.rpartition("normalizer.")[2]: tensors[name] for name in tensors if "normalizer." in name}
    if not {"mean", "var"} <= set(found):
        return None
    std = tuple(found["var"].double().sqrt().add(_EPSILON).reshape(-1).tolist())
    mean = tuple(found["mean"].double().reshape(-1).tolist())
    if (
        config.get("normalize_function", "scale" if config.get("score_type") == "cost" else "affine")
        == "scale"
    ):
        mean = (0.0,) * len(mean)
    return Statistics(mean, std, bool(config.get("do_normalize", False)), "normalizer.* beside the weights")

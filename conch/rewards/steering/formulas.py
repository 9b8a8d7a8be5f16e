"""Distances in goal space, of one text. All vectors have one number per goal, in the same order.

    left = z* - z_hat     what is left to go from the output to the target
    asked = z* - z_0      the move that was asked for
    moved = z_hat - z_0   the move that was made

    steerability error   |left|
    miscalibration       |left . asked| / |asked|            part of it along the move that was asked for
    orthogonality        |left - (left . asked) asked / |asked|^2|    part of it beside that move

Chang et al. 2025 (arXiv:2505.23816), section 3. docs/steerability.md says where the paper's code differs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from conch.config import SteeringConfig

Vector = Sequence[float]

_NOTHING = 1e-12
"""A move no longer than this is none: goals are rounded to some 1e-16."""

_ROUNDING = 1e-9
"""Keeps an error of 0.3, as the difference of two numbers has it, in the third tenth."""


def steerability(left: Vector, config: SteeringConfig) -> float:
    """The reward: less the distance to the target, as the options of `config` say; 0 is the best one, or 1
    with `rescale_norm`."""
    total = math.fsum(_goal_error(abs(each), config) ** 2 for each in left)
    if config.rescale_norm:
        mean = total / len(left)
        return 1.0 - (mean if config.square_rewards else math.sqrt(mean))
    return 0.0 - (total if config.square_rewards else math.sqrt(total))


def _goal_error(error: float, config: SteeringConfig) -> float:
    if config.good_enough_threshold is not None:
        error = max(error, config.good_enough_threshold)
    if config.too_bad_threshold is not None:
        error = min(error, config.too_bad_threshold)
    return min(math.ceil(error * 10 - _ROUNDING) / 10, 1.0) if config.decile else error


def miscalibration(left: Vector, asked: Vector, *, normalize: bool) -> float | None:
    """The reward: less what is left along the move that was asked for; None where no move was.

    normalize: as a share of that move.
    """
    length = norm(asked)
    if length <= _NOTHING:
        return None
    along = abs(_dot(left, asked)) / length
    return 0.0 - (along / length if normalize else along)


def orthogonality(left: Vector, asked: Vector, moved: Vector, *, normalize: bool) -> float:
    """The reward: less what is off the move that was asked for; of a text that should stay, all of its move.

    normalize: as a share of the move that was made, 1 at most.
    """
    length = norm(asked)
    share = _dot(left, asked) / length**2 if length > _NOTHING else 0.0
    beside = norm([mine - share * wanted for mine, wanted in zip(left, asked, strict=True)])
    if not normalize:
        return 0.0 - beside
    distance = norm(moved)
    return 0.0 - (min(beside / distance, 1.0) if distance > _NOTHING else 0.0)


def norm(vector: Vector) -> float:
    """Euclidean length."""
    return math.hypot(*vector)


def _dot(left: Vector, right: Vector) -> float:
    return math.fsum(a * b for a, b in zip(left, right, strict=True))

"""What a request may be given, and what a post may hold, whatever the ledger stands at."""

from __future__ import annotations

import math
from collections.abc import Sequence

from conch.service.leases.records import Asker, Post
from conch.service.refusals import CONFLICT, UNPROCESSABLE, RefusedError

GREATEST = 1e9
"""Largest reward. A group's spread is computed from squares, in float32: a larger one would make an update of
all its groups no number."""


def check_rewards(post: Post) -> None:
    """See that a post has one number, or null, for each completion.

    Raises:
        RefusedError: it has not.
    """
    if len(post.rewards) != len(post.hashes):
        raise RefusedError(
            UNPROCESSABLE,
            f"there are {len(post.rewards)} rewards for {len(post.hashes)} completions: give each one",
        )
    if not post.rewards:
        raise RefusedError(UNPROCESSABLE, "there are no rewards")
    for index, reward in enumerate(post.rewards):
        if reward is None:
            continue
        if not math.isfinite(reward):
            raise RefusedError(
                UNPROCESSABLE,
                f"reward {index} is {reward}, which is no number: give null where there is none",
            )
        if abs(reward) > GREATEST:
            raise RefusedError(
                UNPROCESSABLE,
                f"reward {index} is {reward:g}, whose square is too large to compute with: give numbers from "
                f"{-GREATEST:g} to {GREATEST:g}",
            )


def dealt(free: Sequence[int], asker: Asker, size: int) -> tuple[int, ...]:
    """The places that who asks gets of those that nobody has. size: of the group.

    Raises:
        RefusedError: there are not so many.
    """
    if asker.count > len(free):
        raise RefusedError(
            CONFLICT,
            f"the shared group has {len(free)} of {size} completions that nobody has, not {asker.count}",
        )
    return tuple(free[: asker.count])

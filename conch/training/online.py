"""What the trainers that learn from rewards share. Functions and small nouns, not a base class.

Legend: B rollouts, R response tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from conch.log import get_logger
from conch.types import Rollout

_log = get_logger(__name__)


ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class Ahead(Generic[ValueT]):
    """What the models say of rollouts, computed while their rewards are still under way.

    version: of the policy that was asked.
    """

    rollouts: list[Rollout]
    version: int
    value: ValueT

    def is_of(self, rollouts: Sequence[Rollout], version: int) -> bool:
        """True if nothing has changed since: these very rollouts, and the same policy."""
        same = len(rollouts) == len(self.rollouts) and all(map(operator.is_, rollouts, self.rollouts))
        return same and version == self.version


def known_or_computed(
    ahead: Ahead[ValueT] | None,
    rollouts: Sequence[Rollout],
    version: int,
    compute: Callable[[Sequence[Rollout]], ValueT],
) -> ValueT:
    """What was computed ahead, if it is of these rollouts and this policy; else it is computed now."""
    if ahead is not None and ahead.is_of(rollouts, version):
        return ahead.value
    return compute(rollouts)

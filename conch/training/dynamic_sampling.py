"""Dynamic sampling: groups whose rewards are all alike are replaced by groups of other prompts.

Yu et al. 2025 (DAPO), arXiv:2503.14476, section 3.2. A group without spread has advantages of 0 and teaches
nothing; with many of them a step's gradient comes from few groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from conch.types import RewardResult, Rollout, RolloutGroup


class SampledGroups(NamedTuple):
    """Whole groups, one after the other.

    rewards: one per rollout, in order.
    resamples: how often groups were sampled again.
    """

    rollouts: list[Rollout]
    rewards: list[RewardResult]
    resamples: int


def sample_groups_with_spread(
    sample: Callable[[], Sequence[RolloutGroup]],
    num_groups: int,
    *,
    max_resamples: int,
    differ: Callable[[RolloutGroup], bool],
    all_reduce_int: Callable[[int], int],
) -> SampledGroups:
    """Sample until `num_groups` groups have spread, or `max_resamples` runs out; then others fill up.

    All ranks sample equally often, and each keeps the groups that it sampled.

    sample: this rank's groups of new prompts, `num_groups` or more, with their rewards.
    differ: whether a group's completions differ in what is learned from.
    all_reduce_int: sum over all ranks.
    """
    spread: list[RolloutGroup] = []
    zero_std: list[RolloutGroup] = []
    resamples = -1
    while resamples < max_resamples:
        resamples += 1
        for group in sample():
            (spread if differ(group) else zero_std).append(group)
        if not all_reduce_int(max(0, num_groups - len(spread))):
            break
    chosen = [*spread, *zero_std][:num_groups]
    return SampledGroups(
        [rollout for group in chosen for rollout in group.rollouts],
        [reward for group in chosen for reward in group.rewards],
        resamples,
    )

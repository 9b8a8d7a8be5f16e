"""Advantages: generalised advantage estimation, and comparison within a group.

Legend: B rollouts (of GRPO those of a prompt together), G rollouts a prompt, R response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from conch.config.algorithms.grpo import Advantage


def gae(
    rewards: Float[Tensor, "B R"],
    values: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    gamma: float,
    lam: float,
) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B R"]]:
    """Advantages and returns by generalised advantage estimation; the value after the last token is 0.

    mask: True at response tokens, which stand at the front of each row.
    """
    advantages = torch.zeros_like(rewards)
    following_advantage = torch.zeros_like(rewards[:, 0])
    following_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        advantage = delta + gamma * lam * following_advantage
        advantages[:, t] = following_advantage = torch.where(
            mask[:, t], advantage, torch.zeros_like(advantage)
        )
        following_value = torch.where(mask[:, t], values[:, t], torch.zeros_like(advantage))
    return advantages, torch.where(mask, advantages + values, torch.zeros_like(values))


SMALLEST_SPREAD = 1e-6
"""Rewards of a group that differ by less than this part of their size are alike: what is left is rounding."""


def has_spread(rewards: Sequence[float]) -> bool:
    """Whether a group teaches anything: two of its rewards differ by more than rounding."""
    return len(rewards) > 1 and max(rewards) - min(rewards) > SMALLEST_SPREAD * max(map(abs, rewards))


def group_advantages(
    rewards: Float[Tensor, " B"],
    valid: Bool[Tensor, " B"],
    group_size: int,
    kind: Advantage,
    sizes: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """Each reward against those of its group; 0 in groups whose rewards are all alike, and where not valid.

    A group's standard deviation is the sample's, over n - 1, as in TRL and verl.

    valid: True where there is a reward; the others count nowhere.
    sizes: of what each reward is the sum of, against which rounding is judged; None takes the rewards' own.
    """
    present = valid.reshape(-1, group_size)
    scores = torch.where(valid, rewards, torch.zeros_like(rewards)).reshape(-1, group_size)
    magnitudes = torch.where(valid, rewards if sizes is None else sizes, torch.zeros_like(rewards)).abs()
    count = present.sum(dim=1, keepdim=True).clamp(min=1)
    mean = scores.sum(dim=1, keepdim=True) / count
    centred = torch.where(present, scores - mean, torch.zeros_like(scores))
    std = (centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    if kind == "leave_one_out":  # r_i - mean of the others = (r_i - mean of all) * n / (n - 1)
        centred = centred * count / (count - 1).clamp(min=1)
    scaled = centred / std if kind == "group_std" else centred
    spread = centred.abs().amax(dim=1, keepdim=True)
    differ = spread > SMALLEST_SPREAD * magnitudes.reshape(-1, group_size).amax(dim=1, keepdim=True)
    return torch.where(differ, scaled, torch.zeros_like(scaled)).reshape(-1)

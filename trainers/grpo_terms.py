"""The arithmetic of group-relative policy optimisation; `conch.trainers.grpo` says what it is for.

Legend: B rollouts (those of a prompt together), R response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from conch.ops import Reduce, clipped_log_ratio, only_this_rank
from conch.trainers.online import total_reward
from conch.types import RewardResult, Rollout

LossForm = Literal["grpo", "dr_grpo", "dapo", "gspo"]
Advantage = Literal["group_std", "group_mean", "leave_one_out"]

_SMALLEST_SPREAD = 1e-6
"""Rewards of a group that differ by less, against their size, are alike: what is left is rounding."""


def group_advantages(
    rewards: Float[Tensor, " B"], valid: Bool[Tensor, " B"], group_size: int, kind: Advantage
) -> Float[Tensor, " B"]:
    """Each reward against those of its group; 0 in groups whose rewards are all alike, and where not valid.

    valid: True where there is a reward; the others count nowhere.
    """
    present = valid.reshape(-1, group_size)
    scores = torch.where(valid, rewards, torch.zeros_like(rewards)).reshape(-1, group_size)
    count = present.sum(dim=1, keepdim=True).clamp(min=1)
    mean = scores.sum(dim=1, keepdim=True) / count
    centred = torch.where(present, scores - mean, torch.zeros_like(scores))
    std = (centred.square().sum(dim=1, keepdim=True) / count).sqrt()
    if kind == "leave_one_out":  # r_i - mean of the others = (r_i - mean of all) * n / (n - 1)
        centred = centred * count / (count - 1).clamp(min=1)
    scaled = centred / std if kind == "group_std" else centred
    has_spread = std > _SMALLEST_SPREAD * (1 + mean.abs())
    return torch.where(has_spread, scaled, torch.zeros_like(scaled)).reshape(-1)


def token_weights(
    mask: Bool[Tensor, "B R"], form: LossForm, max_new_tokens: int, reduce: Reduce = only_this_rank
) -> Float[Tensor, "B R"]:
    """w_it of the loss, 0 where `mask` is False; counts run over all ranks through `reduce`."""
    lengths = mask.sum(dim=1, keepdim=True)
    if form == "dapo":
        return mask.float() / reduce(mask.sum()).clamp(min=1)
    num_samples = reduce((lengths > 0).sum()).clamp(min=1)
    length = max_new_tokens if form == "dr_grpo" else lengths.clamp(min=1)
    return mask.float() / (length * num_samples)


def policy_ratio(
    logprobs: Float[Tensor, "B R"],
    old_logprobs: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    form: LossForm,
) -> Float[Tensor, "B R"]:
    """rho_it: of each token, or with gspo the geometric mean over the response, the same at each token."""
    log_ratio = clipped_log_ratio(logprobs, old_logprobs)
    if form != "gspo":
        return log_ratio.exp()
    total = torch.where(mask, log_ratio, torch.zeros_like(log_ratio)).sum(dim=1, keepdim=True)
    mean = total / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return mean.exp().expand_as(log_ratio)


def clipped_loss_terms(
    ratio: Float[Tensor, "B R"], advantages: Float[Tensor, " B"], clip_low: float, clip_high: float
) -> tuple[Float[Tensor, "B R"], Bool[Tensor, "B R"]]:
    """Per-token loss before it is weighed, and where the clip was the larger term."""
    wanted = -advantages.unsqueeze(1)
    plain, clipped = wanted * ratio, wanted * ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(plain, clipped), clipped > plain


def sampler_weights(
    logprobs: Float[Tensor, "B R"], sampling_logprobs: Float[Tensor, "B R"], most: float
) -> Float[Tensor, "B R"]:
    """Importance weights of the trainer's distribution against the sampler's, truncated at `most` (Ionides
    2008, "Truncated Importance Sampling")."""
    return clipped_log_ratio(logprobs, sampling_logprobs).exp().clamp(max=most)


def effective_share(mean_weight: float, mean_square: float) -> float:
    """Effective sample size of importance weights, (sum w)^2 / sum w^2, as a share of their number (Kong
    1992): 1 where all are alike. NaN without weights."""
    return mean_weight**2 / mean_square if mean_square > 0 else float("nan")


def overlong_penalties(
    rollouts: Sequence[Rollout], max_new_tokens: int, buffer: int, penalty: float
) -> Float[Tensor, " B"]:
    """0 up to `max_new_tokens - buffer` tokens, then growing linearly to `penalty` at `max_new_tokens`."""
    lengths = torch.tensor([len(rollout.completion.token_ids) for rollout in rollouts]).float()
    if buffer == 0:
        return torch.zeros_like(lengths)
    return penalty * ((lengths - (max_new_tokens - buffer)) / buffer).clamp(min=0, max=1)


def has_spread(rewards: Sequence[RewardResult], weights: Mapping[str, float]) -> bool:
    """Whether a group teaches anything: two of its rewards differ."""
    values = [total_reward(reward, weights) for reward in rewards if reward.ok]
    return len(values) > 1 and max(values) - min(values) > _SMALLEST_SPREAD * (1 + max(map(abs, values)))

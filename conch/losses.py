"""Losses of policies and values, per token, before any sum; weights of tokens and samples.

Legend: B rollouts (of GRPO those of a prompt together), R response tokens.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from conch.config.algorithms.correction import CorrectionLevel
from conch.config.algorithms.grpo import LossForm
from conch.ops import (
    Reduce,
    clipped_log_ratio,
    only_this_rank,
)


def policy_loss_terms(
    logprobs: Float[Tensor, "B R"],
    old_logprobs: Float[Tensor, "B R"],
    advantages: Float[Tensor, "B R"],
    clip_ratio: float,
    dual_clip: float | None = None,
) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B R"], Bool[Tensor, "B R"]]:
    """Per-token clipped loss, the ratio, and where the clip was the larger term."""
    ratio = clipped_log_ratio(logprobs, old_logprobs).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    losses = torch.maximum(plain, clipped)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -advantages * dual_clip), losses)
    return losses, ratio, clipped > plain


def value_loss_terms(
    values: Float[Tensor, "B R"],
    old_values: Float[Tensor, "B R"],
    returns: Float[Tensor, "B R"],
    clip_value: float | None,
) -> Float[Tensor, "B R"]:
    """Per-token squared error, with values kept near the old ones unless `clip_value` is None."""
    if clip_value is None:
        return 0.5 * (values - returns) ** 2
    near = old_values + (values - old_values).clamp(-clip_value, clip_value)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


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
    negative = -advantages.unsqueeze(1)
    plain, clipped = negative * ratio, negative * ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(plain, clipped), clipped > plain


def importance_weights(
    logprobs: Float[Tensor, "B R"],
    sampling_logprobs: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    level: CorrectionLevel,
) -> Float[Tensor, "B R"]:
    """pi_old / pi_sampler of each token, before anything is cut; 1 where a response has no token.

    Log-ratios of a token and of a product are kept within the bound of `clipped_log_ratio`, so that no weight
    is infinite. The weight of a whole response stands at each of its columns.

    logprobs: of the policy before its update, by the trainer.
    sampling_logprobs: under which the tokens were drawn.
    mask: True at response tokens.
    """
    zeros = torch.zeros_like(logprobs)
    log_ratio = torch.where(mask, clipped_log_ratio(logprobs, sampling_logprobs), zeros)
    if level == "token":
        return log_ratio.exp()
    total = log_ratio.sum(dim=1, keepdim=True)
    if level == "geometric":
        total = total / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return clipped_log_ratio(total, torch.zeros_like(total)).exp().expand_as(log_ratio)


def truncate_weights(weights: Float[Tensor, "B R"], cap: float) -> Float[Tensor, "B R"]:
    """Lower weights to `cap` where they exceed it: more bias, less variance (Ionides 2008,
    "Truncated Importance Sampling")."""
    return weights.clamp(max=cap)


def mask_weights(weights: Float[Tensor, "B R"], low: float, high: float) -> Float[Tensor, "B R"]:
    """Keep weights within [`low`, `high`] as they are and set all others to 0 (IcePop: Ling Team 2025,
    arXiv:2510.18855, M(k) of its objective)."""
    return torch.where((weights >= low) & (weights <= high), weights, torch.zeros_like(weights))


def effective_sample_size(mean_weight: float, mean_square: float) -> float:
    """Effective sample size of importance weights, (sum w)^2 / sum w^2, as a share of their number (Kong
    1992): 1 where all are alike. NaN without weights."""
    return mean_weight**2 / mean_square if mean_square > 0 else float("nan")

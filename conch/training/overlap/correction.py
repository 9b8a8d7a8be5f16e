"""Weights for samples of another distribution than the trainer's: application and statistics.

A step trains on tokens that a sampler drew, whose weights may be some updates older than the policy's, and
whose kernels may round otherwise. With pi_old recomputed by the trainer before its update, the loss takes two
ratios instead of one (Hilton et al. 2021, "Batch size-invariance for policy optimization", section 3; Fu et
al. 2025, "AReaL", arXiv:2505.24298, equation 5):

    rho_it = pi / pi_old              clipped, as in PPO: how far this step's updates may go
    v_it   = pi_old / pi_sampler      a constant, truncated or masked: what makes up for the sampler

Statistics are of v_it before anything is cut: afterwards the effective sample size would look well because of
the cut itself.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from conch.config.algorithms.correction import CorrectionConfig
from conch.data.rollout_batch import Sequences
from conch.losses import (
    effective_sample_size,
    importance_weights,
    mask_weights,
    truncate_weights,
)
from conch.ops import Reduce, masked_mean
from conch.types import Metrics


def correction_weights(
    correction: CorrectionConfig, logprobs: Float[Tensor, "B R"], sequences: Sequences
) -> Float[Tensor, "B R"] | None:
    """What the policy's loss of each token is multiplied by; None where nothing is weighed.

    logprobs: of the policy before its update.
    """
    if not correction.is_on:
        return None
    of = (logprobs, sequences.sampling_logprobs, sequences.response_mask)
    weights = importance_weights(*of, correction.level)
    low, high = correction.bounds
    if correction.kind == "truncate":
        return truncate_weights(weights, high)
    return mask_weights(weights, low, high)


def importance_metrics(
    logprobs: Float[Tensor, "B R"],
    sequences: Sequences,
    correction: CorrectionConfig,
    reduce: Reduce,
    greatest: Reduce,
) -> Metrics:
    """Statistics over all ranks of pi_old / pi_sampler before any cut: of tokens, and of whole responses
    (products); and the shares of both that `correction` cuts, where it is on.

    greatest: takes the maximum over all ranks.
    """
    mask, of = sequences.response_mask, (logprobs, sequences.sampling_logprobs, sequences.response_mask)
    tokens, responses = (importance_weights(*of, level).double() for level in ("token", "sequence"))
    has_tokens = mask.any(dim=1)
    metrics = {
        **_statistics("rollout/", tokens, mask, reduce, greatest),
        **_statistics("rollout/sequence_", responses[:, 0], has_tokens, reduce, greatest),
    }
    if correction.is_on:
        low, high = correction.bounds
        weights = importance_weights(*of, correction.level)
        is_cut = mask & ((weights < low) | (weights > high))
        metrics["rollout/importance_ratio_cut_fraction"] = float(masked_mean(is_cut.double(), mask, reduce))
        metrics["rollout/sequence_importance_ratio_cut_fraction"] = float(
            masked_mean(is_cut.any(dim=1).double(), has_tokens, reduce)
        )
    return metrics


def _statistics(
    prefix: str, weights: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"], reduce: Reduce, greatest: Reduce
) -> Metrics:
    mean, square = (float(masked_mean(values, mask, reduce)) for values in (weights, weights**2))
    most = greatest(torch.where(mask, weights, torch.zeros_like(weights)).max())
    return {
        f"{prefix}effective_sample_size": effective_sample_size(mean, square),
        f"{prefix}importance_ratio_mean": mean,
        f"{prefix}importance_ratio_max": float(most),
    }

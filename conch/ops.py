"""Tensor maths that two or more algorithms share.

Legend: B sequences, T tokens (prompt and response), R response tokens, V vocabulary, *S any shape. A `mask`
is True where a position counts. Everything here computes in float32 at least, whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks (see `conch.engine.Engine.sum`)."""

KLEstimator = Literal["k1", "k2", "k3"]


def only_this_rank(values: Tensor) -> Tensor:
    """The `Reduce` of a single process."""
    return values


def position_ids(attention_mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Position of each token among the real ones: padding on the left moves nothing, and gets 0 itself."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def masked_sum(values: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"]) -> Float[Tensor, ""]:
    """Sum where `mask` is True. What stands elsewhere cannot leak in, not even NaN."""
    wide = at_least_float32(values)
    return torch.where(mask, wide, torch.zeros_like(wide)).sum()


def masked_mean(
    values: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"], reduce: Reduce = only_this_rank
) -> Float[Tensor, ""]:
    """Mean where `mask` is True, over all ranks through `reduce`; 0 where nothing is."""
    total = masked_sum(values, mask)
    totals = reduce(torch.stack([total, mask.sum().to(total.dtype)]))
    return totals[0] / totals[1].clamp(min=1)


def whiten(
    values: Float[Tensor, "*S"],
    mask: Bool[Tensor, "*S"],
    reduce: Reduce = only_this_rank,
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
) -> Float[Tensor, "*S"]:
    """Scale to variance 1 (biased estimate) and, if `shift_mean`, to mean 0, over valid tokens of all ranks.

    Invalid positions come back as 0. Two passes, so that a large mean costs no precision.
    """
    wide = at_least_float32(values)
    mean = masked_mean(wide, mask, reduce)
    variance = masked_mean((wide - mean) ** 2, mask, reduce)
    centred = wide - mean if shift_mean else wide
    return torch.where(mask, centred * torch.rsqrt(variance + eps), torch.zeros_like(wide))


_CHUNK_ELEMENTS = 2**24
"""Most logits held in float32 at once by `logprobs_of_labels` (64 MiB)."""


def logprobs_of_labels(
    logits: Float[Tensor, "B R V"], labels: Int[Tensor, "B R"], temperature: float = 1.0
) -> Float[Tensor, "B R"]:
    """Log-probability of each label under softmax(logits / temperature).

    Some rows at a time, so that half-precision logits of a large vocabulary are never all copied to float32.
    """
    rows = max(1, _CHUNK_ELEMENTS // max(1, logits.shape[1] * logits.shape[2]))
    chunks = zip(logits.split(rows), labels.split(rows), strict=True)
    return torch.cat([_label_logprobs(some, label, temperature) for some, label in chunks])


def _label_logprobs(
    logits: Float[Tensor, "N R V"], labels: Int[Tensor, "N R"], temperature: float
) -> Float[Tensor, "N R"]:
    wide = at_least_float32(logits) / temperature
    chosen = wide.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return chosen - wide.logsumexp(dim=-1)


def entropy(logits: Float[Tensor, "B R V"], temperature: float = 1.0) -> Float[Tensor, "B R"]:
    """Entropy in nats of softmax(logits / temperature)."""
    logprobs = (at_least_float32(logits) / temperature).log_softmax(dim=-1)
    return -(logprobs.exp() * logprobs).sum(dim=-1)


def kl_estimate(
    logprobs: Float[Tensor, "B R"], reference_logprobs: Float[Tensor, "B R"], estimator: KLEstimator = "k1"
) -> Float[Tensor, "B R"]:
    """Per-token estimate of KL(policy || reference) from samples of the policy (Schulman 2020, "Approximating
    KL Divergence"), with p the policy's and q the reference's probability of a sampled token.

    k1 = log p/q: unbiased, high variance. k2 = (log p/q)^2 / 2: biased, low variance, right as a loss.
    k3 = q/p - 1 - log q/p: unbiased and never negative; as a loss its gradient is not that of the KL.
    """
    log_ratio = at_least_float32(logprobs) - at_least_float32(reference_logprobs)
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    return torch.expm1(-log_ratio) + log_ratio


def kl_loss_terms(
    logprobs: Float[Tensor, "B R"], reference_logprobs: Float[Tensor, "B R"], estimator: KLEstimator
) -> Float[Tensor, "B R"]:
    """Per-token KL(policy || reference) to be minimised: the value of `estimator`, the gradient of k2.

    For samples of the policy, the gradient of k2, log(p/q) * grad log p, is an unbiased estimate of that of
    the KL at that token. Differentiating k1 gives a gradient of mean 0, and k3 that of the other direction,
    KL(reference || policy) (Tang & Munos 2025, arXiv:2506.09477). What a token does to the KL of later ones
    is left out; the KL in the reward accounts for it.
    """
    smooth = kl_estimate(logprobs, reference_logprobs, "k2")
    return smooth + (kl_estimate(logprobs, reference_logprobs, estimator) - smooth).detach()


def at_least_float32(values: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """The same values in float32, or untouched where they are float64 already."""
    return values if values.dtype == torch.float64 else values.float()


def clipped_log_ratio(
    logprobs: Float[Tensor, "B R"], old_logprobs: Float[Tensor, "B R"], bound: float = 20.0
) -> Float[Tensor, "B R"]:
    """log(new/old) kept within ±bound, so that exp() of it stays finite."""
    return (logprobs - old_logprobs).clamp(-bound, bound)

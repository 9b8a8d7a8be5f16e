"""Tensor maths that two or more algorithms share.

Legend: B sequences, T tokens (prompt and response), R response tokens, V vocabulary, *S any shape. A `mask`
is True where a position counts. Everything here computes in float32 at least, whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from conch.config.algorithms.kl import KLEstimator

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks (see `conch.distributed.collectives.Collectives.all_reduce`)."""


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
"""Most logits held in float32 at once by what follows (64 MiB)."""


def logprobs_of_labels(
    logits: Float[Tensor, "B R V"], labels: Int[Tensor, "B R"], temperature: float = 1.0
) -> Float[Tensor, "B R"]:
    """Log-probability of each label under softmax(logits / temperature).

    Logits are looked at in blocks, forwards and backwards: neither a float32 copy nor the probabilities of
    all of them ever exist, only the gradient in the logits' own dtype. Differentiable once.
    """
    return _LabelLogprobs.apply(logits, labels, temperature)  # pyright: ignore[reportReturnType]


class _LabelLogprobs(torch.autograd.Function):
    """log p_y = z_y - log sum_v exp z_v, z = logits / temperature; d log p_y / d logits_v = (1[v = y] - p_v)
    / temperature, where p is made again from what the logsumexp was."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        normaliser, chosen = (torch.empty(labels.shape, dtype=dtype, device=logits.device) for _ in range(2))
        for block in _blocks(logits.shape):
            wide = at_least_float32(logits[block]) / temperature
            normaliser[block] = wide.logsumexp(dim=-1)
            chosen[block] = wide.gather(-1, labels[block].unsqueeze(-1)).squeeze(-1)
        ctx.save_for_backward(logits, labels, normaliser)
        ctx.temperature = temperature
        return chosen - normaliser

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, labels, normaliser = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for block in _blocks(logits.shape):
            wide = at_least_float32(logits[block]) / ctx.temperature
            share = (grad[block] / ctx.temperature).unsqueeze(-1)
            made = (wide - normaliser[block].unsqueeze(-1)).exp().mul_(-share)
            gradient[block] = made.scatter_add_(-1, labels[block].unsqueeze(-1), share.to(made.dtype))
        return gradient, None, None


def entropy(logits: Float[Tensor, "B R V"], temperature: float = 1.0) -> Float[Tensor, "B R"]:
    """Entropy in nats of softmax(logits / temperature); in blocks, for use without gradient."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    entropies = torch.empty(logits.shape[:2], dtype=dtype, device=logits.device)
    for block in _blocks(logits.shape):
        logprobs = (at_least_float32(logits[block]) / temperature).log_softmax(dim=-1)
        entropies[block] = -(logprobs.exp() * logprobs).sum(dim=-1)
    return entropies


def _blocks(shape: torch.Size) -> Iterator[tuple[slice, slice]]:
    """Cut [B, R, V] into blocks [b, r, V] of at most `_CHUNK_ELEMENTS`."""
    num_rows, num_columns, vocabulary = shape
    columns = max(1, min(num_columns, _CHUNK_ELEMENTS // max(1, vocabulary)))
    rows = max(1, _CHUNK_ELEMENTS // max(1, columns * vocabulary))
    for row in range(0, num_rows, rows):
        for column in range(0, num_columns, columns):
            yield slice(row, row + rows), slice(column, column + columns)


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


def head_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of a head on a trunk of this dtype: float32, or float64 where the trunk has it."""
    return torch.promote_types(dtype, torch.float32)


def at_least_float32(values: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """The same values in float32, or untouched where they are float64 already."""
    return values if values.dtype == torch.float64 else values.float()


def clipped_log_ratio(
    logprobs: Float[Tensor, "B R"], old_logprobs: Float[Tensor, "B R"], bound: float = 20.0
) -> Float[Tensor, "B R"]:
    """log(new/old) kept within ±bound, so that exp() of it stays finite."""
    return (logprobs - old_logprobs).clamp(-bound, bound)


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of the samples in each row: the longest first, each into the first row that has room for it.

    The order depends on nothing but the lengths. capacity: of a row; none of the lengths exceeds it.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    shortest = min(lengths, default=0)
    unfilled: list[int] = []  # rows that have room for the shortest sample
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        length = lengths[sample]
        assert length <= capacity, f"a sample of {length} tokens does not fit a row of {capacity}"
        row = next((row for row in unfilled if room[row] >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
            unfilled.append(row)
        rows[row].append(sample)
        room[row] -= length
        if room[row] < shortest:
            unfilled.remove(row)
    return rows

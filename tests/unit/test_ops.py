"""Tensor maths against numpy in float64, and against sums written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from conch import ops

NAN = float("nan")


def two_ranks(*totals: float) -> Callable[[Tensor], Tensor]:
    """A `Reduce` that adds what another rank would have, once for each call in order."""
    others = iter(totals)
    return lambda values: (
        values + torch.tensor([next(others) for _ in range(values.numel())]).view(values.shape)
    )


def test_position_ids_count_real_tokens_only() -> None:
    mask = torch.tensor([[False, False, True, True, True], [True, True, True, False, False]])
    assert ops.position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


def test_masked_sum_lets_nothing_leak_from_masked_positions() -> None:
    values = torch.tensor([[1.0, NAN, 3.0], [math.inf, 5.0, -math.inf]], requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    total = ops.masked_sum(values, mask)
    total.backward()
    assert total.item() == 9.0
    assert values.grad is not None and values.grad.tolist() == [[1, 0, 1], [0, 1, 0]]


def test_masked_mean_divides_by_valid_tokens_of_all_ranks() -> None:
    values, mask = torch.tensor([[2.0, 4.0, 100.0]]), torch.tensor([[True, True, False]])
    assert ops.masked_mean(values, mask).item() == 3.0
    assert ops.masked_mean(values, mask, two_ranks(30.0, 4.0)).item() == 6.0  # (6 + 30) / (2 + 4)


def test_masked_mean_of_nothing_is_zero() -> None:
    assert ops.masked_mean(torch.tensor([NAN]), torch.tensor([False])).item() == 0.0


def test_masked_mean_of_half_precision_is_computed_in_float32() -> None:
    # bfloat16 counts 1001 as 1000, and cannot tell 1001 from 1004.
    ones = torch.ones(1001, dtype=torch.bfloat16)
    everything = torch.ones(1001, dtype=torch.bool)
    assert ops.masked_sum(ones, everything).item() == 1001.0
    assert ops.masked_mean(ones, everything).item() == 1.0


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_uses_biased_variance_of_valid_tokens(shift_mean: bool) -> None:
    values = torch.tensor([[1.0, 2.0, 99.0], [6.0, NAN, -50.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    # mean 3, variance (4 + 1 + 9) / 3
    std = math.sqrt(14 / 3)
    shift = 3.0 if shift_mean else 0.0
    expected = [[(1 - shift) / std, (2 - shift) / std, 0], [(6 - shift) / std, 0, 0]]
    white = ops.whiten(values, mask, shift_mean=shift_mean)
    torch.testing.assert_close(white, torch.tensor(expected))


def test_whiten_is_unmoved_by_added_padding() -> None:
    values = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6) < torch.tensor([[6], [2], [1], [4]])
    padded = torch.nn.functional.pad(values, (0, 5), value=1e6)
    white = ops.whiten(padded, torch.nn.functional.pad(mask, (0, 5)))
    torch.testing.assert_close(white[:, :6], ops.whiten(values, mask))
    valid = white[:, :6][mask].double()
    assert valid.mean().abs() < 1e-6 and abs(valid.var(correction=0) - 1) < 1e-5


def test_whiten_takes_moments_over_all_ranks() -> None:
    # This rank has 1 and 3, the other 5 and 11: mean 5, variance (16 + 4 + 0 + 36) / 4 = 14.
    reduce = two_ranks(16.0, 2.0, 36.0, 2.0)
    white = ops.whiten(torch.tensor([1.0, 3.0]), torch.tensor([True, True]), reduce)
    torch.testing.assert_close(white, torch.tensor([-4.0, -2.0]) / math.sqrt(14))


def test_whiten_keeps_precision_at_a_large_mean() -> None:
    values = torch.tensor([1e4 - 0.5, 1e4 + 0.5])
    white = ops.whiten(values, torch.tensor([True, True]))
    torch.testing.assert_close(white, torch.tensor([-1.0, 1.0]), rtol=1e-3, atol=0)


def test_whiten_of_equal_values_is_zero() -> None:
    assert ops.whiten(torch.full((3,), 7.0), torch.ones(3, dtype=torch.bool)).tolist() == [0, 0, 0]


def reference_logprobs(logits: Tensor, labels: Tensor, temperature: float) -> np.ndarray:
    """Log-softmax by its definition, one position at a time, in float64."""
    out = np.zeros(labels.shape)
    for index in np.ndindex(*labels.shape):
        row = logits[index].double().numpy() / temperature
        out[index] = row[labels[index]] - row.max() - math.log(sum(math.exp(x - row.max()) for x in row))
    return out


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_logprobs_of_labels_match_float64(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 8 * torch.randn(3, 4, 9, generator=generator)
    labels = torch.randint(9, (3, 4), generator=generator)
    found = ops.logprobs_of_labels(logits, labels, temperature)
    np.testing.assert_allclose(found.numpy(), reference_logprobs(logits, labels, temperature), atol=2e-6)


def test_logprobs_of_labels_are_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = torch.randn(5, 3, 7), torch.randint(7, (5, 3))
    whole = ops.logprobs_of_labels(logits, labels)
    monkeypatch.setattr(ops, "_CHUNK_ELEMENTS", 2 * 3 * 7)
    assert torch.equal(ops.logprobs_of_labels(logits, labels), whole)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_of_logprobs_are_those_of_a_log_softmax(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_CHUNK_ELEMENTS", 2 * 9)  # two columns of one row at a time
    logits = torch.randn(3, 5, 9, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.randint(9, (3, 5)), torch.randn(3, 5, dtype=torch.float64)
    (ops.logprobs_of_labels(logits, labels, temperature) * weights).sum().backward()
    found, logits.grad = logits.grad, None
    plain = (logits / temperature).log_softmax(dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    (plain * weights).sum().backward()
    torch.testing.assert_close(found, logits.grad)


def test_gradients_of_half_precision_logits_are_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = (8 * torch.randn(2, 6, 50, generator=generator)).bfloat16().float().requires_grad_()
    half = exact.detach().bfloat16().requires_grad_()
    labels = torch.randint(50, (2, 6), generator=generator)
    for logits in (exact, half):
        ops.logprobs_of_labels(logits, labels).sum().backward()
    assert half.grad is not None and exact.grad is not None
    assert torch.equal(half.grad, exact.grad.bfloat16())


def test_entropy_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(5, 3, 7)
    whole = ops.entropy(logits)
    monkeypatch.setattr(ops, "_CHUNK_ELEMENTS", 2 * 7)
    torch.testing.assert_close(ops.entropy(logits), whole)


def test_logprobs_of_half_precision_logits_are_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 8 * torch.randn(4, 6, 50, generator=generator)
    labels = torch.randint(50, (4, 6), generator=generator)
    half = logits.bfloat16()
    found = ops.logprobs_of_labels(half, labels)
    assert found.dtype == torch.float32
    # Nothing is lost after the rounding of the logits themselves: a log-softmax in bfloat16 is off by up to
    # 0.06.
    np.testing.assert_allclose(found.numpy(), reference_logprobs(half, labels, 1.0), atol=5e-6)
    assert (found - ops.logprobs_of_labels(logits, labels)).abs().max() < 0.15


def test_logprobs_keep_float64() -> None:
    logits, labels = torch.randn(1, 1, 4, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.long)
    assert ops.logprobs_of_labels(logits, labels).dtype == torch.float64


def test_entropy_matches_its_definition() -> None:
    logits = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [math.log(3.0), 0.0, -1e4, -1e4]]])
    by_hand = [math.log(4), -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))]
    assert ops.entropy(logits)[0].tolist() == pytest.approx(by_hand, abs=1e-6)
    # Temperature 0.5 squares the odds: 9 to 1.
    cold = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert ops.entropy(logits, 0.5)[0, 1].item() == pytest.approx(cold, abs=1e-6)


P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
Q = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
KL = 0.2 * math.log(5 / 3)
"""sum p log(p / q), by hand: 0.5 log(5/3) + 0.3 log(3/5)."""


def estimates(estimator: ops.KLEstimator, count: int = 200_000) -> Tensor:
    drawn = torch.multinomial(P, count, replacement=True, generator=torch.Generator().manual_seed(0))
    return ops.kl_estimate(P.log()[drawn].unsqueeze(0), Q.log()[drawn].unsqueeze(0), estimator)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: ops.KLEstimator) -> None:
    found = estimates(estimator)
    standard_error = float(found.std()) / math.sqrt(found.numel())
    assert abs(float(found.mean()) - KL) < 4 * standard_error
    assert standard_error < 0.001


def test_k3_is_never_negative_and_varies_less_than_k1() -> None:
    assert estimates("k1").min() < 0
    assert estimates("k3").min() >= 0
    assert estimates("k3").var() < 0.2 * estimates("k1").var()


def test_k2_is_biased_by_what_theory_says() -> None:
    expected = float((P * 0.5 * (P / Q).log() ** 2).sum())
    found = estimates("k2")
    assert float(found.mean()) == pytest.approx(expected, rel=0.01)
    assert expected - KL > 0.002
    assert found.var() < 0.2 * estimates("k1").var()


def expected_gradient(estimator: ops.KLEstimator) -> Tensor:
    """d/d(logits) of the estimate as a loss, averaged exactly over samples of the policy."""
    logits = P.log().requires_grad_()
    logprobs = logits.log_softmax(-1)
    loss = (P * ops.kl_estimate(logprobs.unsqueeze(0), Q.log().unsqueeze(0), estimator)).sum()
    return torch.autograd.grad(loss, logits)[0]


def test_k2_as_a_loss_has_the_gradient_of_the_kl_and_k3_has_not() -> None:
    analytic = P * ((P / Q).log() - KL)  # of sum p log(p / q) through the softmax
    torch.testing.assert_close(expected_gradient("k2"), analytic, rtol=1e-9, atol=1e-12)
    assert (expected_gradient("k3") - analytic).abs().max() > 0.01
    assert expected_gradient("k1").abs().max() < 1e-12  # its gradient says nothing at all


def test_kl_estimate_of_half_precision_is_float32() -> None:
    half = torch.tensor([[-1.0]], dtype=torch.bfloat16)
    assert ops.kl_estimate(half, half).dtype == torch.float32


def test_clipped_log_ratio_keeps_the_ratio_finite() -> None:
    ratio = ops.clipped_log_ratio(
        torch.tensor([[0.0, -1.0, -500.0]]), torch.tensor([[-500.0, -1.5, 0.0]])
    ).exp()
    assert ratio.isfinite().all() and ratio[0, 1].item() == pytest.approx(math.exp(0.5))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_loss_has_the_gradient_of_the_kl(estimator: ops.KLEstimator) -> None:
    """Over all tokens of a categorical, weighted by their probability, against the analytic gradient."""
    logits = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    logprobs = logits.log_softmax(0)
    weights = logprobs.exp().detach()
    terms = ops.kl_loss_terms(logprobs.unsqueeze(0), reference.unsqueeze(0), estimator)[0]
    (found,) = torch.autograd.grad((weights * terms).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits)
    torch.testing.assert_close(found, expected)
    estimate = ops.kl_estimate(logprobs.unsqueeze(0), reference.unsqueeze(0), estimator)[0]
    torch.testing.assert_close(terms, estimate)

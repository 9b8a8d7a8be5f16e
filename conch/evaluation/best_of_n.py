"""Best-of-n: what the sample with the highest proxy score among n is worth, by the unbiased estimator.

Of N samples of a prompt, sorted so that x_(1) ... x_(N) have rising proxy scores, the expected score of the
best by proxy among n drawn without replacement is (Nakano et al. 2021, "WebGPT")

    sum_{i=n..N} C(i-1, n-1) / C(N, n) * score_(i)

for any score of the samples, the proxy's own or gold. Samples that the proxy holds equal get the mean score
of all that are equal to them: exactly the expectation over all orders among them. Best-of-n is
ln n - (n-1)/n nats away from the policy that samples (Stiennon et al. 2020).

Legend: N samples of a prompt, K values of n, P prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float

from conch.errors import DataError

Column = np.ndarray
LEVEL = 0.95
"""Probability of the intervals."""


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n from the policy that samples, in nats: ln n - (n-1)/n."""
    return math.log(n) - (n - 1) / n


def best_of_n_curve(
    proxy: Float[np.ndarray, " N"], scores: Float[np.ndarray, " N"], ns: Sequence[int]
) -> Float[np.ndarray, " K"]:
    """Expected score of the sample with the highest proxy score among n of one prompt, for each n.

    proxy: what chooses; finite.
    scores: of the same samples in the same order.
    ns: each at least 1 and at most N.

    Raises:
        DataError: an n is out of range, or a number is not finite.
    """
    proxy, scores = np.asarray(proxy, dtype=float), np.asarray(scores, dtype=float)
    if proxy.shape != scores.shape or proxy.ndim != 1:
        raise DataError(f"best-of-n takes one score per proxy score, not {scores.shape} for {proxy.shape}")
    if not (np.isfinite(proxy).all() and np.isfinite(scores).all()):
        raise DataError("best-of-n takes finite scores only: leave samples without one out")
    check_ns(ns, len(proxy))
    order = np.argsort(proxy, kind="stable")
    _, group, sizes = np.unique(proxy, return_inverse=True, return_counts=True)
    means = np.bincount(group, weights=scores) / sizes
    return _weights(len(proxy), tuple(ns)) @ means[group][order]


def check_ns(ns: Sequence[int], num_samples: int) -> None:
    """Refuse numbers of samples to choose from that there are not.

    Raises:
        DataError: with the first of them.
    """
    if not ns:
        raise DataError("best-of-n needs at least one n")
    for n in ns:
        if not 1 <= n <= num_samples:
            raise DataError(
                f"best of {n} cannot be told from {num_samples} samples of a prompt: take an n from 1 to "
                f"{num_samples}, or more samples"
            )


@lru_cache(maxsize=8)
def _weights(num_samples: int, ns: tuple[int, ...]) -> Float[np.ndarray, "K N"]:
    """Probability that the sample of each rank is the best of n.

    In log space from the highest rank down, where the weight is n/N: C(i-1, n-1) / C(i, n-1) = (i-n+1)/i. So
    the weights that count are sums of the fewest terms.
    """
    ranks = np.arange(1, num_samples, dtype=float)
    weights = np.zeros((len(ns), num_samples))
    for row, n in enumerate(ns):
        steps = np.log1p(-(n - 1) / ranks[n - 1 :])  # from rank i+1 to rank i, for i = n ... N-1
        below = np.cumsum(steps[::-1])[::-1]
        weights[row, n - 1 :] = np.exp(math.log(n / num_samples) + np.append(below, 0.0))
    return weights


@dataclass(frozen=True)
class BestOfN:
    """Mean curves over prompts.

    ns: numbers of samples to choose from.
    mean: name of a column -> its expectation at each n.
    interval: the same -> lower and upper end of the bootstrap interval; NaN of a single prompt.
    num_prompts, num_samples: prompts that count, and the fewest samples of one of them.
    left_out_samples: that lack one of the scores.
    left_out_prompts: that have fewer whole samples than the largest n.
    """

    ns: tuple[int, ...]
    mean: Mapping[str, Float[np.ndarray, " K"]]
    interval: Mapping[str, tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]]
    num_prompts: int
    num_samples: int
    left_out_samples: int
    left_out_prompts: int

    @property
    def kl(self) -> Float[np.ndarray, " K"]:
        """KL from the policy that samples at each n, in nats."""
        return np.array([best_of_n_kl(n) for n in self.ns])


def best_of_n(
    prompts: Sequence[Mapping[str, Column]],
    ns: Sequence[int],
    *,
    proxy: str,
    resamples: int = 1000,
    seed: int = 0,
) -> BestOfN:
    """Estimate the curves of all columns, chosen by the column `proxy`, as means over prompts.

    prompts: for each, columns by name, with one number per sample; NaN where a sample has none. A sample that
        lacks one of them is left out, and so is a prompt that keeps fewer than the largest n.
    resamples: bootstrap samples of the prompts, of which the intervals are percentiles; 0 makes none.

    Raises:
        DataError: no prompt has samples enough.
    """
    whole = [_whole_samples(columns) for columns in prompts]
    kept = [columns for columns in whole if len(columns[proxy]) >= max(ns, default=1)]
    if not kept:
        check_ns(ns, max((len(columns[proxy]) for columns in whole), default=0))
    names = list(kept[0])
    curves = {
        name: np.stack([best_of_n_curve(columns[proxy], columns[name], ns) for columns in kept])
        for name in names
    }
    drawn = np.random.default_rng(seed).integers(len(kept), size=(resamples, len(kept)))
    return BestOfN(
        ns=tuple(ns),
        mean={name: rows.mean(axis=0) for name, rows in curves.items()},
        interval={name: _percentiles(rows, drawn) for name, rows in curves.items()},
        num_prompts=len(kept),
        num_samples=min(len(columns[proxy]) for columns in kept),
        left_out_samples=sum(
            len(before[proxy]) - len(after[proxy]) for before, after in zip(prompts, whole, strict=True)
        ),
        left_out_prompts=len(prompts) - len(kept),
    )


def _whole_samples(columns: Mapping[str, Column]) -> dict[str, Column]:
    arrays = {name: np.asarray(column, dtype=float) for name, column in columns.items()}
    is_whole = np.logical_and.reduce([np.isfinite(column) for column in arrays.values()])
    return {name: column[is_whole] for name, column in arrays.items()}


def _percentiles(
    rows: Float[np.ndarray, "P K"], drawn: np.ndarray
) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    if len(rows) < 2 or not len(drawn):
        nothing = np.full(rows.shape[1], math.nan)
        return nothing, nothing
    # Prompt counts times rows, instead of resamples times P times K numbers at once.
    counts = np.stack([np.bincount(row, minlength=len(rows)) for row in drawn])
    means = counts @ rows / len(rows)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high

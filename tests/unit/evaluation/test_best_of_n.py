"""The estimator of best-of-n against full enumeration, its ties, its speed and its intervals."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest

from conch.errors import DataError
from conch.evaluation.best_of_n import best_of_n, best_of_n_curve, best_of_n_kl

NS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 6144, 8192, 12500]


def enumerated(proxy: np.ndarray, scores: np.ndarray, n: int) -> float:
    """Mean over all subsets of size n of the score of the best by proxy, those that tie counted alike."""
    values = []
    for subset in itertools.combinations(range(len(proxy)), n):
        best = max(proxy[i] for i in subset)
        values.append(np.mean([scores[i] for i in subset if proxy[i] == best]))
    return float(np.mean(values))


@pytest.mark.parametrize("num_samples", [1, 2, 5, 9, 12])
@pytest.mark.parametrize("levels", [3, 1000])
def test_curve_agrees_with_full_enumeration(num_samples: int, levels: int) -> None:
    draws = np.random.default_rng(num_samples)
    proxy = draws.integers(levels, size=num_samples).astype(float)  # three levels: nearly all are ties
    scores = draws.normal(size=num_samples)
    ns = range(1, num_samples + 1)

    curve = best_of_n_curve(proxy, scores, ns)

    assert curve == pytest.approx([enumerated(proxy, scores, n) for n in ns], abs=1e-12)


def test_order_of_the_answers_changes_nothing() -> None:
    draws = np.random.default_rng(3)
    proxy, gold = draws.integers(40, size=500).astype(float), draws.normal(size=500)
    order = draws.permutation(500)

    curve = best_of_n_curve(proxy, gold, [1, 7, 100, 500])

    assert best_of_n_curve(proxy[order], gold[order], [1, 7, 100, 500]) == pytest.approx(curve, abs=1e-12)


def test_gold_stays_with_its_answer() -> None:
    proxy = np.array([0.3, 0.9, 0.1, 0.5])
    gold = np.array([30.0, 90.0, 10.0, 50.0])

    assert best_of_n_curve(proxy, gold, [4]) == pytest.approx([90.0])
    assert best_of_n_curve(proxy, gold, [1]) == pytest.approx([45.0])


def test_all_answers_alike_are_worth_their_mean_at_every_n() -> None:
    scores = np.arange(6.0)

    assert best_of_n_curve(np.ones(6), scores, [1, 3, 6]) == pytest.approx([2.5, 2.5, 2.5])


def test_the_seed_s_list_takes_well_under_a_second_and_agrees_with_whole_numbers() -> None:
    draws = np.random.default_rng(0)
    proxy, gold = draws.normal(size=12600), draws.normal(size=12600)
    started = time.perf_counter()

    curve = best_of_n_curve(proxy, gold, NS)

    assert time.perf_counter() - started < 1.0
    ordered = gold[np.argsort(proxy)].tolist()
    for n, value in ((1, curve[0]), (128, curve[7]), (12500, curve[-1])):
        ranks = range(n, 12601)
        total = math.comb(12600, n)
        below = [math.comb(n - 1, n - 1)]
        for i in range(n, 12600):  # C(i, n-1) of C(i-1, n-1), in whole numbers
            below.append(below[-1] * i // (i - n + 1))
        exact = math.fsum(
            ordered[i - 1] * float(_ratio(count, total)) for i, count in zip(ranks, below, strict=True)
        )
        assert value == pytest.approx(exact, abs=1e-10)


def _ratio(count: int, total: int) -> float:
    """Two whole numbers of thousands of digits as a fraction: shifted, so that both fit a float."""
    shift = max(total.bit_length() - 900, 0)
    return (count >> shift) / (total >> shift)


def test_kl_is_zero_for_one_and_that_of_the_paper_for_12500() -> None:
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(12500) == pytest.approx(8.4336, abs=1e-4)


@pytest.mark.parametrize("ns", [[5], [0], []])
def test_n_that_the_samples_do_not_give_is_refused(ns: list[int]) -> None:
    with pytest.raises(DataError, match="best"):
        best_of_n_curve(np.arange(4.0), np.arange(4.0), ns)


def test_samples_without_a_score_are_left_out_and_counted() -> None:
    nan = math.nan
    whole = {"reward": np.array([1.0, 2.0]), "gold": np.array([5.0, 7.0])}
    holes = {"reward": np.array([1.0, nan, 2.0, 9.0]), "gold": np.array([5.0, 8.0, 7.0, nan])}
    short = {"reward": np.array([1.0, nan]), "gold": np.array([0.0, 0.0])}

    result = best_of_n([whole, holes, short], [1, 2], proxy="reward")

    assert result.mean["gold"] == pytest.approx([6.0, 7.0])
    assert (result.left_out_samples, result.left_out_prompts, result.num_prompts) == (3, 1, 2)


def test_interval_covers_the_mean_repeats_and_narrows_with_prompts() -> None:
    draws = np.random.default_rng(1)
    prompts = [
        {"reward": draws.normal(size=20), "gold": draws.normal(loc=level, size=20)}
        for level in draws.normal(size=200)
    ]

    few, many = (best_of_n(prompts[:count], [1, 4], proxy="reward", seed=5) for count in (10, 200))

    widths = []
    for result in (few, many):
        low, high = result.interval["gold"]
        assert (low < result.mean["gold"]).all() and (result.mean["gold"] < high).all()
        widths.append(float((high - low)[0]))
    assert 2 < widths[0] / widths[1] < 10  # about sqrt(20)
    again = best_of_n(prompts[:10], [1, 4], proxy="reward", seed=5)
    assert (again.interval["gold"][0] == few.interval["gold"][0]).all()


def test_single_prompt_has_no_interval() -> None:
    result = best_of_n([{"reward": np.arange(3.0)}], [1, 2], proxy="reward")

    assert np.isnan(result.interval["reward"][0]).all()


def test_largest_n_above_all_prompts_is_refused() -> None:
    with pytest.raises(DataError, match="best of 8 cannot be told from 3 samples"):
        best_of_n([{"reward": np.arange(3.0)}], [1, 8], proxy="reward")

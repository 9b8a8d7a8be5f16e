"""Fits of alpha and beta on curves whose coefficients are known, their intervals, and gamma."""

from __future__ import annotations

import math

import numpy as np
import pytest

from conch.errors import DataError
from conch.evaluation.best_of_n import best_of_n_kl
from conch.evaluation.fits import Fit, Form, fit_best_of_n, fit_rl, fit_seeds, gamma, student_quantile

NOWHERE = (math.nan, math.nan)


def known(form: Form, alpha: float, beta: float) -> Fit:
    return Fit(alpha, beta, NOWHERE, NOWHERE, form)


def curve(form: Form, kl: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """The paper's two forms, written out point by point."""
    values = []
    for d in np.sqrt(kl):
        inner = alpha - beta * d if form == "best_of_n" else alpha - beta * math.log(d) if d > 0 else 0.0
        values.append(d * inner)
    return np.array(values)


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
def test_coefficients_of_an_exact_curve_come_back_and_its_start_does_no_harm(form: Form) -> None:
    kl = np.array([0.0, 0.2, 1.0, 4.0, 9.0, 30.0])
    gain = curve(form, kl, 1.7, 0.4)
    kl[0] = -0.003  # an estimate of zero

    fit = (fit_best_of_n if form == "best_of_n" else fit_rl)(kl, gain)

    assert (fit.alpha, fit.beta) == pytest.approx((1.7, 0.4), abs=1e-12)
    assert fit.gain(kl) == pytest.approx(gain, abs=1e-10)
    assert fit.gain([-1.0, 0.0]) == pytest.approx([0.0, 0.0])


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
def test_interval_of_one_curve_covers_the_truth_as_often_as_it_says(form: Form) -> None:
    draws = np.random.default_rng(2)
    kl = np.linspace(0.5, 20, 4)
    truth = curve(form, kl, 1.0, 0.2)
    hits = 0
    for _ in range(400):
        fit = (fit_best_of_n if form == "best_of_n" else fit_rl)(kl, truth + draws.normal(size=4) * 0.2)
        hits += fit.alpha_interval[0] < 1.0 < fit.alpha_interval[1]

    assert 0.91 <= hits / 400 <= 0.98


def test_interval_over_seeds_is_student_s_around_the_mean_of_their_fits() -> None:
    kl = np.array([1.0, 4.0, 9.0, 16.0])
    seeds = [(kl, curve("rl", kl, alpha, 0.3)) for alpha in (1.0, 1.2, 1.7)]

    fit = fit_seeds(seeds, "rl")

    half = 4.302653 * np.std([1.0, 1.2, 1.7], ddof=1) / math.sqrt(3)
    assert fit.alpha == pytest.approx(1.3)
    assert fit.alpha_interval == pytest.approx((1.3 - half, 1.3 + half), abs=1e-5)
    assert fit.beta_interval == pytest.approx((0.3, 0.3), abs=1e-9)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_student_s_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, abs=1e-4)


@pytest.mark.parametrize("kl", [[], [0.0, 0.0, -1.0, 2.0], [1.0, 2.0], [1.0, 1.0, 1.0, 2.0]])
def test_too_few_evaluations_are_refused_in_one_sentence(kl: list[float]) -> None:
    with pytest.raises(DataError, match="too few for a fit of alpha and beta: it takes 3"):
        fit_rl(kl, [1.0] * len(kl))


def test_points_that_gold_did_not_score_are_left_out() -> None:
    kl = np.array([1.0, 4.0, 9.0, 16.0, 25.0])
    gain = curve("best_of_n", kl, 2.0, 0.1)
    gain[2] = math.nan

    assert fit_best_of_n(kl, gain).alpha == pytest.approx(2.0)


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.02), (1.5, 0.4), (0.8, 0.5)])
def test_gamma_agrees_with_sums_over_a_fine_grid(form: Form, alpha: float, beta: float) -> None:
    gold, proxy = known(form, 1.0, 0.2), known(form, alpha, beta)
    middles = (np.arange(200_000) + 0.5) / 200_000 * math.sqrt(9.0)
    f, g = gold.gain(middles**2), proxy.gain(middles**2)

    assert gamma(gold, proxy, 9.0) == pytest.approx(np.abs(f - g).sum() / f.sum(), rel=1e-6)


def test_gamma_is_zero_for_gold_itself_and_undefined_where_gold_gains_nothing() -> None:
    gold = known("rl", 1.0, 0.2)

    assert gamma(gold, gold, 9.0) == 0.0
    assert math.isnan(gamma(known("rl", -1.0, 0.0), gold, 9.0))
    with pytest.raises(DataError, match="one form"):
        gamma(gold, known("best_of_n", 1.0, 0.2), 9.0)


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
def test_peak_is_where_the_curve_is_highest(form: Form) -> None:
    fit = known(form, 1.0, 0.25)
    grid = np.linspace(0.01, 600, 500_000)

    assert fit.peak_kl == pytest.approx(grid[fit.gain(grid).argmax()], rel=1e-3)
    assert known(form, 1.0, -0.1).peak_kl == math.inf


def test_best_of_n_curve_of_normal_scores_fits_well() -> None:
    ns = [2**k for k in range(14)]
    kl = np.array([best_of_n_kl(n) for n in ns])
    draws = np.random.default_rng(0)
    gold = np.array([draws.normal(size=(400, n)).max(axis=1).mean() for n in ns])

    fit = fit_best_of_n(kl, gold)

    assert np.abs(fit.gain(kl) - gold).max() < 0.15

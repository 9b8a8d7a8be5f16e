"""Fits of how gold moves with the distance d = sqrt(KL) from the starting policy (Gao, Schulman & Hilton
2022, "Scaling laws for reward model overoptimization", arXiv:2210.10760):

    best-of-n:  R(d) = d (alpha - beta d)
    RL:         R(d) = d (alpha - beta ln d)

Both are linear in alpha and beta, which least squares gives. R is a gain over the starting policy: R(0) = 0.
Also the degree of overoptimisation of Kim et al. 2025 (arXiv:2505.12763).

Intervals of 95 %: of one curve by the linear model's covariance and Student's t, as if its points erred
independently, which those of a best-of-n curve do not; of several seeds by Student's t over the seeds' own
fits, which asks for nothing but independent seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from conch.errors import DataError

Form = Literal["best_of_n", "rl"]
Interval = tuple[float, float]
_LEVEL = 0.95
_FEWEST_POINTS = 3


@dataclass(frozen=True)
class Fit:
    """Coefficients of one form.

    alpha, beta: gain per sqrt(nat), and its loss per sqrt(nat) or per e-fold of it.
    alpha_interval, beta_interval: lower and upper end; NaN where the seeds are fewer than two and the points
        three.
    form: which of the two.
    """

    alpha: float
    beta: float
    alpha_interval: Interval
    beta_interval: Interval
    form: Form

    def gain(self, kl: Any) -> np.ndarray:
        """R at these KLs, in nats; 0 where KL is 0 or below, as an estimate near the start may be."""
        return _design(np.asarray(kl, dtype=float), self.form) @ np.array([self.alpha, self.beta])

    @property
    def peak_kl(self) -> float:
        """KL at which R is highest, in nats; infinite where R never falls, 0 where it never rises."""
        if self.form == "best_of_n":
            if self.alpha <= 0:
                return 0.0
            return math.inf if self.beta <= 0 else (self.alpha / (2 * self.beta)) ** 2
        if self.beta == 0:
            return math.inf if self.alpha > 0 else 0.0
        # With a negative beta, R falls first and then rises without end.
        return math.inf if self.beta < 0 else math.exp(min(2 * (self.alpha / self.beta - 1), 700.0))

    def integral(self, d: float) -> float:
        """Integral of R from 0 to the distance d."""
        if d <= 0:
            return 0.0
        square = self.alpha * d**2 / 2
        if self.form == "best_of_n":
            return square - self.beta * d**3 / 3
        return square - self.beta * d**2 * (math.log(d) / 2 - 0.25)


def fit_best_of_n(kl: Any, gain: Any) -> Fit:
    """Fit d (alpha - beta d) to one curve.

    kl: in nats; points at 0 or below say nothing of the coefficients.
    gain: score less that of the starting policy.

    Raises:
        DataError: fewer than three points lie away from the start.
    """
    return fit_seeds([(kl, gain)], "best_of_n")


def fit_rl(kl: Any, gain: Any) -> Fit:
    """Fit d (alpha - beta ln d) to one curve; see `fit_best_of_n`."""
    return fit_seeds([(kl, gain)], "rl")


def fit_seeds(curves: Sequence[tuple[Any, Any]], form: Form) -> Fit:
    """Fit the mean of the seeds' own fits.

    curves: (KL, gain) of each seed.

    Raises:
        DataError: one has fewer than three points away from the start.
    """
    fits = [_least_squares(kl, gain, form) for kl, gain in curves]
    if len(fits) == 1:
        ((alpha, beta), (alpha_error, beta_error), freedom) = fits[0]
    else:
        own = np.array([coefficients for coefficients, _, _ in fits])
        (alpha, beta), freedom = own.mean(axis=0), len(fits) - 1
        alpha_error, beta_error = own.std(axis=0, ddof=1) / math.sqrt(len(fits))
    width = student_quantile((1 + _LEVEL) / 2, freedom)
    return Fit(
        alpha=float(alpha),
        beta=float(beta),
        alpha_interval=_around(alpha, width * alpha_error),
        beta_interval=_around(beta, width * beta_error),
        form=form,
    )


def gamma(gold_fit: Fit, proxy_fit: Fit, kl_max: float) -> float:
    """Degree of overoptimisation: the integral of |gold - proxy| over that of gold, of the fitted curves.

    Over d from 0 to sqrt(kl_max). 0 where the proxy is gold; NaN where gold gains nothing in all. Proxy and
    gold must have one scale: gains in standard deviations of the starting policy's scores.

    Raises:
        DataError: the fits are of two forms.
    """
    if gold_fit.form != proxy_fit.form:
        raise DataError(f"gamma compares two fits of one form, not {gold_fit.form} and {proxy_fit.form}")
    end = math.sqrt(max(0.0, kl_max))
    whole = gold_fit.integral(end)
    if whole <= 0:
        return math.nan
    nowhere = (math.nan, math.nan)
    alpha, beta = gold_fit.alpha - proxy_fit.alpha, gold_fit.beta - proxy_fit.beta
    difference = Fit(alpha, beta, nowhere, nowhere, gold_fit.form)
    # d (alpha - beta d) changes sign once behind 0, d (alpha - beta ln d) as well.
    crossing = 0.0
    if beta != 0:
        ratio = alpha / beta
        crossing = ratio if gold_fit.form == "best_of_n" else math.exp(min(ratio, 700.0))
    crossing = min(max(crossing, 0.0), end)
    before = difference.integral(crossing)
    return (abs(before) + abs(difference.integral(end) - before)) / whole


def _least_squares(kl: Any, gain: Any, form: Form) -> tuple[np.ndarray, np.ndarray, int]:
    """Coefficients, their standard errors and the degrees of freedom."""
    kl, gain = np.asarray(kl, dtype=float), np.asarray(gain, dtype=float)
    used = np.isfinite(kl) & np.isfinite(gain) & (kl > 0)
    kl, gain = kl[used], gain[used]
    if (count := len(np.unique(kl))) < _FEWEST_POINTS:
        raise DataError(
            f"{count} scored points away from the starting policy are too few for a fit of alpha and beta: "
            f"it takes {_FEWEST_POINTS}; evaluate more often, or at more n"
        )
    design = _design(kl, form)
    coefficients, _, _, _ = np.linalg.lstsq(design, gain, rcond=None)
    freedom = len(gain) - 2
    variance = float(np.square(gain - design @ coefficients).sum()) / freedom
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    return coefficients, errors, freedom


def _design(kl: np.ndarray, form: Form) -> Float[np.ndarray, "M 2"]:
    """R's derivatives by alpha and beta; d ln d is 0 at the start, its limit."""
    d = np.sqrt(np.maximum(kl, 0.0))
    factor = d if form == "best_of_n" else np.log(np.where(d > 0, d, 1.0))
    return np.stack([d, -d * factor], axis=-1)


def _around(value: float, half: float) -> Interval:
    return float(value - half), float(value + half)


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile above the median of Student's t with a whole number of degrees of freedom."""
    low, high = 0.0, 1.0
    while _student_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _student_cdf(t: float, freedom: int) -> float:
    """Abramowitz & Stegun 1964, equations 26.7.3 and 26.7.4, for t >= 0."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    if freedom % 2:
        term, total = cosine, 0.0
        for k in range(3, freedom + 1, 2):
            total += term
            term *= cosine**2 * (k - 1) / k
        inside = 2 / math.pi * (angle + sine * total)
    else:
        term, total = 1.0, 0.0
        for k in range(2, freedom + 1, 2):
            total += term
            term *= cosine**2 * (k - 1) / k
        inside = sine * total
    return (1 + inside) / 2

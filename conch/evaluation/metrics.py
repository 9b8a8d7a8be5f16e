"""How well a reward model's scores agree with judgements that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from conch.errors import DataError
from conch.rewards.function import arguments_of
from conch.types import Metrics, Rollout

_NUM_BINS = 10


def score_metrics(
    predicted: Sequence[Sequence[float]], targets: Sequence[Sequence[float]], names: Sequence[str]
) -> Metrics:
    """Spearman's rank correlation with the wanted scores, rows of one number per objective: the mean over
    objectives, and of several each by its name."""
    columns = zip(zip(*predicted, strict=True), zip(*targets, strict=True), strict=True)
    correlations = [rank_correlation(left, right) for left, right in columns]
    named = dict(zip(names, correlations, strict=True)) if len(names) > 1 else {}
    return {
        "eval/spearman": float(np.mean(correlations)),
        **{f"eval/spearman/{name}": value for name, value in named.items()},
    }


def pair_metrics(
    scores: Sequence[Sequence[float]], objectives: Sequence[int], names: Sequence[str]
) -> Metrics:
    """Accuracy and calibration of scores (chosen, rejected): over all pairs, and of several objectives the
    accuracy of each that pairs are about, by its name."""
    ahead = np.array([chosen - rejected for chosen, rejected in scores])
    metrics = {"eval/accuracy": accuracy(ahead), "eval/calibration_error": calibration_error(ahead)}
    if len(names) > 1:
        about = np.array(objectives)
        metrics |= {f"eval/accuracy/{names[k]}": accuracy(ahead[about == k]) for k in sorted(set(objectives))}
    return metrics


def accuracy(ahead: np.ndarray) -> float:
    """Share of pairs whose chosen text is ahead, given by how much it is; a tie counts one half."""
    return float(np.heaviside(ahead, 0.5).mean())


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Pairs of like confidence.

    low, high: between which confidences.
    count: pairs.
    confidence: its mean.
    right: how often the text that scores higher is the chosen one.
    """

    low: float
    high: float
    count: int
    confidence: float
    right: float


def reliability(ahead: np.ndarray) -> list[ReliabilityBin]:
    """How often the text that scores higher is the chosen one, for each confidence in it, which is
    sigmoid(|difference|); a tie is right by one half. Ten bins of equal width between 1/2 and 1,
    those without pairs left out.

    ahead: score of the chosen text less that of the other, [pairs].
    """
    confidence = 0.5 + 0.5 * np.tanh(np.abs(ahead) / 2)
    right = np.heaviside(ahead, 0.5)
    bins = np.minimum(((confidence - 0.5) * 2 * _NUM_BINS).astype(int), _NUM_BINS - 1)
    return [
        ReliabilityBin(
            0.5 + number / (2 * _NUM_BINS),
            0.5 + (number + 1) / (2 * _NUM_BINS),
            int((bins == number).sum()),
            float(confidence[bins == number].mean()),
            float(right[bins == number].mean()),
        )
        for number in sorted(set(bins.tolist()))
    ]


def calibration_error(ahead: np.ndarray) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3) over the bins of `reliability`; 0 is
    perfect."""
    gaps = (each.count * abs(each.right - each.confidence) for each in reliability(ahead))
    return float(sum(gaps) / len(ahead))


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's rho, with average ranks for ties; 0 where one side does not vary."""
    x, y = _ranks(left), _ranks(right)
    if x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


MetricFn = Callable[..., Mapping[str, Sequence[float] | float]]
"""`f(samples, prompts, outputs, **metadata)` -> name -> one value per sample, or one for all."""


def metric_columns(metric_fn: MetricFn | None, rollouts: Sequence[Rollout]) -> dict[str, list[float]]:
    """The user's metrics, one column each, with one value per rollout."""
    if metric_fn is None:
        return {}
    columns = metric_fn(**arguments_of(metric_fn, rollouts))
    return {name: _column(name, values, len(rollouts)) for name, values in columns.items()}


def _column(name: str, values: Any, count: int) -> list[float]:
    """A metric as one number per sample, whether it came as a list, an array or one number for all."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence):
        return [float(values)] * count
    if len(values) != count:
        raise DataError(f"metric_fn gave {len(values)} values of `{name}` for {count} samples")
    return [float(value) for value in values]


def mean_of_finite(column: Sequence[float]) -> float:
    """Mean of what is a number; NaN where nothing is."""
    finite = [value for value in column if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan

"""Held-out metrics of reward models, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from conch.evaluation.metrics import (
    accuracy,
    calibration_error,
    pair_metrics,
    rank_correlation,
    score_metrics,
)


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([1, 2, 3], [10, 20, 1000], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        # Ranks 1 2 3 4 5 against 2 1 4 3 5: 1 - 6 * 4 / (5 * 24).
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),
        # Ranks 1 2.5 2.5 4 against 1 2 3 4: covariance 4.5, squares 4.5 and 5.
        ([0, 5, 5, 9], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5)),
        # Ranks 2 2 2 4 against 1.5 1.5 3.5 3.5: covariance 2, squares 3 and 4.
        ([7, 7, 7, 8], [0, 0, 1, 1], 2 / math.sqrt(3 * 4)),
        ([1, 1, 1], [1, 2, 3], 0.0),
    ],
)
def test_rank_correlation_by_hand(left: list[float], right: list[float], expected: float) -> None:
    x, y = [float(value) for value in left], [float(value) for value in right]
    assert rank_correlation(x, y) == pytest.approx(expected)
    assert rank_correlation(y, x) == pytest.approx(expected)


def test_score_metrics_name_several_objectives() -> None:
    predicted, wanted = [[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]], [[10.0, 1.0], [20.0, 2.0], [30.0, 3.0]]
    assert score_metrics(predicted, wanted, ["kind", "brief"]) == {
        "eval/spearman": pytest.approx(0.0),
        "eval/spearman/kind": pytest.approx(1.0),
        "eval/spearman/brief": pytest.approx(-1.0),
    }
    single = score_metrics([row[:1] for row in predicted], [row[:1] for row in wanted], ["reward"])
    assert single == {"eval/spearman": pytest.approx(1.0)}


def test_ties_are_half_right() -> None:
    assert accuracy(np.array([2.0, 0.1, 0.0, -3.0])) == 2.5 / 4


@pytest.mark.parametrize(
    ("ahead", "expected"),
    [
        # Confidence 0.8 in four pairs, three of them right: |0.75 - 0.8|.
        ([logit(0.8), logit(0.8), logit(0.8), -logit(0.8)], 0.05),
        # As sure of two pairs, both wrong.
        ([-logit(0.8), -logit(0.8)], 0.8),
        # Bins of 0.05: 0.62 and 0.64 share one (half right: |1 - 1.26| / 4), 0.72 and 0.97 do not.
        ([logit(0.62), -logit(0.64), logit(0.72), -logit(0.97)], (0.26 + 0.28 + 0.97) / 4),
        # 0.62 and 0.66 stand in two bins: what the one is short of the other may not fill.
        ([logit(0.62), -logit(0.66)], (0.38 + 0.66) / 2),
        # Quite sure, and right.
        ([50.0, 1000.0], 0.0),
        # Not sure at all, and neither right nor wrong.
        ([0.0, 0.0], 0.0),
    ],
)
def test_calibration_error_by_hand(ahead: list[float], expected: float) -> None:
    assert calibration_error(np.array(ahead)) == pytest.approx(expected, abs=1e-12)


def test_calibration_error_of_honest_confidence_vanishes() -> None:
    rng = np.random.default_rng(0)
    gap = rng.normal(size=200_000) * 2
    right = rng.random(gap.size) < 1 / (1 + np.exp(-np.abs(gap)))
    honest = np.where(right, np.abs(gap), -np.abs(gap))
    assert calibration_error(honest) < 0.005
    assert calibration_error(honest * 3) > 0.05  # the same order, three times too sure


def test_pair_metrics_name_the_objectives_that_pairs_are_about() -> None:
    metrics = pair_metrics([[1.0, 0.0], [0.0, 1.0], [3.0, 2.0]], [0, 0, 2], ["kind", "brief", "true"])
    assert metrics["eval/accuracy"] == pytest.approx(2 / 3)
    assert metrics["eval/accuracy/kind"] == 0.5 and metrics["eval/accuracy/true"] == 1.0
    assert "eval/accuracy/brief" not in metrics
    assert set(pair_metrics([[1.0, 0.0]], [0], ["reward"])) == {"eval/accuracy", "eval/calibration_error"}

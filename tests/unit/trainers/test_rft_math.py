"""Which completions RFT keeps, by hand."""

from __future__ import annotations

import math

import pytest

from conch.config import load
from conch.data.samples import TokenizedSample
from conch.errors import ConfigError
from conch.trainers.rft import (
    Candidates,
    RFTConfig,
    Selection,
    group_by_prompt,
    keep_best,
    percentile_at,
)

A, B, C, D, E = (1,), (2,), (3, 3), (4,), (5, 6)


def kept(scores: list[float], percentile: float, min_score: float | None = None) -> list[float]:
    """Scores that are kept of completions which all differ."""
    completions = tuple((index,) for index in range(len(scores)))
    return sorted(
        keep_best(Candidates((9,), completions, tuple(scores)), percentile, min_score).scores.values()
    )


@pytest.mark.parametrize(("steps", "expected"), [(4, [0.6, 0.7, 0.8, 0.9]), (2, [0.6, 0.9]), (1, [0.6])])
def test_percentile_rises_from_start_to_end(steps: int, expected: list[float]) -> None:
    config = RFTConfig(start_percentile=0.6, end_percentile=0.9, n_improve_steps=steps)
    assert [percentile_at(step, config) for step in range(steps)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("percentile", "expected"),
    [
        (0.0, [2.0, 3.0, 4.0, 5.0]),  # the worst is left out all the same
        (0.5, [3.0, 4.0, 5.0]),  # the median is 3, and is kept
        (0.6, [4.0, 5.0]),  # between 3 and 4
        (0.75, [4.0, 5.0]),
        (0.95, [5.0]),
        (1.0, [5.0]),
    ],
)
def test_scores_at_or_above_the_percentile_are_kept(percentile: float, expected: list[float]) -> None:
    assert kept([3.0, 1.0, 5.0, 2.0, 4.0], percentile) == expected


def test_the_worst_go_although_the_percentile_is_among_them() -> None:
    assert kept([0.0] * 9 + [0.25], 0.7) == [0.25]
    assert kept([0.0] * 7 + [0.25, 0.5, 0.5], 0.5) == [0.25, 0.5, 0.5]


def test_equal_scores_are_all_kept() -> None:
    assert kept([0.1, 0.1, 0.1], 0.95) == [0.1, 0.1, 0.1]
    assert kept([-2.0], 0.7) == [-2.0]


@pytest.mark.parametrize(("min_score", "expected"), [(1.5, [2.0]), (2.0, [2.0]), (2.1, []), (-9.0, [2.0])])
def test_min_score_bounds_the_percentile_from_below(min_score: float, expected: list[float]) -> None:
    assert kept([1.0, 2.0, 1.0], 0.5, min_score) == expected
    assert kept([0.0, 0.0], 0.5, min_score) == ([] if min_score > 0 else [0.0, 0.0])


def test_a_completion_is_kept_once_with_its_best_score() -> None:
    found = keep_best(Candidates((9,), (A, B, A, C, A), (2.0, 1.0, 3.0, 2.5, 2.0)), 0.5, None)
    assert found == Selection((9,), 2.0, {A: 3.0, C: 2.5})
    alike = keep_best(Candidates((9,), (C, C, C), (1.0, 1.0, 1.0)), 0.7, None)
    assert alike.scores == {C: 1.0}


def test_duplicates_count_in_the_percentile() -> None:
    # Of ten samples nine are one completion: the median is its score, whatever the tenth has.
    found = keep_best(Candidates((9,), (A,) * 9 + (B,), (2.0,) * 9 + (1.0,)), 0.5, None)
    assert found.threshold == 2.0 and list(found.scores) == [A]


def test_rows_are_grouped_by_prompt_in_an_order_that_ranks_do_not_change() -> None:
    nan = math.nan
    plain = [((7,), B, 1.0), ((6, 5), C, 0.5), ((7,), A, 2.0), ((7,), D, nan), ((8,), E, nan)]
    rows = [(prompt, "", completion, score) for prompt, completion, score in plain]
    expected = [Candidates((6, 5), (C,), (0.5,)), Candidates((7,), (A, B), (2.0, 1.0))]
    assert group_by_prompt(rows) == expected
    assert group_by_prompt(rows[::-1]) == expected
    assert group_by_prompt([]) == []


def test_samples_learn_the_completion_alone() -> None:
    samples = Selection((7, 8), 0.0, {C: 1.0, D: 0.5}).samples()
    assert samples == [
        TokenizedSample((7, 8, 3, 3), (False, False, True, True)),
        TokenizedSample((7, 8, 4), (False, False, True)),
    ]


def test_a_bar_that_falls_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`end_percentile` = 0.5 is below `start_percentile` = 0.7"):
        load(RFTConfig, {"end_percentile": 0.5})

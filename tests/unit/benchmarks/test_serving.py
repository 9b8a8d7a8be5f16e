"""What the serving benchmark computes, without models: a wrong figure would look like any other."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.measuring import check_scores
from benchmarks.serving import Row, _report, _take_turns, table
from conch.errors import ConchError

ALONE, SERVED, OTHER = "in process", "served", "served otherwise"


def report() -> dict[str, Any]:
    """Three rounds of 12 samples; the second limit is there to be confused with the first."""
    rows = [
        Row(ALONE, 12, None, [1.0, 2.0, 3.0]),
        Row("in process, otherwise", 12, None, [9.0, 9.0, 9.0]),
        Row(SERVED, 12, ALONE, [2.0, 2.0, 4.0]),
    ]
    limit: Any = SimpleNamespace(budget=2048)
    return _report(argparse.Namespace(samples=12), limit, rows, [3, 5, 10])


def test_a_ratio_is_of_two_runs_of_one_round() -> None:
    served = report()["results"][2]
    assert served["samples_per_s"] == {"median": 6.0, "low": 3.0, "high": 6.0}
    assert served["ratio"] == {"median": 0.75, "low": 0.5, "high": 1.0}  # 1/2, 2/2, 3/4
    assert report()["results"][0]["ratio"] is None
    assert report()["tokens"] == {"median": 5, "longest": 10, "all": 18}
    assert report()["limit_tokens_per_batch"] == 2048


def test_the_table_shows_medians_and_ranges() -> None:
    lines = table(report()).splitlines()
    assert lines[2] == "| in process | 6.0 (4.0-12.0) | 1 |"
    assert lines[4] == "| served | 6.0 (3.0-6.0) | 0.75 (0.50-1.00) |"


def test_the_order_of_the_ways_turns_round_each_time(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    def way(name: str) -> tuple[Any, str | None]:
        return lambda: asked.append(name), None if name == ALONE else ALONE

    rows = _take_turns({name: way(name) for name in (ALONE, SERVED, OTHER)}, 3, 12)
    assert asked == [ALONE, SERVED, OTHER, OTHER, SERVED, ALONE, ALONE, SERVED, OTHER]
    assert [(row.name, row.limit, len(row.seconds)) for row in rows] == [
        (ALONE, None, 3),
        (SERVED, ALONE, 3),
        (OTHER, ALONE, 3),
    ]
    assert "round 3: served otherwise: " in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_ways_that_score_otherwise_are_not_compared(wrong: float) -> None:
    check_scores({ALONE: [1.0, 2.0], SERVED: [1.0, 2.0], OTHER: [1.00001, 2.0]})
    for scores in ([wrong, 2.0], [1.0, 1.0 + wrong]):
        with pytest.raises(ConchError, match=r"served otherwise differs by .* from in process"):
            check_scores({ALONE: [1.0, 2.0], SERVED: [1.0, 2.0], OTHER: scores})

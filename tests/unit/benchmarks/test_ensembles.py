"""The benchmark of ensembles: what it compares, and what it makes of the times."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.ensembles import Way, table, take_turns, texts_of
from conch.errors import ConchError


def test_texts_have_their_number_of_tokens_and_differ() -> None:
    texts = texts_of(8, 16)
    assert {len(text.split()) for text in texts} == {16} and len(set(texts)) == 8


def test_ways_take_turns_after_a_round_that_warms_up() -> None:
    calls: list[str] = []

    def way(name: str, score: float) -> Way:
        return Way(name, lambda texts: (calls.append(name), np.full((len(texts), 2), score))[1])

    figures = take_turns([way("a", 1.0), way("b", 1.0)], ["x", "y"], rounds=6)
    assert calls == ["a", "b"] * 8
    assert [figure["way"] for figure in figures] == ["a", "b"]
    assert figures[0]["over"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert figures[1]["over"]["median"] > 0
    with pytest.raises(ConchError, match="c scores other than a"):
        take_turns([way("a", 1.0), way("c", 1.1)], ["x"], rounds=5)
    with pytest.raises(ConchError, match="c scores other than a"):
        take_turns([way("a", 1.0), way("c", float("nan"))], ["x"], rounds=5)


def test_the_table_has_a_line_for_each_size() -> None:
    one = {"median": 1.0, "low": 1.0, "high": 1.0}
    ways = [
        {"way": name, "ms": {"median": 12.0, "low": 11.0, "high": 14.0}, "over": one}
        for name in ("a", "b", "c")
    ]
    result = {"shape": "2 layers", "rows": 4, "tokens": 16, "where": "served", "ways": ways}
    report = {"machine": {"cpu": "a processor"}, "date": "2026-11-29", "results": [result]}
    assert "| 2 layers | 4 x 16 | 12.0 (11.0-14.0) | 1.00 (1.00-1.00) | 1.00 (1.00-1.00) |" in table(report)

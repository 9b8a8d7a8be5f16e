"""The benchmarks of growth and of checkpoints: their arithmetic, and what they make of figures."""

from __future__ import annotations

import pytest
from transformers import GPT2LMHeadModel

from benchmarks.checkpointing import WAYS, summary
from benchmarks.growth import BASE, MOVES, pass_flop, rows_of, weights
from benchmarks.sized import shape_of


@pytest.mark.parametrize("size", ["0.1M", "1M"])
def test_weights_are_those_of_the_model(size: str) -> None:
    assert weights(size) == sum(p.numel() for p in GPT2LMHeadModel(shape_of(size)).parameters())


def test_shapes_have_the_weights_of_their_names() -> None:
    assert [round(weights(size) / 1e6) for size in MOVES["size"]] == [1, 11, 30, 98]


def test_a_pass_is_two_flop_a_weight_and_attention() -> None:
    # One block of width 64, 512 words. A token attends to itself: 2 x 64 for its weight, 2 x 64 for its sum.
    assert pass_flop("0.1M", 1) == 2 * (12 * 64 * 64 + 64 * 512) + 4 * 64
    # The second of two tokens attends to twice as much: 3/2 on average.
    assert pass_flop("0.1M", 2) - pass_flop("0.1M", 1) == 4 * 64 / 2


def test_each_row_but_the_first_moves_one_value() -> None:
    base, *others = rows_of(BASE, MOVES)
    assert base == BASE and len(others) == 3 + 3 + 3 + 1
    assert all(sum(row[name] != base[name] for name in base) == 1 for row in others)


def test_ratios_are_of_each_pair() -> None:
    row = {"steps": 2, "step": 1.0, "copied_bytes": 5}
    waited = [{**row, "stop": stop, "write": stop, "beside": 0.0} for stop in (10.0, 20.0)]
    beside = [{**row, "stop": 1.0, "write": write, "beside": 1.0} for write in (8.0, 16.0)]
    found = summary({"ways": dict(zip(WAYS, (waited, beside), strict=True)), "bytes": 1, "peak_bytes": 2})
    assert found["ratios"]["stop_over_own_write"] == {"median": 3 / 32, "low": 1 / 16, "high": 1 / 8}
    assert found["ratios"]["stop_over_waited_write"]["low"] == 1 / 20
    assert found["ratios"]["lost_over_waited"]["high"] == 2 / 10

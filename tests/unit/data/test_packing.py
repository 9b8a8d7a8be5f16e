"""Packing by hand."""

from __future__ import annotations

import random

import pytest

from conch.data.packing import collate_packed
from conch.data.samples import TokenizedSample
from conch.ops import first_fit

PAD = 9


def test_first_fit_puts_the_longest_first_and_each_where_there_is_room() -> None:
    assert first_fit([2, 5, 3, 1, 4], capacity=7) == [[1, 0], [4, 2], [3]]
    assert first_fit([2, 5, 3, 1, 4], capacity=8) == [[1, 2], [4, 0, 3]]
    assert first_fit([3, 3, 3], capacity=3) == [[0], [1], [2]]


def test_first_fit_places_every_sample_once_within_capacity() -> None:
    chance = random.Random(0)
    for _ in range(50):
        lengths = [chance.randint(1, 20) for _ in range(chance.randint(1, 30))]
        rows = first_fit(lengths, 20)
        assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
        assert all(sum(lengths[sample] for sample in row) <= 20 for row in rows)


def test_packed_samples_restart_their_positions_and_first_tokens_are_not_learned() -> None:
    samples = [
        TokenizedSample((1, 2), (True, True)),
        TokenizedSample((3, 4, 5, 6), (False, False, True, True)),
        TokenizedSample((7, 8, 7), (False, True, False)),
    ]
    batch = collate_packed(samples, PAD, capacity=6)
    assert batch.input_ids.tolist() == [[3, 4, 5, 6, 1, 2], [7, 8, 7, PAD, PAD, PAD]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]
    assert batch.loss_mask.int().tolist() == [[0, 1, 1, 0, 1], [1, 0, 0, 0, 0]]
    assert batch.response_ids.tolist() == [[4, 5, 6, 1, 2], [8, 7, PAD, PAD, PAD]]


def test_rows_are_no_longer_than_the_longest_of_them() -> None:
    batch = collate_packed([TokenizedSample((1, 2, 3), (False, True, True))], PAD, capacity=100)
    assert batch.input_ids.shape == (1, 3)


def test_a_single_token_still_has_a_column_to_learn() -> None:
    batch = collate_packed([TokenizedSample((1,), (True,))], PAD, capacity=4)
    assert batch.input_ids.tolist() == [[1, PAD]]
    assert not batch.loss_mask.any()


def test_a_sample_longer_than_a_row_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="5 tokens does not fit a row of 4"):
        first_fit([5], capacity=4)

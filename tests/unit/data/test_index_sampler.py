"""The order of training rows."""

from __future__ import annotations

from collections import Counter

import pytest

from conch.data.index_sampler import IndexStream, RowDigest, digest_of
from conch.errors import DataError


def test_every_row_comes_once_an_epoch() -> None:
    stream = IndexStream(length=10, seed=0)
    for epoch in range(3):
        assert stream.epoch == epoch
        assert sorted([*stream.draw(4), *stream.draw(4), *stream.draw(2)]) == list(range(10))


def test_epochs_and_seeds_shuffle_differently() -> None:
    stream = IndexStream(length=50, seed=0)
    first, second = stream.draw(50), stream.draw(50)
    assert first != second and first != sorted(first)
    assert IndexStream(length=50, seed=1).draw(50) != first
    assert IndexStream(length=50, seed=0).draw(50) == first


def test_draws_cross_the_end_of_an_epoch() -> None:
    drawn = IndexStream(length=3, seed=0).draw(8)
    assert sorted(drawn[:3]) == sorted(drawn[3:6]) == [0, 1, 2] and len(drawn) == 8


def test_ranks_share_each_batch_out() -> None:
    whole = IndexStream(length=11, seed=4)
    parts = [IndexStream(length=11, seed=4, rank=rank, num_ranks=3) for rank in range(3)]
    for _ in range(5):
        together = [row for part in parts for row in part.draw(2)]
        assert Counter(together) == Counter(whole.draw(6))
    assert {part.epoch for part in parts} == {whole.epoch} == {30 / 11}


def test_a_restored_stream_goes_on_where_it_was() -> None:
    stream = IndexStream(length=7, seed=2)
    stream.draw(10)
    restored = IndexStream(length=7, seed=2)
    restored.load_state_dict(stream.state_dict())
    assert restored.draw(9) == stream.draw(9)


def test_a_walk_goes_on_over_the_rows_that_it_began_with() -> None:
    rows = [f"row {number}" for number in range(7)]
    stream = IndexStream(length=7, seed=2, digest=digest_of(rows))
    IndexStream(length=7, seed=2, digest=digest_of(list(rows))).load_state_dict(stream.state_dict())
    for others in (rows[::-1], [*rows[:6], "another"]):
        with pytest.raises(DataError, match=r"had other rows of data than these 7, or another order"):
            IndexStream(length=7, seed=2, digest=digest_of(others)).load_state_dict(stream.state_dict())
    old = {"position": 3, "length": 7}  # of a checkpoint from before
    IndexStream(length=7, seed=2, digest=digest_of(rows)).load_state_dict(old)


def test_a_digest_is_of_what_rows_say() -> None:
    row = {"prompt": [{"role": "user", "content": "a"}], "score": 0.5, "n": None}
    same = {"n": None, "score": 0.5, "prompt": ({"content": "a", "role": "user"},)}
    assert digest_of([row]) == digest_of([same]) == digest_of(iter([row]))
    others = [
        {**row, "score": 0.25},
        {**row, "n": 0},
        {**row, "prompt": [{"role": "user", "content": "a "}]},
        {**row, "prompt": [{"role": "usera", "content": ""}]},
        {key: row[key] for key in ("prompt", "score")},
    ]
    assert len({digest_of([each]) for each in (row, *others)}) == 6
    assert digest_of(["ab", "c"]) != digest_of(["a", "bc"]) != digest_of(["abc"])
    assert digest_of([{"image": object()}]) == digest_of([{"image": object()}])  # no address in memory
    digest = RowDigest()
    assert list(digest.over(iter("ab"))) == ["a", "b"] and digest.hexdigest() == digest_of(["a", "b"])

"""check_shape: replies that nobody can assign to rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from conch.addresses import Endpoint
from conch.rewards.client.pool import ReplicaState
from conch.rewards.client.retry import check_shape
from conch.rewards.client.transport import ModelInfo, ReplicaError, Reply
from conch.rewards.client.triton import TritonTransport
from conch.triton.channel import Access
from conch.types import RewardStatus


def replica(*reward_names: str) -> ReplicaState:
    state = ReplicaState(TritonTransport(Endpoint("h", 1, "m"), Access(), 1.0))
    state.info = ModelInfo(reward_names=reward_names)
    return state


@pytest.mark.parametrize("reward_names", [("help", "harm"), ()])
def test_one_number_per_row_and_objective_passes(reward_names: tuple[str, ...]) -> None:
    check_shape(Reply({"harm": [1.0, 2.0], "help": [3.0, float("nan")]}), 2, replica(*reward_names))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"help": [1.0]}, "has 1 scores of `help` for 2 samples"),
        ({"help": [1.0, 2.0, 3.0]}, "has 3 scores of `help` for 2 samples"),
        ({"harm": [1.0, 2.0]}, r"has the rewards \['harm'\], expected \['help'\]"),
        ({}, r"has the rewards \[\], expected \['help'\]"),
    ],
)
def test_other_replies_are_bad_data_of_perhaps_one_row(
    columns: Mapping[str, Sequence[float]], words: str
) -> None:
    with pytest.raises(ReplicaError, match=words) as caught:
        check_shape(Reply(columns), 2, replica("help"))
    assert caught.value.failure.status is RewardStatus.INVALID and caught.value.failure.maybe_one_row


def test_reply_without_any_objective_is_bad_data_even_if_none_is_expected() -> None:
    with pytest.raises(ReplicaError, match="expected at least one"):
        check_shape(Reply({}), 1, replica())

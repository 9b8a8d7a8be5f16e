"""What the client makes of an ensemble that some members gave no score to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from conch.config import RewardConfig
from conch.rewards.combined import disagreement
from conch.rewards.served import TritonReward
from conch.triton.contract import RewardModelSpec
from conch.types import RewardStatus
from tests.fakes.rollouts import rollouts
from tests.fakes.triton_server import FakeTriton, response

SPEC = RewardModelSpec("both", members=("one", "two", "three"))


@pytest.fixture
def fake() -> Iterator[FakeTriton]:
    with FakeTriton(SPEC, lambda text: [0.0]) as server:
        yield server


def scored_by(used: Sequence[int], *, dtype: str = "INT32", members: int = 3) -> Any:
    """An answer whose rows were scored by so many members: the first of them, by 1, 2, 3."""

    def act(rows: list[str], context: Any) -> Any:
        message = response(np.full((len(rows), 1), 1.5, dtype=np.float32))
        own = [[place + 1.0 if place < count else np.nan for place in range(members)] for count in used]
        message.outputs.add(name="member_rewards", datatype="FP32", shape=[len(used), members])
        message.raw_output_contents.append(np.array(own, dtype=np.float32).tobytes())
        values = np.array(used, dtype=np.int32 if dtype == "INT32" else np.int64)[:, None]
        message.outputs.add(name="members_used", datatype=dtype, shape=values.shape)
        message.raw_output_contents.append(values.tobytes())
        return message

    return act


def ask(reward: TritonReward, *outputs: str) -> list:
    return list(reward.submit(rollouts(*outputs)).result())


def test_a_score_that_not_all_members_stand_behind_says_so(fake: FakeTriton) -> None:
    fake.script.append(scored_by([3, 2, 1]))
    with TritonReward(fake.url, RewardConfig()) as reward:
        results = ask(reward, "a", "b", "c")
    assert [result.scores for result in results] == [{"reward": 1.5}] * 3
    assert [result.detail for result in results] == [
        "",
        "scored by 2 of 3 members",
        "scored by 1 of 3 members",
    ]


def test_a_warning_tells_when_fewer_members_score_and_not_again_for_as_many(
    fake: FakeTriton, caplog: pytest.LogCaptureFixture
) -> None:
    fake.script.extend(scored_by([used]) for used in (3, 2, 2, 3, 2, 1))
    with TritonReward(fake.url, RewardConfig()) as reward:
        for letter in "abcdef":
            ask(reward, letter)
    told = [message.rpartition(": ")[2] for message in caplog.messages if "members score" in message]
    assert told == [f"only {used} of 3 members score" for used in (2, 2, 1)]


def test_each_members_score_is_in_the_result_and_in_the_cache(fake: FakeTriton) -> None:
    fake.script.append(scored_by([3, 1]))
    with TritonReward(fake.url, RewardConfig()) as reward:
        results = ask(reward, "a", "b")
        (again,) = ask(reward, "a")
    assert [result.members for result in results] == [
        {"one": 1.0, "two": 2.0, "three": 3.0},
        {"one": 1.0, "two": None, "three": None},
    ]
    assert again.members == results[0].members  # the other is no whole score, and asked for again
    assert [disagreement(result) for result in results] == [pytest.approx(2 / 3), 0.0]


def test_a_member_that_stands_twice_has_a_number() -> None:
    with FakeTriton(RewardModelSpec("both", members=("one", "two", "one")), lambda text: [0.0]) as server:
        server.script.append(scored_by([3]))
        with TritonReward(server.url, RewardConfig()) as reward:
            (result,) = ask(reward, "a")
    assert result.members == {"one#1": 1.0, "two": 2.0, "one#3": 3.0}


def test_a_model_that_is_no_ensemble_has_no_members() -> None:
    with (
        FakeTriton(RewardModelSpec("one"), lambda text: [2.0]) as server,
        TritonReward(server.url, RewardConfig()) as reward,
    ):
        (result,) = ask(reward, "a")
    assert (result.scores, dict(result.members), disagreement(result)) == ({"reward": 2.0}, {}, None)


@pytest.mark.parametrize(
    "answer", [scored_by([2, 2]), scored_by([2], dtype="INT64"), scored_by([2], members=2)]
)
def test_a_number_of_members_of_another_shape_or_type_is_invalid(fake: FakeTriton, answer: Any) -> None:
    fake.script.extend([answer, answer, answer])
    with TritonReward(fake.url, RewardConfig()) as reward:
        (result,) = ask(reward, "a")
    assert result.status is RewardStatus.INVALID and "expected" in result.detail

"""The reward relative to a reference answer: differences, baselines asked for once, failures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from conch.errors import DataError
from conch.rewards.base import RewardSource
from conch.rewards.combined import DeltaReward, check_originals
from conch.rewards.function import FunctionReward
from conch.types import RewardStatus
from tests.runs import letters_rollout

ROLLOUTS = [
    letters_rollout("a", "bcd", original_output="hh"),
    letters_rollout("a", "b", original_output="hh"),
    letters_rollout("b", "", original_output="h"),
]


class Lengths:
    """A reward function that remembers what it was asked; `broken` texts raise."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.broken: set[str] = set()

    def __call__(self, samples: Sequence[str], outputs: Sequence[str], **_: Any) -> list[float]:
        self.asked += samples
        return [
            float("nan") if sample in self.broken else float(len(out))
            for sample, out in zip(samples, outputs, strict=True)
        ]


@pytest.fixture
def lengths() -> Lengths:
    return Lengths()


@pytest.fixture
def source(lengths: Lengths) -> DeltaReward:
    return DeltaReward(FunctionReward(lengths), lambda _, text: [0] * len(text))


def test_it_is_a_reward_source(source: DeltaReward) -> None:
    assert isinstance(source, RewardSource)
    with source:
        source.check()


def test_scores_are_differences(source: DeltaReward) -> None:
    with source:
        results = source.submit(ROLLOUTS).result(10)
    assert [result.scores["reward"] for result in results] == [1.0, -1.0, -1.0]


def test_each_baseline_is_asked_for_once(source: DeltaReward, lengths: Lengths) -> None:
    with source:
        for _ in range(3):
            source.submit(ROLLOUTS).result(10)
    assert lengths.asked.count("ahh") == lengths.asked.count("bh") == 1
    assert lengths.asked.count("abcd") == 3


def test_a_failed_baseline_fails_its_samples_and_is_asked_for_again(
    source: DeltaReward, lengths: Lengths
) -> None:
    lengths.broken.add("ahh")
    with source:
        results = source.submit(ROLLOUTS).result(10)
        assert [result.status for result in results[:2]] == [RewardStatus.INVALID] * 2
        assert not results[0].scores and "baseline" in results[0].detail
        lengths.broken.clear()
        assert source.submit(ROLLOUTS).result(10)[0].scores["reward"] == 1.0
    assert lengths.asked.count("ahh") == 2


def test_dense_rewards_have_no_difference() -> None:
    function = FunctionReward(lambda outputs, **_: [[1.0] * (len(output) + 1) for output in outputs])
    with DeltaReward(function, lambda _, text: [0] * (len(text) + 1)) as source:
        results = source.submit(ROLLOUTS).result(10)
    assert {result.status for result in results} == {RewardStatus.INVALID}
    assert "one score per objective" in results[0].detail


def test_prompts_without_an_original_are_refused() -> None:
    check_originals([{"prompt": "a", "original_output": "b"}])
    with pytest.raises(DataError, match="prompt 1 has none"):
        check_originals([{"prompt": "a", "original_output": "b"}, {"prompt": "a"}])

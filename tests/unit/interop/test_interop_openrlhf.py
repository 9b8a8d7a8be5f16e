"""Reward functions for OpenRLHF, called as its executor of single turns calls them."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import pytest

from conch.errors import ConfigError, RewardInvalidError
from conch.interop.openrlhf import reward_function


def lengths(samples: Any, prompts: Any, outputs: Sequence[str], answer: Any) -> list[float]:
    return [float(len(output)) for output in outputs]


def goals(samples: Any, prompts: Any, outputs: Any, **rest: Any) -> dict[str, list[float]]:
    return {"long": [2.0] * len(outputs), "calm": [-1.0] * len(outputs)}


def broken(samples: Any, prompts: Any, outputs: Any, **rest: Any) -> list[float]:
    raise ValueError("no")


def test_one_sample_gets_a_number_without_the_closing_token() -> None:
    function = reward_function(lengths, end="<eos>")
    assert function(["2+2=four<eos>"], ["2+2="], ["4"]) == {"rewards": 4.0, "scores": 4.0, "extra_logs": {}}
    copy = pickle.loads(pickle.dumps(function))
    assert copy(["2+2=four"], ["2+2="], ["4"])["rewards"] == 4.0


def test_several_samples_get_a_list() -> None:
    found = reward_function(lengths)(["ab", "abc"], ["a", "a"], [None, None])
    assert found["rewards"] == found["scores"] == [1.0, 2.0]


def test_objectives_are_logged_beside_their_sum() -> None:
    found = reward_function(goals)(["ab"], ["a"], [None])
    assert found == {"rewards": 1.0, "scores": 1.0, "extra_logs": {"long": 2.0, "calm": -1.0}}


def test_what_has_no_reward_is_an_error() -> None:
    with pytest.raises(RewardInvalidError, match=r"broken: 1 of 1 samples got no reward; .* ValueError: no"):
        reward_function(broken)(["ab"], ["a"], [None])
    with pytest.raises(ConfigError, match="does not begin with its prompt"):
        reward_function(lengths)(["bb"], ["a"], [None])
    with pytest.raises(ConfigError, match="does not apply to a sample"):
        reward_function(lambda samples, prompts, outputs, **rest: [None])(["ab"], ["a"], [None])

"""A trainer that is refused leaves nothing open behind, and nothing of the caller's closed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conch.config import RewardConfig
from conch.errors import DataError
from conch.rewards import from_user
from tests.fakes.rollouts import rollouts
from tests.runs import grpo_trainer, ilql_trainer, ppo_trainer, rft_trainer, sft_trainer, vowels

TOO_LONG = ["a" * 40]
"""Prompts that do not fit: seen after the reward was opened."""

Refused = Callable[[Path, Any], object]
WAYS: dict[str, Refused] = {
    "ppo": lambda folder, reward: ppo_trainer(folder, reward_fn=reward, prompts=TOO_LONG),
    "grpo": lambda folder, reward: grpo_trainer(folder, reward_fn=reward, eval_prompts=TOO_LONG),
    "rft": lambda folder, reward: rft_trainer(folder, reward_fn=reward, prompts=TOO_LONG),
    "sft": lambda folder, reward: sft_trainer(folder, ["ab"], reward_fn=reward, eval_prompts=TOO_LONG),
    "ilql": lambda folder, reward: ilql_trainer(
        folder, ["ab"], [1.0], reward_fn=reward, eval_prompts=TOO_LONG
    ),
}


def open_sources() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("reward-")]


@pytest.mark.parametrize("way", WAYS)
def test_sources_that_a_refused_trainer_opened_are_closed(tmp_path: Path, way: str) -> None:
    before = open_sources()
    with pytest.raises(DataError, match="40"):
        WAYS[way](tmp_path, {"first": vowels, "second": lambda outputs, **_: [0.0] * len(outputs)})
    assert open_sources() == before


@pytest.mark.parametrize("way", WAYS)
def test_a_source_of_the_caller_s_is_as_it_was_after_a_refusal(tmp_path: Path, way: str) -> None:
    with from_user(vowels, RewardConfig()) as source:
        with pytest.raises(DataError, match="40"):
            WAYS[way](tmp_path, source)
        (result,) = source.submit(rollouts("ae")).result(10)
    assert result.scores == {"reward": 2.0}


def test_members_before_one_that_is_refused_are_closed(tmp_path: Path) -> None:
    before = open_sources()
    with pytest.raises(Exception, match="int"):
        ppo_trainer(tmp_path, reward_fn={"first": vowels, "second": 3})
    assert open_sources() == before

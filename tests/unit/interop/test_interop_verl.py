"""Reward functions for verl, called as its reward loop and its batch manager call them."""

from __future__ import annotations

import asyncio
import functools
import inspect
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from conch.errors import ConfigError, DataError, RewardInvalidError
from conch.interop.verl import reward_function
from conch.types import DEFAULT_OBJECTIVE

CALL = {"data_source": "gsm8k", "solution_str": "#### 4", "ground_truth": "4"}
EXTRA = {"question": "2+2?", "num_turns": None, "rollout_reward_scores": {}}


def sees(samples: Sequence[str], prompts: Any, outputs: Any, answer: Any, **rest: Any) -> list[float]:
    assert rest["data_source"] == ["gsm8k"] * len(samples)
    return [float(len(sample)) + float(right) for sample, right in zip(samples, answer, strict=True)]


def goals(samples: Any, prompts: Any, outputs: Any, **rest: Any) -> dict[str, list[float]]:
    return {"long": [2.0] * len(outputs), "calm": [-1.0] * len(outputs)}


def broken(samples: Any, prompts: Any, outputs: Any, **rest: Any) -> list[float]:
    raise ValueError("no")


def turns(samples: Any, prompts: Any, outputs: Any, messages: Any, **rest: Any) -> list[float]:
    return [float(len(each)) for each in messages]


def run(function: Any, **call: Any) -> Any:
    return asyncio.run(function(**call))


def test_one_completion_gets_a_score_with_its_prompt_and_its_truth() -> None:
    function = reward_function(sees, prompt="question")
    assert run(function, **CALL, extra_info=EXTRA) == {"score": 10.0 + 4.0}
    assert run(function, **CALL, extra_info=EXTRA, reward_router_address=None) == {"score": 14.0}


def test_verl_takes_it_for_async_also_after_a_pickle() -> None:
    function = pickle.loads(pickle.dumps(reward_function(sees, prompt="question")))
    assert inspect.iscoroutinefunction(function)
    assert inspect.iscoroutinefunction(functools.partial(function, sandbox=1))
    assert run(function, **CALL, extra_info=EXTRA) == {"score": 14.0}


def test_messages_of_an_array_are_a_dialogue() -> None:
    messages = np.array([{"role": "user", "content": "2+2?"}], dtype=object)
    assert run(reward_function(turns, prompt="prompt"), **CALL, extra_info={"prompt": messages})["score"] == 2


def test_a_verifier_reads_the_ground_truth_and_needs_no_prompt() -> None:
    function = reward_function("verifier:gsm8k", {"gsm8k": {"extractor": "strict"}})
    call = {**CALL, "ground_truth": "#### 4"}
    assert run(function, **call, extra_info=None)["score"] == 1.0


def test_objectives_stand_beside_their_sum() -> None:
    assert run(reward_function(goals), **CALL) == {"score": 1.0, "long": 2.0, "calm": -1.0}
    assert run(reward_function(goals, objective="long"), **CALL)["score"] == 2.0
    assert DEFAULT_OBJECTIVE not in run(reward_function(goals), **CALL)


def test_a_batch_gets_a_score_each() -> None:
    function: Any = reward_function(sees, prompt="question", batch=True)
    scores = function(
        data_sources=["gsm8k"] * 2,
        solution_strs=["#### 4", "5"],
        ground_truths=["4", "5"],
        extra_infos=[EXTRA, EXTRA],
    )
    assert scores == [{"score": 14.0}, {"score": 10.0}]


def test_what_has_no_reward_stops_the_run() -> None:
    with pytest.raises(RewardInvalidError, match=r"broken: 1 of 1 samples got no reward; .* ValueError: no"):
        run(reward_function(broken), **CALL)
    with pytest.raises(DataError, match=r"`extra_info` has no `question`, .* it has other"):
        run(reward_function(sees, prompt="question"), **CALL, extra_info={"other": 1})
    with pytest.raises(ConfigError, match="does not apply to a sample"):
        run(reward_function(lambda samples, prompts, outputs, **rest: [None]), **CALL)

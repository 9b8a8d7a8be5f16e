"""CallableReward: what a function may return, and what happens when it returns something else."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from conch.errors import ConfigError
from conch.rewards.function import FunctionReward
from conch.types import RewardResult, RewardStatus, Rollout
from tests.fakes.rollouts import rollout, rollouts

WAIT_S = 120


def score(function: Callable[..., Any], batch: list[Rollout]) -> list[RewardResult]:
    with FunctionReward(function) as reward:
        return reward.submit(batch).result(WAIT_S)


def returning(value: Any) -> Callable[..., Any]:
    def function(samples: list[str], prompts: list[str], outputs: list[str], **metadata: Any) -> Any:
        return value

    return function


def test_sync_function_gets_samples_prompts_outputs_and_metadata() -> None:
    seen: dict[str, Any] = {}

    def length(**arguments: Any) -> list[int]:
        seen.update(arguments)
        return [len(output) for output in arguments["outputs"]]

    results = score(length, [rollout("x", "ab", answer=4), rollout("yy", "c", source="web")])

    assert seen == {
        "samples": ["xab", "yyc"],
        "prompts": ["x", "yy"],
        "outputs": ["ab", "c"],
        "answer": [4, None],
        "source": [None, "web"],
        "messages": [None, None],
        "output_ids": [[1, 2], [3]],
    }
    assert [dict(result.scores) for result in results] == [{"reward": 2.0}, {"reward": 1.0}]
    assert all(result.ok and result.model == "length" and result.latency_s >= 0 for result in results)


def test_async_calls_overlap() -> None:
    both_inside = threading.Barrier(2)

    async def reward(samples: list[str], prompts: list[str], outputs: list[str]) -> list[float]:
        await asyncio.get_running_loop().run_in_executor(None, both_inside.wait, WAIT_S)
        return [0.5] * len(samples)

    with FunctionReward(reward) as source:
        futures = [source.submit(rollouts("a")), source.submit(rollouts("b"))]
        assert all(future.result(WAIT_S)[0].scores == {"reward": 0.5} for future in futures)
        assert source.stats().requests == 2


def test_submit_returns_before_the_function_does() -> None:
    go = threading.Event()

    def reward(samples: list[str], prompts: list[str], outputs: list[str]) -> list[float]:
        assert go.wait(WAIT_S)
        return [1.0]

    with FunctionReward(reward) as source:
        future = source.submit(rollouts("a"))
        assert not future.done()
        go.set()
        assert future.result(WAIT_S)[0].ok


@pytest.mark.parametrize(
    "value",
    [
        [0.25, 1],
        (0.25, True),
        np.array([0.25, 1.0], dtype=np.float16),
        torch.tensor([0.25, 1.0], dtype=torch.bfloat16),
        [torch.tensor(0.25), np.float32(1)],
    ],
    ids=["list", "tuple", "numpy", "torch", "zero_dimensional"],
)
def test_scalar_scores_of_any_numeric_type_arrive_as_floats(value: Any) -> None:
    results = score(returning(value), rollouts("aa", "b"))
    assert [result.scores["reward"] for result in results] == [0.25, 1.0]
    assert all(type(result.scores["reward"]) is float for result in results)


def test_dense_scores_arrive_per_token() -> None:
    results = score(returning([[0.1, 0.2], torch.tensor([3.0])]), rollouts("aa", "b"))
    assert [result.token_scores for result in results] == [(0.1, 0.2), (3.0,)]
    assert all(result.ok and not result.scores for result in results)


def test_dict_of_lists_arrives_as_objectives() -> None:
    results = score(returning({"help": [1, 2], "harm": np.array([0.5, -0.5])}), rollouts("a", "b"))
    assert [dict(result.scores) for result in results] == [
        {"help": 1.0, "harm": 0.5},
        {"help": 2.0, "harm": -0.5},
    ]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1.0], "returned 1 score, expected one score for each of 3 samples"),
        ([1.0] * 4, "returned 4 scores, expected one score for each of 3 samples"),
        ([[1.0]], "returned 1 lists, expected one score for each of 3 samples"),
        (1.0, "returned a float"),
        (torch.tensor(1.0), "returned a float"),
        (None, "returned None, as one without `return` does: return a list of a score for each of the 3"),
        ("123", "returned a str"),
        ({}, "returned an empty dict"),
        ({"help": [1.0, 2.0, 3.0], "harm": [1.0]}, "returned 1 score for objective `harm`"),
        ({"help": 1.0}, "returned a float for objective `help`"),
    ],
    ids=str,
)
def test_wrong_count_or_type_invalidates_every_row(value: Any, words: str) -> None:
    results = score(returning(value), rollouts("a", "b", "c"))
    assert [result.status for result in results] == [RewardStatus.INVALID] * 3
    assert all(not result.scores and result.token_scores is None for result in results)
    assert results[0].detail.startswith("reward function `function` returned")
    assert words in results[0].detail


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (float("nan"), "nan instead of a score"),
        (float("-inf"), "-inf instead of a score"),
        (torch.tensor(float("nan")), "nan instead of a score"),
        (None, "None instead of a score"),
        ("0.5", "str instead of a score"),
        (10**400, "int instead of a score"),
    ],
    ids=str,
)
def test_bad_value_invalidates_its_row_only_and_hides_the_text(bad: Any, words: str) -> None:
    results = score(returning([1.0, bad, 3.0]), rollouts("a", "secret", "c"))
    assert [result.status.value for result in results] == ["ok", "invalid", "ok"]
    assert words in results[1].detail and "row 1 (sample " in results[1].detail
    assert "secret" not in results[1].detail


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([0.1], "1 per-token scores for a completion of 2 tokens"),
        ([0.1, 0.2, 0.3], "3 per-token scores for a completion of 2 tokens"),
        ([0.1, float("inf")], "inf among its per-token scores"),
        (0.5, "float where other rows have a list of per-token scores"),
    ],
    ids=str,
)
def test_bad_dense_row_invalidates_its_row_only(bad: Any, words: str) -> None:
    results = score(returning([[1.0], bad]), rollouts("a", "bb"))
    assert [result.status.value for result in results] == ["ok", "invalid"]
    assert words in results[1].detail


def test_bad_objective_value_names_the_objective() -> None:
    results = score(returning({"help": [1.0, 2.0], "harm": [0.0, float("nan")]}), rollouts("a", "b"))
    assert [result.status.value for result in results] == ["ok", "invalid"]
    assert "objective `harm`" in results[1].detail


def test_exception_invalidates_the_call_and_names_the_users_line() -> None:
    def reward(samples: list[str], prompts: list[str], outputs: list[str]) -> list[float]:
        return [np.linalg.inv(np.zeros((2, 2))).sum()]  # the line that the message must name

    line = reward.__code__.co_firstlineno + 1
    results = score(reward, rollouts("a", "b"))
    assert [result.status for result in results] == [RewardStatus.INVALID] * 2
    assert results[0].detail == (
        f"reward function `reward` raised LinAlgError: Singular matrix ({__file__}:{line})"
    )


def test_exit_in_the_function_is_a_status_and_the_source_lives_on() -> None:
    replies = iter([SystemExit(3), None])

    def reward(samples: list[str], prompts: list[str], outputs: list[str]) -> list[float]:
        error = next(replies)
        if error:
            raise error
        return [1.0]

    with FunctionReward(reward) as source:
        assert "SystemExit: 3" in source.submit(rollouts("a")).result(WAIT_S)[0].detail
        assert source.submit(rollouts("a")).result(WAIT_S)[0].ok


def test_function_that_changes_its_lists_hurts_nobody() -> None:
    def reward(samples: list[str], prompts: list[str], outputs: list[str]) -> list[float]:
        samples.clear()
        return [1.0, 2.0]

    assert [result.ok for result in score(reward, rollouts("a", "b"))] == [True, True]


def test_no_rollouts_make_no_call() -> None:
    with FunctionReward(returning([1.0])) as source:
        assert source.submit([]).result(WAIT_S) == []
        assert source.stats().requests == 0


def only_samples(samples: list[str]) -> list[float]:
    return [0.0] * len(samples)


def no_metadata(samples: list[str], prompts: list[str], outputs: list[str]) -> list[float]:
    return [0.0] * len(samples)


def needs_more(samples: list[str], prompts: list[str], outputs: list[str], answer: list[Any]) -> list[float]:
    return [0.0] * len(samples)


@pytest.mark.parametrize(
    ("function", "keys", "words"),
    [
        (only_samples, [], "`only_samples(samples, prompts, outputs, **metadata)`"),
        (no_metadata, ["answer"], "`no_metadata(samples, prompts, outputs, answer, **metadata)`"),
        (needs_more, [], "missing a required argument: 'answer'"),
        (no_metadata, ["outputs"], "extra key `outputs`"),
    ],
)
def test_wrong_signature_is_found_by_check(function: Callable[..., Any], keys: list[str], words: str) -> None:
    with FunctionReward(function, metadata_keys=keys) as source, pytest.raises(ConfigError) as caught:
        source.check()
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("function", "keys"),
    [
        (no_metadata, []),
        (needs_more, ["answer"]),
        (returning([]), ["answer", "source"]),
        (functools.partial(needs_more, answer=[]), []),
    ],
)
def test_fitting_signature_passes_check(function: Callable[..., Any], keys: list[str]) -> None:
    with FunctionReward(function, metadata_keys=keys) as source:
        source.check()


def test_metadata_that_the_function_cannot_take_is_a_status() -> None:
    results = score(no_metadata, [rollout("p", "a", answer=1)])
    assert results[0].status is RewardStatus.INVALID
    assert "wrong signature" in results[0].detail


def test_close_ends_the_thread_and_cancels_async_calls() -> None:
    before = set(threading.enumerate())

    async def forever(samples: list[str], prompts: list[str], outputs: list[str]) -> list[float]:
        await asyncio.Event().wait()
        return []

    source = FunctionReward(forever)
    future = source.submit(rollouts("a"))
    source.close()
    source.close()
    assert future.cancelled()
    assert set(threading.enumerate()) <= before
    with pytest.raises(RuntimeError, match="closed"):
        source.submit(rollouts("a"))


def test_objectives_that_do_not_apply_to_a_sample_are_left_out_of_its_sum() -> None:
    """Of several, at least one must: TRL sums those that are there."""
    columns = {"math": [1.0, None, None], "code": [None, 2.0, None]}
    first, second, third = score(returning(columns), rollouts("a", "b", "c"))
    assert (dict(first.scores), first.absent) == ({"math": 1.0}, ("code",))
    assert (dict(second.scores), second.absent) == ({"code": 2.0}, ("math",))
    assert third.status is RewardStatus.INVALID and "any of its 2 objectives" in third.detail


def test_one_objective_alone_must_be_a_score() -> None:
    results = score(returning({"math": [1.0, None]}), rollouts("a", "b"))
    assert [result.status for result in results] == [RewardStatus.OK, RewardStatus.INVALID]

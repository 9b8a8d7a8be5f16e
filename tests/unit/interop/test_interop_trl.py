"""Reward functions for TRL over functions, verifiers and endpoints of Conch's, called as TRL calls them."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from conch.errors import ConfigError, DataError, RewardInvalidError, RewardUnavailableError
from conch.interop import local as local_module
from conch.interop.trl import AsyncRewardFunction, SyncRewardFunction, reward_function, reward_functions
from conch.rewards import groupwise
from conch.rewards.base import RewardSource
from conch.types import RewardResult, RewardStatus, Rollout
from tests.trl_calls import Logged, of_async_grpo, of_grpo

USER = {"role": "user", "content": "1 + 1?"}
STRICT = {"gsm8k": {"extractor": "strict"}}
LETTERS = (["a", "b", "c"], ["a", "bb", "ccc"])


def lengths(samples: Sequence[str], prompts: Sequence[str], outputs: Sequence[str]) -> list[float]:
    return [float(len(output)) for output in outputs]


def lengths_of_any(samples: Any, prompts: Any, outputs: Sequence[str], **_: Any) -> list[float]:
    return [float(len(output)) for output in outputs]


def with_answer(samples: Any, prompts: Any, outputs: Any, answer: Sequence[str]) -> list[float]:
    return [float(output == right) for output, right in zip(outputs, answer, strict=True)]


def any_columns(samples: Any, prompts: Any, outputs: Sequence[str], **columns: Any) -> list[float]:
    return [0.5] * len(outputs)


def odd_ones(samples: Any, prompts: Any, outputs: Any) -> list[float | None]:
    """NaN, which is no score, for outputs of even length."""
    return [float(len(output)) if len(output) % 2 else float("nan") for output in outputs]


def when_it_applies(samples: Any, prompts: Any, outputs: Any) -> list[float | None]:
    return [1.0 if output == "a" else None for output in outputs]


def roles(samples: Any, prompts: Any, outputs: Any, messages: Any) -> list[float]:
    return [float(len(each)) for each in messages]


CALLS: list[int] = []


def both(samples: Any, prompts: Any, outputs: Any) -> dict[str, list[float]]:
    CALLS.append(len(outputs))
    return {"long": [float(len(output)) for output in outputs], "calm": [-1.0] * len(outputs)}


def run(function: Any, call: dict[str, Any]) -> list[float | None]:
    return asyncio.run(function(**call))


def test_texts_get_rewards_in_order_and_a_metric_says_that_none_failed() -> None:
    logged, function = Logged(), reward_function(lengths)
    assert run(function, of_grpo(logged, *LETTERS)) == [1.0, 2.0, 3.0]
    assert logged.metrics == {"rewards/lengths/failed": [0.0]}
    assert (function.samples, function.failed) == (3, 0)
    function.close()


def test_messages_reach_a_function_that_names_them() -> None:
    call = of_grpo(Logged(), [[USER]], [[{"role": "assistant", "content": "2"}]])
    assert run(reward_function(roles), call) == [2.0]


def test_columns_reach_functions_and_verifiers_and_what_is_trls_own_does_not() -> None:
    columns = {"answer": ["a", "b", "c"]}
    assert run(reward_function(with_answer), of_grpo(Logged(), *LETTERS, **columns)) == [1.0, 0.0, 0.0]
    rows = {"answer": ["so #### 4", "so #### 4"]}
    gsm8k = reward_function("verifier:gsm8k", STRICT)
    assert gsm8k.__name__ == "gsm8k"
    assert run(gsm8k, of_async_grpo(["2+2", "2+2"], ["it is #### 4", "#### 5"], **rows))[0] == 1.0


def test_messages_reach_a_verifier_by_the_text_of_the_answer() -> None:
    answers = [[{"role": "assistant", "content": "#### 2"}], [{"role": "assistant", "content": "#### 3"}]]
    call = of_grpo(Logged(), [[USER], [USER]], answers, answer=["#### 2", "#### 2"])
    right, wrong = run(reward_function("verifier:gsm8k", STRICT), call)
    assert right == 1.0 and wrong is not None and wrong < 1.0


def test_a_function_in_a_file_is_found(tmp_path: Path) -> None:
    file = tmp_path / "trl_rewards_of_mine.py"
    file.write_text("def calm(samples, prompts, outputs, **rest):\n    return [0.5 for _ in outputs]\n")
    function = reward_function(f"{file}:calm")
    assert function.__name__ == "calm"
    assert run(function, of_grpo(Logged(), *LETTERS)) == [0.5] * 3


def test_a_sample_without_a_reward_is_none_counted_and_told_when_the_count_doubles(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logged, function = Logged(), reward_function(odd_ones)
    with caplog.at_level(logging.WARNING, "conch"):
        for _ in range(4):
            assert run(function, of_grpo(logged, *LETTERS)) == [1.0, None, 3.0]
    assert logged.metrics["rewards/odd_ones/failed"] == [pytest.approx(1 / 3)] * 4
    assert (function.samples, function.failed) == (12, 4)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3 and "1 of 3 samples have no reward so far" in told[0] and "4 of 12" in told[2]
    assert "nan" in told[0]


def test_raise_stops_the_trainer_at_a_failed_sample() -> None:
    function = reward_function(odd_ones, on_failure="raise")
    with pytest.raises(RewardInvalidError, match=r"odd_ones: 1 of 3 samples got no reward; first: .*nan"):
        run(function, of_grpo(Logged(), *LETTERS))


def test_a_bound_on_failures_stops_the_trainer_above_it() -> None:
    within = reward_function(odd_ones, {"failure": {"max_fraction": 0.5}})
    assert run(within, of_grpo(Logged(), *LETTERS)) == [1.0, None, 3.0]
    above = reward_function(odd_ones, {"failure": {"max_fraction": 0.2}})
    with pytest.raises(RewardInvalidError, match=r"more than failure.max_fraction=0.2 allows"):
        run(above, of_grpo(Logged(), *LETTERS))


def test_none_of_a_function_means_that_it_does_not_apply_and_is_no_failure() -> None:
    logged, function = Logged(), reward_function(when_it_applies, on_failure="raise")
    assert run(function, of_grpo(logged, *LETTERS)) == [1.0, None, None]
    assert logged.metrics == {"rewards/when_it_applies/failed": [0.0]}


def test_objectives_are_summed_with_weights_or_taken_alone() -> None:
    call = of_grpo(Logged(), *LETTERS)
    assert run(reward_function(both), call) == [0.0, 1.0, 2.0]
    assert run(reward_function(both, {"weights": {"calm": 0.5}}), call) == [0.5, 1.5, 2.5]
    assert run(reward_function(both, objective="long"), call) == [1.0, 2.0, 3.0]
    with pytest.raises(
        ConfigError, match="`objective` = short, but the objectives of both are `calm`, `long`"
    ):
        run(reward_function(both, objective="short"), call)


def test_functions_of_objectives_ask_once_for_a_batch_and_again_for_the_next() -> None:
    functions = reward_functions(["long", "calm"], both)
    assert [function.__name__ for function in functions] == ["both/long", "both/calm"]
    CALLS.clear()

    async def step(call: dict[str, Any]) -> list[Any]:
        return await asyncio.gather(*(function(**call) for function in functions))

    run(functions[0], of_grpo(Logged(), *LETTERS))  # opens
    CALLS.clear()
    batch = of_grpo(Logged(), *LETTERS)
    assert asyncio.run(step(batch)) == [[1.0, 2.0, 3.0], [-1.0] * 3]
    assert CALLS == [3]
    assert asyncio.run(step(batch)) == [[1.0, 2.0, 3.0], [-1.0] * 3]  # the same batch is scored again
    assert CALLS == [3, 3]


def test_functions_of_objectives_ask_once_also_where_they_open_the_reward() -> None:
    asked: list[int] = []

    class Slow(RewardSource):
        name = "slow"

        def check(self) -> None:
            time.sleep(0.5)  # both functions are called before the reward is open

        def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
            asked.append(len(rollouts))
            future: Future[list[RewardResult]] = Future()
            future.set_result([RewardResult(RewardStatus.OK, {"a": 1.0, "b": 2.0})] * len(rollouts))
            return future

    functions = reward_functions(["a", "b"], Slow(), check=False)
    batch = of_grpo(Logged(), *LETTERS)

    async def step() -> list[Any]:
        return await asyncio.gather(*(function(**batch) for function in functions))

    assert asyncio.run(step()) == [[1.0] * 3, [2.0] * 3]
    assert asked == [3]


def test_scores_of_tokens_are_no_reward_of_a_completion() -> None:
    def dense(samples: Any, prompts: Any, outputs: Any, output_ids: Any) -> list[list[float]]:
        return [[1.0] * len(ids) for ids in output_ids]

    with pytest.raises(ConfigError, match="dense gives a score for each token, and here one for a sample is"):
        run(reward_function(dense), of_grpo(Logged(), *LETTERS))


def test_several_rewards_by_name_are_one_sum() -> None:
    with pytest.raises(ConfigError, match=r"reward member `long`: .* has the wrong signature"):
        reward_function({"long": lengths, "right": with_answer})  # `lengths` takes no `answer`
    members = {"any": any_columns, "right": with_answer}
    function = reward_function(members, {"weights": {"right": 10}}, name="all")
    assert function.__name__ == "all"
    assert run(function, of_grpo(Logged(), *LETTERS, answer=["a", "b", "c"])) == [10.5, 0.5, 0.5]


def test_two_async_functions_wait_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=20)

    async def meets(samples: Any, prompts: Any, outputs: Any) -> list[float]:
        await asyncio.to_thread(meeting.wait)
        return [1.0] * len(outputs)

    functions = [reward_function(meets, name="one"), reward_function(meets, name="two")]

    async def step() -> list[Any]:
        return await asyncio.gather(*(each(**of_grpo(Logged(), *LETTERS)) for each in functions))

    assert asyncio.run(step()) == [[1.0] * 3] * 2


def test_the_loop_runs_on_while_a_reward_opens() -> None:
    started, ticks = threading.Event(), []

    class Slow(RewardSource):
        name = "slow"

        def check(self) -> None:
            started.set()
            time.sleep(0.5)

        def submit(self, rollouts: Any) -> Any:
            raise AssertionError("unused")

    function = reward_function(Slow(), check=False)

    async def step() -> None:
        call = asyncio.ensure_future(function(**of_grpo(Logged(), *LETTERS)))
        while not call.done():
            ticks.append(started.is_set())
            await asyncio.sleep(0.01)
        with pytest.raises(AssertionError):
            await call

    asyncio.run(step())
    assert ticks.count(True) > 5


def test_trl_of_any_release_takes_it_for_async_and_knows_its_name() -> None:
    function = reward_function(lengths, name="walks")
    # The last line of each release's own test, from 0.28 on.
    assert asyncio.iscoroutinefunction(function)
    assert inspect.iscoroutinefunction(function)
    assert inspect.iscoroutinefunction(function.__call__)
    assert function.__name__ == "walks"
    assert str(inspect.signature(function)) == "(**columns)"
    assert not inspect.iscoroutinefunction(reward_function(lengths, sync=True))
    assert isinstance(function, AsyncRewardFunction)


def test_sync_blocks_until_all_are_scored() -> None:
    function = reward_function(lengths, sync=True)
    assert isinstance(function, SyncRewardFunction)
    assert function(**of_grpo(Logged(), *LETTERS)) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("sync", [False, True])
def test_it_can_be_pickled_before_and_after_its_use(sync: bool) -> None:
    function = reward_function(lengths, sync=sync, name="walks")
    for _ in range(2):
        copy = pickle.loads(pickle.dumps(function))
        rewards = copy(**of_async_grpo(*LETTERS))
        assert (rewards if sync else asyncio.run(rewards)) == [1.0, 2.0, 3.0]
        assert copy.__name__ == "walks" and inspect.iscoroutinefunction(copy) is not sync
        function = copy


def test_a_list_of_functions_is_pickled_as_one_reward() -> None:
    functions = pickle.loads(pickle.dumps(reward_functions(["long", "calm"], both)))
    assert functions[0]._local is functions[1]._local and functions[0]._latest is functions[1]._latest


def _score_in_child(function: Any, answers: Any) -> None:
    answers.put(function(**of_grpo(Logged(), *LETTERS)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_opens_its_own_and_leaves_its_parents_alone(method: str) -> None:
    function = reward_function(lengths, sync=True)
    assert function(**of_grpo(Logged(), *LETTERS)) == [1.0, 2.0, 3.0]
    context: Any = multiprocessing.get_context(method)
    answers = context.Queue()
    child = context.Process(target=_score_in_child, args=(function, answers))
    child.start()
    assert answers.get(timeout=60) == [1.0, 2.0, 3.0]
    child.join(60)
    assert child.exitcode == 0
    assert function(**of_grpo(Logged(), *LETTERS)) == [1.0, 2.0, 3.0]


def test_a_fork_in_the_middle_of_an_opening_does_not_lock_the_child() -> None:
    function = reward_function(lengths, sync=True)
    with function._local._lock:
        child = os.fork()
        if child == 0:  # pragma: no cover
            os._exit(0 if function(**of_grpo(Logged(), *LETTERS)) == [1.0, 2.0, 3.0] else 1)
    assert ended(child) == 0


def ended(child: int) -> int:
    """Its exit status; one that does not end is killed."""
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def test_nothing_stays_open_after_a_check() -> None:
    before = threading.active_count()
    function = reward_function(lengths)
    assert threading.active_count() == before
    function.close()


def test_a_reward_that_does_not_fit_its_dataset_is_told_by_check() -> None:
    rows = [{"prompt": "1+1", "answer": "2"}, {"prompt": "1+2", "answer": "3"}]
    reward_function(with_answer).check(rows)
    with pytest.raises(ConfigError, match="wrong signature"):
        reward_function(lengths).check(rows)
    with pytest.raises(DataError, match="row 0 of the dataset has no `answer`, for verifier gsm8k"):
        reward_function("verifier:gsm8k", STRICT).check([{"prompt": "1+1"}])
    with pytest.raises(DataError, match="row 1 of the dataset has no `prompt`; it has text"):
        reward_function(when_it_applies).check([{"prompt": "1+1"}, {"text": "1+2"}])


def test_a_column_that_is_missing_in_all_rows_stops_the_first_call() -> None:
    with pytest.raises(ConfigError, match=r"verifier gsm8k: each row has no `answer`; .* are: topic"):
        run(reward_function("verifier:gsm8k", STRICT), of_grpo(Logged(), *LETTERS, topic=["x"] * 3))


def test_a_server_that_is_away_is_told_before_training() -> None:
    quick = {"client": {"deadline_s": 1, "connect_timeout_s": 0.5}}
    with pytest.raises(RewardUnavailableError, match=r"127.0.0.1:9"):
        reward_function("127.0.0.1:9/walks", quick)


def test_a_server_that_is_away_later_costs_rewards_and_no_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    quick = {"client": {"deadline_s": 1, "connect_timeout_s": 0.5}}
    function = reward_function("127.0.0.1:9,127.0.0.1:10/walks", quick, check=False)
    assert function.__name__ == "walks"
    with caplog.at_level(logging.WARNING, "conch"):
        assert run(function, of_grpo(Logged(), *LETTERS)) == [None] * 3
    assert "3 of 3 samples have no reward" in caplog.text and "unavailable" in caplog.text
    raising = reward_function("127.0.0.1:9/walks", quick, check=False, on_failure="raise")
    with pytest.raises(RewardUnavailableError, match="walks: 3 of 3 samples got no reward"):
        run(raising, of_grpo(Logged(), *LETTERS))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"config": {"record": True}}, "`reward.record` has no effect here: only a run of Conch's"),
        ({"config": {"delta": True}}, "`reward.delta` has no effect here"),
        ({"config": {"client": {"deadlin_s": 1}}}, "did you mean `client.deadline_s`"),
        ({"on_failure": "zero"}, "`on_failure` = 'zero'"),
        ({"tools": [print]}, "get_json_schema"),
        ({"objective": "long", "config": {"weights": {"calm": 1}}}, "`objective` takes one of them"),
    ],
)
def test_settings_that_mean_nothing_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        reward_function(lengths, **arguments)


def test_no_reward_at_all_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no reward given"):
        reward_function()
    monkeypatch.setenv("TRITON_HOST", "127.0.0.1:9/walks")
    assert reward_function(check=False).__name__ == "walks"


@pytest.mark.parametrize("objectives", ["long", [], ["long", "long"]])
def test_objectives_are_a_list_of_different_names(objectives: Any) -> None:
    with pytest.raises(ConfigError, match="give a list of different names"):
        reward_functions(objectives, both)


def test_old_releases_of_trl_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local_module.importlib.metadata, "version", lambda name: "1.5.1")
    with caplog.at_level(logging.WARNING, "conch"):
        reward_function(lengths, on_failure="raise")
        assert caplog.text == ""
        reward_function(lengths)
    assert "TRL 1.5.1 takes a sample without a reward for one of 0.0" in caplog.text
    caplog.clear()
    monkeypatch.setattr(local_module.importlib.metadata, "version", lambda name: "1.16.0.dev0")
    reward_function(lengths)
    assert caplog.text == ""


def test_partial_application_keeps_it_async() -> None:
    partial = functools.partial(reward_function(with_answer), answer=["a", "b", "c"])
    assert inspect.iscoroutinefunction(partial)
    assert run(partial, of_grpo(Logged(), *LETTERS)) == [1.0, 0.0, 0.0]


def test_reward_that_compares_a_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="a reward function of another trainer has each scored by itself"):
        reward_function(groupwise(lengths_of_any))

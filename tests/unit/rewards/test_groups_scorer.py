"""Rewards of whole groups: what a source that wants groups gets, in whatever order completions end."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

import conch.rewards
from conch.config import RewardConfig, RewardFailureConfig
from conch.errors import ConfigError, RewardInvalidError
from conch.reward_server.service import ScoringService
from conch.rewards import outage as outage_module
from conch.rewards.base import RewardSource
from conch.rewards.combined import DeltaReward, EnsembleReward, SumReward, refuse_groups, submit_groups
from conch.rewards.function import FunctionReward
from conch.rewards.replay import ReplayReward
from conch.rewards.scorer import RewardScorer
from conch.types import OnFinished, Prompt, RewardResult, RewardStatus, Rollout
from tests.fakes.group_rewards import GroupSource, places, ranked, ranked_async
from tests.fakes.rollouts import rollout, rollouts

OUTPUTS = [["a", "ba", "aa", "b"], ["b", "aaa", "b", "a"], ["c", "c", "d", "a"]]
PROMPTS = [Prompt(text, (1,)) for text in "xyz" for _ in range(4)]
IN_ORDER = [*range(12)]
MIXED = [11, 4, 0, 5, 6, 7, 1, 9, 3, 2, 10, 8]
"""The second group ends first, then the first, then the third."""


class Sampler:
    """Gives OUTPUTS, which end in the order told, in chunks of five: groups reach from one into the next."""

    def __init__(self, order: Sequence[int]) -> None:
        self._order = order

    def generate(
        self, prompts: Sequence[Prompt], *, greedy: bool = False, on_finished: OnFinished | None = None
    ) -> Iterator[list[Rollout]]:
        texts = [text for group in OUTPUTS for text in group]
        made = [rollout(prompt.text, text) for prompt, text in zip(prompts, texts, strict=True)]
        for place in self._order:
            if on_finished is not None:
                on_finished({place: made[place]})
        for first in range(0, len(made), 5):
            yield made[first : first + 5]


def scored(source: RewardSource, order: Sequence[int], **failure: Any) -> list[RewardResult]:
    scorer = RewardScorer(source, RewardConfig(failure=RewardFailureConfig(**failure)))
    sampled = scorer.submit_each(Sampler(order), PROMPTS, group_size=4)
    assert [each.completion.text for each in sampled] == [text for group in OUTPUTS for text in group]
    return scorer.gather()


def scores(results: Sequence[RewardResult], objective: str = "reward") -> list[float]:
    return [result.scores[objective] for result in results]


EXPECTED = [score for group in OUTPUTS for score in places(group)]


@pytest.mark.parametrize("order", [IN_ORDER, MIXED])
def test_each_submit_is_one_whole_group_in_order(order: Sequence[int]) -> None:
    source = GroupSource(0.05, 0.0, 0.02)
    assert scores(scored(source, order)) == EXPECTED
    assert sorted(source.submitted, key=lambda each: min(each[0])) == [
        ({name}, outputs) for name, outputs in zip("xyz", OUTPUTS, strict=True)
    ]


def test_group_is_submitted_as_soon_as_it_is_whole_and_not_before() -> None:
    source = GroupSource()
    scored(source, MIXED)
    assert [min(names) for names, _ in source.submitted] == ["y", "x", "z"]


def test_source_of_which_the_order_matters_gets_groups_in_order() -> None:
    source = GroupSource(batched=True)
    assert scores(scored(source, MIXED)) == EXPECTED
    assert [min(names) for names, _ in source.submitted] == ["x", "y", "z"]


def test_function_that_asks_is_called_once_per_group_in_the_order_of_the_prompts() -> None:
    calls: list[list[str]] = []

    @conch.rewards.groupwise
    def counted(samples: list[str], prompts: list[str], outputs: list[str]) -> list[float]:
        calls.append(outputs)
        assert len(set(prompts)) == 1 and samples == [prompts[0] + output for output in outputs]
        return places(outputs)

    with FunctionReward(counted) as source:
        assert source.needs_groups
        assert scores(scored(source, MIXED)) == EXPECTED
    assert calls == OUTPUTS


def test_async_function_that_asks_is_called_as_groups_end() -> None:
    with FunctionReward(ranked_async) as source:
        assert source.needs_groups and not source.batched
        assert scores(scored(source, MIXED)) == EXPECTED
        assert source.stats().requests == 3


def test_partial_method_and_object_may_ask() -> None:
    class Ranks:
        @conch.rewards.groupwise
        def method(self, outputs: list[str], **_: Any) -> list[float]:
            return places(outputs)

    class Called:
        needs_groups = True

        def __call__(self, outputs: list[str], **_: Any) -> list[float]:
            return places(outputs)

    class Decorated:
        @conch.rewards.groupwise
        def __call__(self, outputs: list[str], **_: Any) -> list[float]:
            return places(outputs)

    for function in (Ranks().method, Called(), Decorated(), functools.partial(ranked)):
        with FunctionReward(function) as source:
            assert source.needs_groups


def test_function_that_raises_fails_its_group_alone() -> None:
    @conch.rewards.groupwise
    def broken(prompts: list[str], outputs: list[str], samples: list[str]) -> list[float]:
        if prompts[0] == "y":
            raise ValueError("no")
        return places(outputs)

    with FunctionReward(broken) as source:
        results = scored(source, IN_ORDER, policy="drop", max_fraction=0.5)
    assert [result.ok for result in results] == [True] * 4 + [False] * 4 + [True] * 4


def test_function_that_asks_refuses_what_is_no_group() -> None:
    with FunctionReward(ranked) as source:
        (alone,) = source.submit(rollouts("a")).result(60)
        mixed = source.submit([rollout("p", "a"), rollout("q", "b")]).result(60)
    assert alone.status is RewardStatus.INVALID and "handed 1 of 1 prompts" in alone.detail
    assert {result.status for result in mixed} == {RewardStatus.INVALID}


def length(outputs: Sequence[str], **_: Any) -> list[float]:
    return [float(len(output)) for output in outputs]


@pytest.mark.parametrize("combine", [SumReward, functools.partial(EnsembleReward, objective="mean")])
def test_one_member_that_wants_groups_gets_them_from_all_combinations(combine: Any) -> None:
    ranks = GroupSource()
    with FunctionReward(length) as lengths, combine({"rank": ranks, "length": lengths}) as both:
        assert both.needs_groups and both.batched
        results = scored(both, MIXED)
    assert [min(names) for names, _ in ranks.submitted] == ["x", "y", "z"]
    texts = [text for group in OUTPUTS for text in group]
    if combine is SumReward:
        assert scores(results, "rank") == EXPECTED
        assert scores(results, "length") == [float(len(text)) for text in texts]
    else:
        expected = [(rank + len(text)) / 2 for rank, text in zip(EXPECTED, texts, strict=True)]
        assert scores(results) == pytest.approx(expected)


def test_outage_is_waited_out_with_whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage_module, "_FIRST_PAUSE_S", 0.01)
    ranks = GroupSource(failures=1)
    assert scores(scored(ranks, IN_ORDER, policy="wait")) == EXPECTED
    assert [min(names) for names, _ in ranks.submitted] == ["x", "y", "z", "x"]
    assert ranks.submitted[-1][1] == OUTPUTS[0]


class AwayForOne(RewardSource):
    """Does not score the output `ba` the first time."""

    name = "away for one"

    def __init__(self) -> None:
        self.left = 1

    def check(self) -> None:
        """Nothing to check."""

    def submit(self, samples: Sequence[Rollout]) -> Future[list[RewardResult]]:
        future: Future[list[RewardResult]] = Future()
        future.set_result([self._result(each) for each in samples])
        return future

    def _result(self, sample: Rollout) -> RewardResult:
        if sample.completion.text == "ba" and self.left:
            self.left -= 1
            return RewardResult(RewardStatus.TIMEOUT, detail="late")
        return RewardResult(RewardStatus.OK, scores={"reward": 1.0})


def test_group_in_which_another_member_failed_for_one_sample_is_asked_for_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outage_module, "_FIRST_PAUSE_S", 0.01)
    ranks = GroupSource()
    results = scored(SumReward({"rank": ranks, "other": AwayForOne()}), IN_ORDER, policy="wait")
    assert scores(results, "rank") == EXPECTED
    assert ranks.submitted[3:] == [({"x"}, OUTPUTS[0])]


def test_failure_of_a_group_ends_a_run_that_tolerates_none() -> None:
    with pytest.raises(RewardInvalidError, match="4 of 12 samples"):
        scored(GroupSource(failures=1, status=RewardStatus.INVALID), IN_ORDER)


def test_rollouts_that_are_there_are_submitted_group_by_group() -> None:
    ranks = GroupSource(0.05)
    samples = [rollout(name, text) for name, group in zip("xyz", OUTPUTS, strict=True) for text in group]
    assert scores(submit_groups(ranks, samples, 4).result(60)) == EXPECTED
    assert len(ranks.submitted) == 3
    with FunctionReward(length) as plain:
        assert len(submit_groups(plain, samples, 4).result(60)) == 12
        assert plain.stats().requests == 1


def test_whoever_scores_single_samples_refuses_a_source_of_groups() -> None:
    with pytest.raises(ConfigError, match="a reward server has each scored by itself"):
        ScoringService(GroupSource(), max_waiting=1, deadline_s=1.0)
    refuse_groups(AwayForOne(), "a reward server")


def test_combinations_pass_the_wish_up() -> None:
    def encode(prompt: Prompt, text: str) -> Sequence[int]:
        return ()

    assert DeltaReward(GroupSource(), encode).needs_groups
    assert SumReward({"a": SumReward({"b": GroupSource()})}).needs_groups
    assert not SumReward({"a": AwayForOne()}).needs_groups


def test_recording_says_that_groups_were_wanted(tmp_path: Any) -> None:
    line = (
        '{"rank": 0, "sample_sha256": "", "status": "ok", "scores": {}, "token_scores": null, "members": {}, '
    )
    line += '"model": "", "version": "", "latency_s": 0.0, "detail": ""'
    for more, wanted in (("", False), (', "groups": true', True)):
        (tmp_path / "rewards.jsonl").write_text(line + more + "}\n")
        assert ReplayReward(tmp_path).needs_groups is wanted

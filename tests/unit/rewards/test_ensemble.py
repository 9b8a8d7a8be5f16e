"""Several sources as one: the formulas, failures of members, and how users ask for it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from conch.config import RewardConfig, RewardFailureConfig, load
from conch.converters.triton_models.ensemble_model import combine as serve
from conch.errors import ConfigError
from conch.rewards.base import ClientStats, ServerTimes
from conch.rewards.combined import EnsembleReward, SumReward, disagreement, members_variance
from conch.rewards.factory import from_user
from conch.rewards.function import FunctionReward
from conch.rewards.scorer import RewardScorer, combine
from conch.rewards.served import TritonReward
from conch.types import RewardResult, RewardStatus, Rollout
from tests.fakes.rollouts import rollouts

WAIT_S = 120
BATCH = rollouts("a", "bb", "ccc")


def length(samples: list[str], prompts: list[str], outputs: list[str]) -> list[float]:
    return [float(len(output)) for output in outputs]


def inverse(samples: list[str], prompts: list[str], outputs: list[str]) -> list[float]:
    return [1.0 / len(output) for output in outputs]


def ten(samples: list[str], prompts: list[str], outputs: list[str]) -> list[float]:
    return [10.0] * len(outputs)


def two(samples: list[str], prompts: list[str], outputs: list[str]) -> dict[str, list[float]]:
    return {"x": [1.0] * len(outputs), "y": [float(len(output)) for output in outputs]}


def three(samples: list[str], prompts: list[str], outputs: list[str]) -> dict[str, list[float]]:
    return {"x": [5.0] * len(outputs), "y": [7.0] * len(outputs)}


def dense(samples: list[str], prompts: list[str], outputs: list[str]) -> list[list[float]]:
    return [[1.0] * len(output) for output in outputs]


class Given(FunctionReward):
    """Gives the sample at each place its score; NaN is a failure."""

    def __init__(self, scores: np.ndarray) -> None:
        super().__init__(ten)
        self.scores = scores.tolist()

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        future: Future[list[RewardResult]] = Future()
        future.set_result(
            [
                RewardResult(RewardStatus.OK, scores={"reward": score})
                if np.isfinite(score)
                else RewardResult(RewardStatus.INVALID, detail="the score is nan")
                for score in self.scores
            ]
        )
        return future


class Partial(FunctionReward):
    """Does not score outputs of two letters, with a status of its own."""

    def __init__(self, status: RewardStatus = RewardStatus.UNAVAILABLE) -> None:
        super().__init__(ten)
        self.status = status

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        good = RewardResult(RewardStatus.OK, scores={"reward": 10.0}, version="7", latency_s=0.25)
        bad = RewardResult(self.status, detail="gone fishing", latency_s=4.0)
        future: Future[list[RewardResult]] = Future()
        future.set_result([bad if len(each.completion.text) == 2 else good for each in rollouts])
        return future


def results_of(source: Any) -> list[RewardResult]:
    with source:
        source.check()
        return source.submit(BATCH).result(WAIT_S)


def members(*functions: Any) -> dict[str, FunctionReward]:
    made = [each if isinstance(each, FunctionReward) else FunctionReward(each) for each in functions]
    return dict(zip("abc", made, strict=False))


SCORES = np.array([[1.0, 1.0, 10.0], [2.0, 0.5, 10.0], [3.0, 1 / 3, 10.0]])


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("mean", SCORES.mean(axis=1)),
        ("wco", SCORES.min(axis=1)),
        ("uwo", SCORES.mean(axis=1) - 0.3 * SCORES.var(axis=1)),
    ],
)
def test_an_ensemble_has_the_papers_objectives(objective: Any, expected: np.ndarray) -> None:
    found = results_of(EnsembleReward(members(length, inverse, ten), objective, uwo_weight=0.3))

    assert [result.scores["reward"] for result in found] == pytest.approx(expected.tolist(), rel=1e-12)
    assert [list(result.members.values()) for result in found] == SCORES.tolist()
    assert all(list(result.members) == ["a", "b", "c"] and not result.detail for result in found)


@pytest.mark.parametrize("variance", ["population", "sample"])
@pytest.mark.parametrize("objective", ["mean", "wco", "uwo"])
def test_the_client_and_a_server_combine_alike_whoever_is_missing(objective: Any, variance: Any) -> None:
    generator = np.random.default_rng(7)
    for count in range(1, 7):
        scores = generator.normal(size=(40, count)) * 10.0 ** generator.integers(-3, 4, size=(40, 1))
        scores[generator.random(scores.shape) < 0.3] = np.nan
        scores[::5] = np.round(scores[::5])  # ties
        scores[3] = 2.5
        scores[4, 0], scores[4, 1:] = 1.5, np.nan
        scores = scores[np.isfinite(scores).any(axis=1)]
        served, spread, used = serve(scores, objective, 0.7, variance)

        columns = {f"m{place}": Given(scores[:, place]) for place in range(count)}
        ensemble = EnsembleReward(
            columns, objective, uwo_weight=0.7, variance=variance, on_member_failure="renormalise"
        )
        with ensemble:
            found = ensemble.submit(rollouts(*map(str, range(len(scores))))).result(WAIT_S)
        assert [result.scores["reward"] for result in found] == pytest.approx(served.tolist(), rel=1e-11)
        there = [[score for score in result.members.values() if score is not None] for result in found]
        assert [len(row) for row in there] == used.tolist()
        expected = [np.var(row, ddof=int(variance == "sample" and len(row) > 1)) for row in there]
        assert spread.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert [members_variance(row, variance) for row in there] == pytest.approx(
            expected, rel=1e-9, abs=1e-12
        )
        assert np.isfinite(served).all() and min(used) == 1


def test_the_variance_of_a_sample_costs_k_over_k_less_one_times_as_much() -> None:
    config = RewardConfig(combine="uwo", uwo_weight=0.5, variance="sample")
    with from_user({"a": length, "b": inverse, "c": ten}, config) as source:
        found = source.submit(BATCH).result(WAIT_S)
    expected = SCORES.mean(axis=1) - 0.5 * SCORES.var(axis=1) * 3 / 2
    assert [result.scores["reward"] for result in found] == pytest.approx(expected.tolist())
    with pytest.raises(ConfigError, match="variance"):
        load(RewardConfig, {"variance": "unbiased"})


def test_disagreement_is_the_variance_of_the_members_of_each_objective() -> None:
    several = results_of(EnsembleReward(members(two, three), "mean"))[1]
    assert disagreement(several) == pytest.approx((4.0 + 6.25) / 2)  # x: 1, 5; y: 2, 7
    inner = EnsembleReward(members(length, ten), "mean")
    summed = results_of(SumReward({"rm": inner, "rule": FunctionReward(ten)}))[0]
    assert disagreement(summed) == 4.5**2
    assert disagreement(results_of(FunctionReward(ten))[0]) is None


def test_an_ensemble_of_several_objectives_combines_each() -> None:
    found = results_of(EnsembleReward(members(two, three), "mean"))

    assert [result.scores for result in found] == [{"x": 3.0, "y": (7.0 + n) / 2} for n in (1, 2, 3)]
    assert found[1].members == {"a/x": 1.0, "a/y": 2.0, "b/x": 5.0, "b/y": 7.0}


def test_a_member_that_fails_fails_the_sample() -> None:
    found = results_of(EnsembleReward(members(length, Partial()), "mean"))

    assert [result.status.value for result in found] == ["ok", "unavailable", "ok"]
    assert found[1].detail == "member `b` gave no score: gone fishing"
    assert not found[1].scores and not found[1].members
    assert (found[0].version, found[0].latency_s, found[1].latency_s) == (",7", 0.25, 4.0)


def test_renormalise_takes_the_others_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    source = EnsembleReward(members(length, Partial(), inverse), "mean", on_member_failure="renormalise")
    scorer = RewardScorer(source, RewardConfig())
    with source, caplog.at_level(logging.WARNING, logger="conch"):
        scorer.submit(BATCH)
        first = scorer.gather()
        scorer.submit(BATCH)
        scorer.gather()

    assert [result.scores["reward"] for result in first] == pytest.approx([4.0, 1.25, (13 + 1 / 3) / 3])
    assert first[1].members == {"a": 2.0, "b": None, "c": 0.5}
    assert [result.detail for result in first] == ["", "scored by 2 of 3 members", ""]
    assert scorer.metrics()["reward/degraded_fraction"] == pytest.approx(1 / 3)
    assert [record.message for record in caplog.records] == [
        "the mean of a, b, c: samples are scored by 2 of 3 members; `b`: gone fishing"
    ]


def test_with_no_member_left_there_is_no_score() -> None:
    silent = EnsembleReward(members(Partial(), Partial()), "mean", on_member_failure="renormalise")
    assert [result.ok for result in results_of(silent)] == [True, False, True]


@pytest.mark.parametrize("make", [lambda given: EnsembleReward(given, "mean"), SumReward])
def test_bad_data_decides_over_an_absent_server(make: Any) -> None:
    found = results_of(make(members(Partial(), Partial(RewardStatus.INVALID))))
    assert found[1].status is RewardStatus.INVALID and "`b`" in found[1].detail


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ((length, two), "`a` gives one score, `b` the objectives x, y"),
        ((dense, dense), "`a` gives a score for each token"),
        ((ten, length, dense), "`a` gives one score, `c` a score for each token"),
    ],
)
def test_members_that_do_not_fit_together_are_bad_data(pair: Any, said: str) -> None:
    found = results_of(EnsembleReward(members(*pair), "wco"))
    assert {result.status for result in found} == {RewardStatus.INVALID}
    assert found[0].detail == (
        f"the members of an ensemble need one score per sample each, or the same objectives: {said}"
    )


def test_a_sum_has_all_objectives_by_name() -> None:
    found = results_of(SumReward(members(length, two)))

    assert found[2].scores == {"a": 3.0, "b/x": 1.0, "b/y": 3.0}
    assert combine(found[2], {"a": 2.0, "b/y": -1.0}) == 4.0


def test_a_sum_without_one_of_its_parts_is_no_reward() -> None:
    assert [result.ok for result in results_of(SumReward(members(length, Partial())))] == [
        True,
        False,
        True,
    ]


def test_a_sum_keeps_what_its_parts_tell() -> None:
    inner = EnsembleReward(members(length, Partial()), "mean", on_member_failure="renormalise")
    (_, found, _) = results_of(SumReward({"rm": inner, "rule": FunctionReward(ten)}))

    assert found.scores == {"rm": 2.0, "rule": 10.0}
    assert found.members == {"rm/a": 2.0, "rm/b": None}
    assert found.detail == "`rm` scored by 1 of 2 members"


def test_dense_scores_cannot_stand_beside_others() -> None:
    found = results_of(SumReward(members(length, dense)))
    assert {result.status for result in found} == {RewardStatus.INVALID}
    assert "`b` scores each token" in found[0].detail


def test_check_names_the_member() -> None:
    def wrong(texts: list[str]) -> list[float]:
        return []

    with (
        SumReward(members(length, wrong)) as source,
        pytest.raises(ConfigError, match=r"member `b`: .*wrong"),
    ):
        source.check()


def test_a_member_that_breaks_the_protocol_breaks_the_request() -> None:
    class Short(FunctionReward):
        def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
            return super().submit(rollouts[1:])

    scorer = RewardScorer(
        source := SumReward(members(length, Short(ten))),
        RewardConfig(failure=RewardFailureConfig(policy="drop")),
    )
    with source:
        scorer.submit(BATCH)
        with pytest.raises(Exception, match="member `b` gave 2 results for 3 samples"):
            scorer.gather()


class Busy(FunctionReward):
    """Counts of its own."""

    def stats(self) -> ClientStats:
        return ClientStats(
            5,
            2,
            {"timeout": 2},
            deduplicated=3,
            replica_faults=1,
            most_in_flight=4,
            model_change="changed",
        )

    def server_statistics(self) -> Future[ServerTimes]:
        future: Future[ServerTimes] = Future()
        future.set_result(ServerTimes(5, 0.5, 2.0))
        return future


def test_stats_are_those_of_all_members() -> None:
    with SumReward({"a": Busy(ten), "b": Busy(ten), "c": FunctionReward(ten)}) as source:
        source.submit(BATCH).result(WAIT_S)
        found = source.stats()
        assert source.server_statistics().result(WAIT_S) == ServerTimes(10, 1.0, 4.0)
    assert found == ClientStats(
        11,
        4,
        {"timeout": 4},
        deduplicated=6,
        replica_faults=2,
        most_in_flight=8,
        model_change="changed",
    )


# ------------------------------------------------------------------------------------------ what users give


def test_a_mapping_is_summed_unless_the_config_says_otherwise() -> None:
    given = {"long": length, "served": "127.0.0.1:8001/walks"}
    with from_user(given, RewardConfig()) as source:
        assert isinstance(source, SumReward) and isinstance(source.members["served"], TritonReward)
    config = RewardConfig(combine="uwo", uwo_weight=0.5, on_member_failure="renormalise")
    with from_user({"a": length, "b": inverse}, config) as source:
        assert isinstance(source, EnsembleReward)
        assert source.submit(BATCH).result(WAIT_S)[1].scores["reward"] == 1.25 - 0.5 * 0.75**2


def test_members_of_the_config_stand_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_HOST", "127.0.0.1:8001/other")
    urls = {"a": "127.0.0.1:8001/a", "b": "127.0.0.1:8002/b"}
    with from_user(None, RewardConfig(members=urls, combine="mean")) as source:
        assert source.name == "the mean of a, b"


def test_url_and_members_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="`url` for one reward or `members` for several"):
        load(RewardConfig, {"url": "h:1/m", "members": {"a": "h:1/a"}})


def test_a_sum_leaves_out_the_functions_that_do_not_apply_to_a_sample() -> None:
    """As TRL's sum over several reward functions; one that fails is another matter."""

    def math(samples: Any, prompts: Any, outputs: Any) -> list[float | None]:
        return [1.0, None, None, None]

    def code(samples: Any, prompts: Any, outputs: Any) -> dict[str, list[float | None]]:
        return {"runs": [None, 2.0, None, float("nan")], "style": [None, 4.0, None, 1.0]}

    with from_user({"math": math, "code": code}, RewardConfig()) as source:
        results = source.submit(rollouts("a", "b", "c", "d")).result(60)
    assert [dict(result.scores) for result in results] == [
        {"math": 1.0},
        {"code/runs": 2.0, "code/style": 4.0},
        {},
        {},
    ]
    assert results[0].absent == ("code/runs", "code/style") and results[1].absent == ("math",)
    assert [result.status for result in results[2:]] == [RewardStatus.INVALID] * 2
    assert "member `code` gave no score" in results[3].detail and "nan" in results[3].detail
    assert combine(results[0], {"math": 2.0, "code/runs": 3.0}) == 2.0

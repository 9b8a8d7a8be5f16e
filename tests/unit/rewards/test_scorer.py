"""Scorer: the failure policies, alone and over two ranks, with real functions as sources."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from conch.config import RewardConfig, RewardFailureConfig
from conch.errors import ConfigError, RewardError, RewardInvalidError, RewardUnavailableError
from conch.rewards import outage as outage_module
from conch.rewards.base import ClientStats, RewardSource, ServerTimes
from conch.rewards.function import FunctionReward
from conch.rewards.scorer import RewardScorer, combine
from conch.types import OnFinished, Prompt, RewardResult, RewardStatus, Rollout
from tests.fakes.rollouts import rollout, rollouts

WAIT_S = 120.0
WAIT = RewardConfig(failure=RewardFailureConfig(policy="wait"))


def length(samples: list[str], prompts: list[str], outputs: list[str]) -> list[float]:
    """The length of each output; NaN for outputs that hold an x."""
    return [float("nan") if "x" in output else float(len(output)) for output in outputs]


class Outage(RewardSource):
    """A source whose samples with a `u` are unavailable the first `rounds` times that they are asked for."""

    name = "outage"

    def __init__(self, rounds: int) -> None:
        self.left = rounds
        self.asked: list[list[str]] = []

    def check(self) -> None:
        """Nothing to check."""

    def submit(self, chunk: Sequence[Rollout]) -> Future[list[RewardResult]]:
        self.asked.append([rollout.completion.text for rollout in chunk])
        results = [self._result(rollout) for rollout in chunk]
        self.left -= any(not result.ok for result in results)
        future: Future[list[RewardResult]] = Future()
        future.set_result(results)
        return future

    def _result(self, rollout: Rollout) -> RewardResult:
        if "u" in rollout.completion.text and self.left > 0:
            return RewardResult(RewardStatus.UNAVAILABLE, detail="nobody there", latency_s=2.0)
        text = rollout.completion.text
        return RewardResult(RewardStatus.OK, scores={"reward": 1.0}, latency_s=1.0, model=text)


class Ranks:
    """Ranks as threads, and the sum over them as a collective that breaks when one rank leaves early."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count)
        self._values = [0] * count
        self.calls = [0] * count

    def agree(self, rank: int) -> Callable[[int], int]:
        def sum_over_ranks(value: int) -> int:
            self.calls[rank] += 1
            self._values[rank] = value
            self._barrier.wait(WAIT_S)
            total = sum(self._values)
            self._barrier.wait(WAIT_S)
            return total

        return sum_over_ranks

    def run(self, *bodies: Callable[[Callable[[int], int]], Any]) -> list[Any]:
        """What each body returned, or the RewardError that it raised."""

        def guarded(rank: int) -> Any:
            try:
                return bodies[rank](self.agree(rank))
            except RewardError as error:
                return error

        with ThreadPoolExecutor(len(bodies)) as pool:
            return list(pool.map(guarded, range(len(bodies))))


def gather(
    source: Any, config: RewardConfig, batch: list[Rollout], agree: Callable[[int], int]
) -> list[RewardResult]:
    scorer = RewardScorer(source, config, agree)
    scorer.submit(batch)
    return scorer.gather()


@pytest.fixture
def quick_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage_module, "_FIRST_PAUSE_S", 0.01)


def test_results_come_in_the_order_of_the_chunks() -> None:
    with FunctionReward(length) as source:
        scorer = RewardScorer(source, RewardConfig())
        scorer.submit(rollouts("aaa", "a"))
        scorer.submit(rollouts("aa"))
        assert [result.scores["reward"] for result in scorer.gather()] == [3.0, 1.0, 2.0]
        assert scorer.gather() == []


def test_chunks_are_requested_before_gather() -> None:
    called = threading.Event()

    def reward(samples: list[str], prompts: list[str], outputs: list[str]) -> list[float]:
        called.set()
        return [1.0] * len(samples)

    with FunctionReward(reward) as source:
        scorer = RewardScorer(source, RewardConfig())
        scorer.submit(rollouts("a"))
        assert called.wait(WAIT_S)
        scorer.gather()


class Letters:
    """A sampler whose chunks of two end in the order that is given, and that goes on when told to."""

    def __init__(self, *ends: Sequence[int]) -> None:
        self._ends = ends
        self.in_between: Callable[[], object] = lambda: None

    def generate(
        self, prompts: Sequence[Prompt], *, greedy: bool = False, on_finished: OnFinished | None = None
    ) -> Iterator[list[Rollout]]:
        made = [rollout(prompt.text, "a" * (number + 1)) for number, prompt in enumerate(prompts)]
        for start, order in zip(range(0, len(made), 2), self._ends, strict=True):
            for place in order:
                if on_finished is not None:
                    on_finished({place: made[place]})
                self.in_between()
            yield made[start : start + 2]


PROMPTS = [Prompt("p", (1,))] * 4


def test_wait_says_whether_all_rewards_are_there() -> None:
    released = threading.Event()

    def slow(samples: list[str], prompts: list[str], outputs: list[str]) -> list[float]:
        released.wait(WAIT_S)
        return length(samples, prompts, outputs)

    with FunctionReward(slow) as source:
        scorer = RewardScorer(source, RewardConfig())
        assert scorer.wait(0.01), "nothing was asked for"
        scorer.submit(rollouts("a"))
        assert not scorer.wait(0.01)
        released.set()
        scorer.submit(rollouts("bc"))
        assert scorer.wait(WAIT_S)
        assert [result.scores["reward"] for result in scorer.gather()] == [1.0, 2.0]
        assert scorer.metrics()["reward/wait_s"] > 0
        assert scorer.wait(0.01), "gather has taken all"


def test_completions_are_requested_as_they_end_and_come_back_in_order() -> None:
    source = Outage(rounds=0)
    scorer = RewardScorer(source, RewardConfig())
    scorer.submit(rollouts("b"))
    made = scorer.submit_each(Letters([1, 0], [2, 3]), PROMPTS)
    scorer.submit(rollouts("bb"))

    assert [rollout.completion.text for rollout in made] == ["a", "aa", "aaa", "aaaa"]
    assert source.asked == [["b"], ["aa"], ["a"], ["aaa"], ["aaaa"], ["bb"]]
    assert [result.model for result in scorer.gather()] == ["b", "a", "aa", "aaa", "aaaa", "bb"]


def test_an_async_function_is_called_while_its_chunk_is_still_sampled() -> None:
    called = threading.Event()

    async def reward(samples: list[str], prompts: list[str], outputs: list[str]) -> list[float]:
        called.set()
        return [float(len(output)) for output in outputs]

    sampler = Letters([1, 0], [3, 2])
    sampler.in_between = lambda: called.wait(WAIT_S) or pytest.fail("nothing was asked for")
    with FunctionReward(reward) as source:
        scorer = RewardScorer(source, RewardConfig())
        scorer.submit_each(sampler, PROMPTS)
        assert [result.scores["reward"] for result in scorer.gather()] == [1.0, 2.0, 3.0, 4.0]


def test_a_sync_function_gets_whole_chunks() -> None:
    asked: list[list[str]] = []

    def reward(samples: list[str], prompts: list[str], outputs: list[str]) -> list[float]:
        asked.append(outputs)
        return [float(len(output)) for output in outputs]

    with FunctionReward(reward) as source:
        scorer = RewardScorer(source, RewardConfig())
        scorer.submit_each(Letters([1, 0], [3, 2]), PROMPTS)
        assert [result.scores["reward"] for result in scorer.gather()] == [1.0, 2.0, 3.0, 4.0]
    assert asked == [["a", "aa"], ["aaa", "aaaa"]]


def test_raise_names_count_and_first_detail() -> None:
    with FunctionReward(length) as source:
        scorer = RewardScorer(source, RewardConfig())
        scorer.submit(rollouts("a", "x", "xx"))
        with pytest.raises(RewardInvalidError, match=r"2 of 3 samples.*first: .*nan.*row 1.*\(invalid\)"):
            scorer.gather()
        scorer.submit(rollouts("a"))
        assert scorer.gather()[0].ok


@pytest.mark.parametrize(
    ("scores", "remedy"),
    [
        ([None, None], r"here none has one: return a number for each sample that has$"),
        ([1.0, None], r"reward\.failure\.policy=drop goes on without such samples$"),
    ],
)
def test_none_for_a_sample_is_told_with_its_remedy(scores: list[float | None], remedy: str) -> None:
    with FunctionReward(lambda samples, prompts, outputs: scores) as source:
        scorer = RewardScorer(source, RewardConfig())
        scorer.submit(rollouts("a", "b"))
        with pytest.raises(RewardInvalidError, match=remedy):
            scorer.gather()


def test_raise_tolerates_no_failure_whatever_drop_would() -> None:
    with FunctionReward(length) as source:
        scorer = RewardScorer(
            source, RewardConfig(failure=RewardFailureConfig(policy="raise", max_fraction=1))
        )
        scorer.submit(rollouts("x", "a"))
        with pytest.raises(RewardInvalidError, match="1 of 2 samples"):
            scorer.gather()


@pytest.mark.parametrize(
    ("outputs", "kind"),
    [(["a", "u"], RewardUnavailableError), (["a"], None)],
)
def test_raise_tells_infrastructure_from_data(outputs: list[str], kind: type[RewardError] | None) -> None:
    scorer = RewardScorer(Outage(rounds=1), RewardConfig())
    scorer.submit(rollouts(*outputs))
    if kind is None:
        assert scorer.gather()[0].ok
    else:
        with pytest.raises(kind, match="nobody there"):
            scorer.gather()


def test_raise_on_one_rank_raises_on_both() -> None:
    ranks = Ranks(2)
    with FunctionReward(length) as good, FunctionReward(length) as bad:
        first, second = ranks.run(
            lambda agree: gather(good, RewardConfig(), rollouts("a", "a"), agree),
            lambda agree: gather(bad, RewardConfig(), rollouts("x", "a"), agree),
        )
    assert isinstance(first, RewardInvalidError) and "on other ranks" in str(first)
    assert isinstance(second, RewardInvalidError) and "1 of 4 samples" in str(second) and "nan" in str(second)
    assert ranks.calls[0] == ranks.calls[1]


def test_kind_of_error_is_the_same_on_all_ranks() -> None:
    with FunctionReward(length) as bad:
        kinds = Ranks(2).run(
            lambda agree: gather(Outage(rounds=1), RewardConfig(), rollouts("u"), agree),
            lambda agree: gather(bad, RewardConfig(), rollouts("x"), agree),
        )
    assert [type(kind) for kind in kinds] == [RewardInvalidError, RewardInvalidError]


def test_drop_keeps_failures_as_failures_within_the_budget() -> None:
    with FunctionReward(length) as source:
        scorer = RewardScorer(
            source, RewardConfig(failure=RewardFailureConfig(policy="drop", max_fraction=0.25))
        )
        scorer.submit(rollouts("x", "a", "a", "a"))
        results = scorer.gather()
    assert [result.ok for result in results] == [False, True, True, True]
    assert not results[0].scores
    assert scorer.metrics()["reward/failed_fraction"] == 0.25


def test_drop_raises_above_the_budget() -> None:
    with FunctionReward(length) as source:
        scorer = RewardScorer(
            source, RewardConfig(failure=RewardFailureConfig(policy="drop", max_fraction=0.25))
        )
        scorer.submit(rollouts("x", "x", "a", "a"))
        with pytest.raises(RewardInvalidError, match=r"2 of 4 .*failure\.max_fraction=0.25"):
            scorer.gather()


@pytest.mark.parametrize(("other", "raises"), [(["a", "a", "a"], False), (["a"], True)])
def test_drop_counts_over_all_ranks(other: list[str], raises: bool) -> None:
    config = RewardConfig(failure=RewardFailureConfig(policy="drop", max_fraction=0.25))
    with FunctionReward(length) as one, FunctionReward(length) as two:
        outcomes = Ranks(2).run(
            lambda agree: gather(one, config, rollouts("x"), agree),
            lambda agree: gather(two, config, rollouts(*other), agree),
        )
    assert [isinstance(outcome, RewardError) for outcome in outcomes] == [raises, raises]


def test_wait_asks_again_for_what_is_missing_only(
    quick_waits: None, caplog: pytest.LogCaptureFixture
) -> None:
    source = Outage(rounds=2)
    scorer = RewardScorer(source, WAIT)
    with caplog.at_level(logging.INFO, logger="conch"):
        scorer.submit(rollouts("a", "u"))
        results = scorer.gather()
    assert all(result.ok for result in results)
    assert source.asked == [["a", "u"], ["u"], ["u"]]
    said = [record.message.split(" for ")[0].split(" after ")[0] for record in caplog.records]
    assert said == ["reward server outage away", "reward server outage is back"]


def test_wait_keeps_ranks_in_lock_step(quick_waits: None) -> None:
    ranks = Ranks(2)
    config = WAIT
    one, two = ranks.run(
        lambda agree: gather(Outage(rounds=3), config, rollouts("u", "a"), agree),
        lambda agree: gather(Outage(rounds=0), config, rollouts("a"), agree),
    )
    assert [result.ok for result in one + two] == [True] * 3
    assert ranks.calls[0] == ranks.calls[1]


def test_wait_gives_up_on_all_ranks_when_the_budget_is_spent(quick_waits: None) -> None:
    config = RewardConfig(failure=RewardFailureConfig(policy="wait", wait_budget_s=0.05))
    patient = RewardConfig(failure=RewardFailureConfig(policy="wait", wait_budget_s=3600))
    one, two = Ranks(2).run(
        lambda agree: gather(Outage(rounds=10**9), config, rollouts("u"), agree),
        lambda agree: gather(Outage(rounds=0), patient, rollouts("a"), agree),
    )
    assert isinstance(one, RewardUnavailableError) and "nobody there" in str(one)
    assert isinstance(two, RewardUnavailableError) and "other ranks" in str(two)


def test_wait_does_not_wait_for_bad_data() -> None:
    with FunctionReward(length) as bad:
        kinds = Ranks(2).run(
            lambda agree: gather(
                Outage(rounds=10**9),
                WAIT,
                rollouts("u"),
                agree,
            ),
            lambda agree: gather(bad, WAIT, rollouts("x"), agree),
        )
    assert [type(kind) for kind in kinds] == [RewardInvalidError, RewardInvalidError]


class Guest:
    """A host that notes what is asked of it; told to leave after some looks."""

    def __init__(self, leave_after: int = 10**9) -> None:
        self.leave_after = leave_after
        self.did: list[str] = []

    def save(self) -> None:
        self.did.append("save")

    def leaving(self) -> bool:
        self.leave_after -= 1
        return self.leave_after < 0

    def leave(self) -> NoReturn:
        self.did.append("leave")
        raise RewardError("left")

    def scored(self, rollouts: Sequence[Rollout], results: Sequence[RewardResult]) -> None:
        self.did.append("".join("." if result.ok else "x" for result in results))


def gather_with(
    host: Guest, source: Any, config: RewardConfig, batch: list[Rollout], agree: Callable[[int], int]
) -> list[RewardResult]:
    scorer = RewardScorer(source, config, agree)
    scorer.attach(host)
    scorer.submit(batch)
    return scorer.gather()


def test_ranks_save_together_and_once(quick_waits: None) -> None:
    soon = RewardConfig(failure=RewardFailureConfig(policy="wait", checkpoint_after_s=0))
    late = RewardConfig(failure=RewardFailureConfig(policy="wait", checkpoint_after_s=3600))
    one, two, ranks = Guest(), Guest(), Ranks(2)
    ranks.run(
        lambda agree: gather_with(one, Outage(rounds=3), late, rollouts("u", "a"), agree),
        lambda agree: gather_with(two, Outage(rounds=0), soon, rollouts("a"), agree),
    )
    assert one.did == ["save", ".."]
    assert two.did == ["save", "."]
    assert ranks.calls[0] == ranks.calls[1]


def test_a_signal_to_one_rank_makes_all_leave(quick_waits: None) -> None:
    config = WAIT
    one, two = Guest(), Guest(leave_after=2)
    outcomes = Ranks(2).run(
        lambda agree: gather_with(one, Outage(rounds=10**9), config, rollouts("u"), agree),
        lambda agree: gather_with(two, Outage(rounds=0), config, rollouts("a"), agree),
    )
    assert [str(outcome) for outcome in outcomes] == ["left", "left"]
    assert one.did == two.did == ["leave"]


class Frozen(Outage):
    """A server that stops answering when it is asked again, until `thaw`."""

    def __init__(self) -> None:
        super().__init__(rounds=1)
        self.thaw: Callable[[], None] = lambda: None

    def submit(self, chunk: Sequence[Rollout]) -> Future[list[RewardResult]]:
        answered = super().submit(chunk)
        if len(self.asked) == 1:
            return answered
        pending: Future[list[RewardResult]] = Future()
        self.thaw = lambda: pending.set_result(answered.result())
        return pending


def test_ranks_attend_to_signals_while_a_request_hangs(
    quick_waits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outage_module, "_SLICE_S", 0.001)
    host = Guest(leave_after=100)
    with pytest.raises(RewardError, match="left"):
        gather_with(
            host,
            Frozen(),
            WAIT,
            rollouts("u"),
            lambda value: value,
        )


def test_a_host_is_told_of_failures_before_they_are_raised() -> None:
    host = Guest()
    with pytest.raises(RewardUnavailableError):
        gather_with(host, Outage(rounds=1), RewardConfig(), rollouts("a", "u"), lambda value: value)
    assert host.did == [".x"]


def test_a_long_outage_is_spoken_of_once_a_minute(
    quick_waits: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10**6))  # each look at the clock takes a second
    passing = SimpleNamespace(monotonic=lambda: float(next(clock)), sleep=lambda _seconds: None)
    monkeypatch.setattr(outage_module, "time", passing)
    gather(
        Outage(rounds=40),
        WAIT,
        rollouts("u"),
        lambda value: value,
    )
    words = [record.message for record in caplog.records if "asking again" in record.message]
    away_s = [int(word.split("away for ")[1].split(" s")[0]) for word in words]
    assert len(away_s) > 2
    assert all(55 < later - earlier < 75 for earlier, later in itertools.pairwise(away_s))


class Broken(Outage):
    """A source that breaks the protocol in the way it was told to."""

    def __init__(self, how: str) -> None:
        super().__init__(rounds=0)
        self.how = how

    def submit(self, chunk: Sequence[Rollout]) -> Future[list[RewardResult]]:
        if self.how == "submit":
            raise KeyError("oops")
        future: Future[list[RewardResult]] = Future()
        if self.how == "future":
            future.set_exception(KeyError("oops"))
        else:
            future.set_result([])
        return future


@pytest.mark.parametrize(
    ("how", "words"), [("submit", "KeyError"), ("future", "KeyError"), ("count", "0 results for 1 samples")]
)
def test_source_that_breaks_the_protocol_raises_on_all_ranks(how: str, words: str) -> None:
    one, two = Ranks(2).run(
        lambda agree: gather(Broken(how), RewardConfig(), rollouts("a"), agree),
        lambda agree: gather(Outage(rounds=0), RewardConfig(), rollouts("a"), agree),
    )
    assert isinstance(one, RewardInvalidError) and words in str(one)
    assert isinstance(two, RewardInvalidError)


def test_metrics_describe_the_last_gather() -> None:
    scorer = RewardScorer(
        Outage(rounds=1), RewardConfig(failure=RewardFailureConfig(policy="drop", max_fraction=1))
    )
    scorer.submit(rollouts("a", "a", "u"))
    scorer.submit(rollouts("a"))
    scorer.gather()
    metrics = scorer.metrics()
    assert metrics.pop("reward/wait_s") >= 0
    assert 0 <= metrics.pop("reward/hidden_fraction") <= 1
    assert metrics == {
        "reward/latency_p50_s": 1.0,
        "reward/latency_p99_s": 2.0,
        "reward/degraded_fraction": 0.0,
        "reward/failed_fraction": 0.25,
        "reward/requests": 2.0,
        "reward/retries": 0.0,
        "reward/deduplicated": 0.0,
        "reward/in_flight": 0.0,
        "reward/queue_s": 0.0,
        "reward/compute_s": 0.0,
    }
    scorer.submit(rollouts("a"))
    scorer.gather()
    assert scorer.metrics()["reward/requests"] == 1.0
    assert scorer.metrics()["reward/failed_fraction"] == 0.0


class Served(Outage):
    """A source that counts its requests, as a client of servers does."""

    def __init__(self) -> None:
        super().__init__(rounds=0)
        self.now = ClientStats(requests=100, retries=10, deduplicated=20)
        self.times: list[Future[ServerTimes]] = []

    def stats(self) -> ClientStats:
        return self.now

    def server_statistics(self) -> Future[ServerTimes]:
        self.times.append(Future())
        return self.times[-1]


def test_stats_are_those_since_the_gather_before() -> None:
    source = Served()
    scorer = RewardScorer(source, RewardConfig())
    source.now = ClientStats(requests=107, retries=13, deduplicated=25, most_in_flight=4)
    scorer.gather()
    found = scorer.metrics()
    names = ("requests", "retries", "deduplicated", "in_flight")
    assert [found[f"reward/{name}"] for name in names] == [7.0, 3.0, 5.0, 4.0]
    scorer.gather()
    assert [scorer.metrics()[f"reward/{name}"] for name in names[:3]] == [0.0] * 3


def test_a_servers_own_times_are_never_waited_for() -> None:
    source = Served()
    scorer = RewardScorer(source, RewardConfig())

    def measured() -> tuple[float, float]:
        scorer.gather()
        return scorer.metrics()["reward/queue_s"], scorer.metrics()["reward/compute_s"]

    assert measured() == (0.0, 0.0)
    assert measured() == (0.0, 0.0) and len(source.times) == 1, "no answer yet: not asked again"
    source.times[0].set_result(ServerTimes(requests=4, queue_s=1.0, compute_s=6.0))
    assert measured() == (0.25, 1.5)
    source.times[1].set_exception(KeyError("oops"))
    assert measured() == (0.0, 0.0)


@pytest.mark.parametrize("policy", ["raise", "drop", "wait"])
def test_a_changed_model_makes_all_ranks_leave(policy: Any) -> None:
    config = RewardConfig(failure=RewardFailureConfig(policy=policy, max_fraction=1))
    changed = Served()
    changed.now = ClientStats(model_change="the model at h:1 was version 1, is 2")
    outcomes = Ranks(2).run(
        lambda agree: gather(changed, config, rollouts("a"), agree),
        lambda agree: gather(Served(), config, rollouts("a"), agree),
    )
    assert [type(outcome) for outcome in outcomes] == [RewardInvalidError] * 2
    assert "was version 1" in str(outcomes[0]) and "other ranks" in str(outcomes[1])


def test_combine_weighs_objectives() -> None:
    result = RewardResult(RewardStatus.OK, scores={"help": 2.0, "harm": 3.0})
    assert combine(result, {}) == 5.0
    assert combine(result, {"harm": -0.5}) == 0.5


def test_combine_refuses_unknown_objectives() -> None:
    result = RewardResult(RewardStatus.OK, scores={"help": 2.0}, model="rm")
    with pytest.raises(ConfigError, match=r"`harm`.*`help`"):
        combine(result, {"harm": 1.0})


def test_combine_adds_nothing_for_an_objective_that_does_not_apply() -> None:
    result = RewardResult(RewardStatus.OK, scores={"math": 2.0}, absent=("code",))
    assert combine(result, {"math": 3.0, "code": 5.0}) == 6.0


def test_combine_never_sums_a_failure_to_zero() -> None:
    with pytest.raises(AssertionError):
        combine(RewardResult(RewardStatus.TIMEOUT), {})


def test_rewards_requested_ahead_are_those_of_the_gather_that_adopts_them() -> None:
    """Whatever was asked for meanwhile, and in whichever order it ended."""
    with FunctionReward(length) as source:
        scorer = RewardScorer(source, RewardConfig())
        ahead = [scorer.request(rollouts("aaa")), scorer.request(rollouts("a", "aa"))]
        scorer.submit(rollouts("aaaa"))
        assert [result.scores["reward"] for result in scorer.gather()] == [4.0]
        scorer.submit(rollouts("aaaaa"))
        scorer.adopt([([1], ahead[0]), ([2, 0], ahead[1])])
        assert [result.scores["reward"] for result in scorer.gather()] == [5.0, 2.0, 3.0, 1.0]
        assert scorer.gather() == []


def test_outage_of_rewards_requested_ahead_is_waited_out(quick_waits: None) -> None:
    source = Outage(rounds=2)
    scorer = RewardScorer(source, WAIT)
    request = scorer.request(rollouts("u", "b"))
    scorer.adopt([([0, 1], request)])
    assert all(result.ok for result in scorer.gather())
    assert source.asked == [["u", "b"], ["u"], ["u"]]

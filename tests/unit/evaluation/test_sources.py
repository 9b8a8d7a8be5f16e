"""A source that watches: whatever it does, each completion gets a result, and nobody waits for ever."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from conch.evaluation.evaluator import member_totals
from conch.evaluation.sources import WatchingSource
from conch.rewards.base import ClientStats, RewardSource
from conch.types import RewardResult, RewardStatus, Rollout
from tests.runs import letters_rollout

BATCH = [letters_rollout("a", "b"), letters_rollout("c", "d")]
WAIT_S = 30.0
OK = RewardResult(RewardStatus.OK, scores={"reward": 1.0})


class Given(RewardSource):
    """Does with a batch whatever a test gives it to do."""

    name = "given"

    def __init__(self, act: Callable[[Future[Any]], object], stats: Callable[[], Any] = lambda: None) -> None:
        self._act = act
        self._stats = stats

    def check(self) -> None:
        """Nothing to check."""

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        future: Future[list[RewardResult]] = Future()
        self._act(future)
        return future

    def stats(self) -> ClientStats | None:
        return self._stats()


def raises(error: BaseException) -> Callable[[Future[Any]], None]:
    def act(future: Future[Any]) -> None:
        raise error

    return act


def ends_with(value: Any) -> Callable[[Future[Any]], None]:
    return lambda future: future.set_result(value)


def asked(source: WatchingSource) -> list[RewardResult]:
    source.submit(BATCH)
    return source.gather()


def of_words() -> RewardResult:
    """A result whose score is no number, as no type checker would let pass."""
    result = RewardResult(RewardStatus.OK, scores={"reward": 1.0})
    object.__setattr__(result, "scores", {"reward": "x"})
    return result


class _Cancelled:
    def __call__(self, future: Future[Any]) -> None:
        assert future.cancel()


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (raises(OSError("no route")), "given broke: OSError: no route"),
        (lambda future: future.set_exception(KeyError("x")), "given broke: KeyError: 'x'"),
        (lambda future: future.set_exception(SystemExit(3)), "given broke: SystemExit: 3"),
        (lambda future: future.set_exception(TimeoutError("late")), "given broke: TimeoutError: late"),
        (_Cancelled(), "its request was cancelled"),
        (ends_with([OK]), "given gave 1 results for 2 samples"),
        (ends_with(None), "given gave None for 2 samples"),
        (ends_with([1.0, 1.0]), "given gave 1.0 instead of a RewardResult"),
        (
            ends_with([RewardResult(RewardStatus.OK, scores={"reward": math.nan})] * 2),
            "given gave nan for a score",
        ),
        (ends_with([OK, of_words()]), "given broke: "),
    ],
)
def test_rubbish_is_a_failure_with_words(act: Any, words: str, caplog: pytest.LogCaptureFixture) -> None:
    results = asked(WatchingSource("gold", Given(act), WAIT_S))
    failed = [result for result in results if not result.ok]
    assert len(results) == 2 and failed
    assert all(result.detail.startswith(words) for result in failed)
    assert f"of 2 completions of this process only; first: {words}" in caplog.text


def test_one_bad_score_leaves_the_others() -> None:
    results = asked(WatchingSource("gold", Given(ends_with([OK, None])), WAIT_S))
    assert [result.ok for result in results] == [True, False]


def test_a_source_that_hangs_is_waited_for_once() -> None:
    """The next evaluation does not ask it again, until it has answered."""
    pending: list[Future[Any]] = []
    source = WatchingSource("gold", Given(pending.append), 0.05)
    late = asked(source)
    assert late[0].status is RewardStatus.TIMEOUT
    assert "no scores within 0.05 s, half of `train.collective_timeout_s`" in late[0].detail
    assert source.seconds >= 0.05
    started = time.monotonic()
    assert "is still busy with an earlier evaluation" in asked(source)[0].detail
    assert time.monotonic() - started < 0.05 and len(pending) == 1
    pending[0].set_result([OK, OK])
    threading.Timer(0.01, lambda: pending[1].set_result([OK, OK])).start()
    source._longest_wait_s = WAIT_S
    assert [result.ok for result in asked(source)] == [True, True]


def test_an_outage_is_told_once_and_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    good = [True, False, False, True, False]
    answers = iter([[OK, OK] if each else [OK, None] for each in good])
    source = WatchingSource("gold", Given(lambda future: future.set_result(next(answers))), WAIT_S)
    for _ in good:
        asked(source)
    told = [record.levelname for record in caplog.records]
    assert told == ["WARNING", "INFO", "WARNING"]


def test_requests_are_those_of_one_evaluation() -> None:
    counts = iter([7, 10, 10, 14])
    source = WatchingSource(
        "gold", Given(ends_with([OK, OK]), lambda: ClientStats(requests=next(counts))), WAIT_S
    )
    assert [(asked(source), source.requests)[1] for _ in range(2)] == [3, 4]


@pytest.mark.parametrize("stats", [lambda: None, lambda: 1 / 0], ids=["counts nothing", "broken"])
def test_a_source_that_counts_nothing_has_one_request(stats: Callable[[], Any]) -> None:
    source = WatchingSource("gold", Given(ends_with([OK, OK]), stats), WAIT_S)
    assert [(asked(source), source.requests)[1] for _ in range(2)] == [1, 1]


def test_members_with_several_objectives_have_one_total_each() -> None:
    members = {"a/help": 1.0, "a/style": 2.0, "b/help": 3.0, "b/style": None}
    result = RewardResult(RewardStatus.OK, scores={"help": 2.0, "style": 2.0}, members=members)
    assert member_totals(result, {"style": 10.0}) == {"a": 21.0, "b": None}


def test_members_of_one_objective_are_as_they_are_but_for_nan() -> None:
    result = RewardResult(RewardStatus.OK, scores={"reward": 1.0}, members={"x/a": 1.0, "x/b": math.nan})
    assert member_totals(result, {}) == {"x/a": 1.0, "x/b": None}

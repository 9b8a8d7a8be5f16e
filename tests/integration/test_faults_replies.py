"""What wrong replies and quick errors do to `TritonReward` and `RewardScorer`: a relay changes what a real
server answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from conch.errors import RewardInvalidError, RewardUnavailableError
from conch.rewards.scorer import RewardScorer
from conch.serving.server.server import TritonServer
from tests.fakes.faulty_relay import Alter, FaultyRelay
from tests.faults import (
    HASTY,
    PATIENT,
    WAIT_S,
    WAITING,
    assert_exact,
    fresh,
    is_exact,
    open_source,
    score_exactly,
)
from tests.footprint import nothing_is_left, wait_until
from tests.reward_settings import changed

AWAY = (grpc.StatusCode.UNAVAILABLE, "Server is stopping")
RAISES = (grpc.StatusCode.INTERNAL, "Failed to process the request(s) for model 'hash', message: ValueError")


@pytest.fixture(scope="module")
def server(hash_server: TritonServer) -> Iterator[TritonServer]:
    """With a relay and a source beside the test's own: what gRPC keeps as long as there is any is no leak."""
    with FaultyRelay(hash_server.url) as relay, open_source(relay.url) as source:
        source.check()
        yield hash_server


@pytest.fixture
def relay(server: TritonServer) -> Iterator[FaultyRelay]:
    """Sound until a test says otherwise; whatever the test opened must be closed again after it."""
    with nothing_is_left(), FaultyRelay(server.url) as between:
        yield between


def scores_in(reply: Any) -> np.ndarray:
    return np.frombuffer(reply.raw_output_contents[0], np.float32).reshape(-1, 1).copy()


def put_scores(reply: Any, scores: np.ndarray, dtype: str = "FP32") -> None:
    reply.raw_output_contents[0] = scores.tobytes()
    reply.outputs[0].datatype = dtype
    reply.outputs[0].shape[:] = scores.shape


def one_short(texts: list[str], reply: Any) -> None:
    put_scores(reply, scores_in(reply)[:-1])


def one_more(texts: list[str], reply: Any) -> None:
    put_scores(reply, np.concatenate([scores_in(reply), [[0.5]]]).astype(np.float32))


def doubles(texts: list[str], reply: Any) -> None:
    put_scores(reply, scores_in(reply).astype(np.float64), "FP64")


def half_the_bytes(texts: list[str], reply: Any) -> None:
    reply.raw_output_contents[0] = reply.raw_output_contents[0][: 2 * len(texts)]


def no_output(texts: list[str], reply: Any) -> None:
    del reply.outputs[:]
    del reply.raw_output_contents[:]


def nan_where_seven(texts: list[str], reply: Any) -> None:
    scores = scores_in(reply)
    scores[[text.endswith("x" * 7) and not text.endswith("x" * 8) for text in texts]] = np.nan
    put_scores(reply, scores)


def all_nan(texts: list[str], reply: Any) -> None:
    put_scores(reply, np.full((len(texts), 1), np.nan, np.float32))


WRONG = [one_short, one_more, doubles, half_the_bytes, no_output, all_nan]


@pytest.mark.parametrize("alter", WRONG)
def test_wrong_replies_become_invalid_and_never_a_number(relay: FaultyRelay, alter: Alter) -> None:
    batch = fresh(16)
    with open_source(relay.url) as source:
        source.check()
        relay.alter = alter
        results = source.submit(batch).result(WAIT_S)
        assert {result.status.value for result in results} == {"invalid"}
        assert not any(rollout.completion.text in results[0].detail for rollout in batch)
        # Asked again at most down to every single row and once more.
        assert relay.harmed <= 4 * len(batch)
        relay.alter = None
        score_exactly(source)


def test_nan_for_some_samples_costs_those_alone(relay: FaultyRelay) -> None:
    batch = fresh()
    relay.alter = nan_where_seven
    with open_source(relay.url) as source:
        results = source.submit(batch).result(WAIT_S)
    bad = [rollout for rollout, result in zip(batch, results, strict=True) if not result.ok]
    assert [rollout.sample.count("x") for rollout in bad] == [7, 7]
    assert all(is_exact(*pair) for pair in zip(batch, results, strict=True) if pair[0] not in bad)
    assert {result.status.value for result in results} == {"ok", "invalid"}


@pytest.mark.parametrize("alter", WRONG)
def test_one_wrong_reply_in_twenty_never_gives_a_wrong_score(relay: FaultyRelay, alter: Alter) -> None:
    relay.alter, relay.chance = alter, 0.05
    with open_source(relay.url) as source:
        for _ in range(20):
            batch = fresh()
            results = source.submit(batch).result(WAIT_S)
            for rollout, result in zip(batch, results, strict=True):
                assert is_exact(rollout, result) or (result.status.value == "invalid" and not result.scores)
    assert relay.harmed > 0


def test_one_error_in_twenty_loses_nothing(relay: FaultyRelay) -> None:
    relay.error, relay.chance = AWAY, 0.05
    with open_source(relay.url) as source:
        for _ in range(20):
            score_exactly(source)
        assert 0 < relay.harmed <= source.stats().retries


def test_errors_that_come_at_once_end_by_the_deadline_and_cause_no_storm(relay: FaultyRelay) -> None:
    with open_source(relay.url, HASTY) as source:
        source.check()
        relay.error = AWAY
        results = source.submit(fresh()).result(WAIT_S)
        assert {result.status.value for result in results} == {"unavailable"}
        # 4 s of pauses of up to 0.1, 0.2, 0.4, ... s, for each of four requests at once; without pauses
        # there would be a thousand requests a second.
        assert relay.requests < 200
        relay.error = None
    with open_source(relay.url) as source:
        score_exactly(source)


def test_model_that_raises_on_everything_is_not_asked_for_ever(relay: FaultyRelay) -> None:
    batch = fresh(16)
    with open_source(relay.url) as source:
        source.check()
        relay.error = RAISES
        results = source.submit(batch).result(WAIT_S)
    assert {result.status.value for result in results} == {"invalid"}
    assert relay.harmed <= 4 * len(batch)


def test_scorer_raises_what_kind_of_fault_it_was(relay: FaultyRelay) -> None:
    with open_source(relay.url, HASTY) as source:
        source.check()
        scorer = RewardScorer(source, HASTY)
        relay.alter = all_nan
        scorer.submit(fresh())
        with pytest.raises(RewardInvalidError, match=r"64 of 64 samples got no reward.*nan"):
            scorer.gather()
        relay.error = AWAY
        scorer.submit(fresh())
        with pytest.raises(RewardUnavailableError, match=r"64 of 64 samples.*Server is stopping"):
            scorer.gather()


def test_scorer_drops_what_is_bad_and_keeps_the_others_exact(relay: FaultyRelay) -> None:
    config = changed(PATIENT, failure={"policy": "drop"})
    relay.alter = nan_where_seven
    batch = fresh()
    with open_source(relay.url, config) as source:
        scorer = RewardScorer(source, config)
        scorer.submit(batch)
        results = scorer.gather()
    assert scorer.metrics()["reward/failed_fraction"] == 2 / 64
    assert sum(is_exact(*pair) for pair in zip(batch, results, strict=True)) == 62


def test_scorer_waits_out_errors_with_the_same_rewards(relay: FaultyRelay) -> None:
    batch = fresh()
    with open_source(relay.url, WAITING) as source:
        source.check()
        scorer = RewardScorer(source, WAITING)
        relay.error = AWAY
        scorer.submit(batch)
        wait_until(lambda: relay.harmed >= 3, lambda: "nothing was asked")
        relay.error = None
        assert_exact(batch, scorer.gather())

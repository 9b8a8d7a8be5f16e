"""TritonReward with several servers: who is asked, what if one fails, what if the model changes."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import grpc
import pytest

from conch.config import OnModelChange, RewardClientConfig, RewardConfig
from conch.errors import RewardInvalidError, RewardUnavailableError
from conch.rewards.client.queue import RequestQueue
from conch.rewards.client.triton import TritonTransport
from conch.rewards.served import TritonReward
from conch.triton.contract import RewardModelSpec
from conch.types import RewardResult, RewardStatus
from tests.fakes.rollouts import rollouts
from tests.fakes.triton_server import Action, FakeTriton, fail, hang, reply
from tests.reward_settings import changed

WAIT_S = 120
OLD, NEW = "0" * 64, "1" * 64
CONFIG = RewardConfig(client=RewardClientConfig(request_timeout_s=30, deadline_s=100))
SINGLES = changed(CONFIG, client={"batch_rows": 1})
TEXT = RewardModelSpec(name="walks", max_batch_size=8, content_sha256=OLD)
BUSY = fail(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
BROKEN = fail(grpc.StatusCode.INTERNAL, "Failed to process the request(s), message: CUDA error")


def length(row: Any) -> list[float]:
    return [float(len(row))]


def values(results: list[RewardResult]) -> list[float]:
    return [result.scores["reward"] for result in results]


@contextmanager
def servers(*specs: RewardModelSpec) -> Iterator[list[FakeTriton]]:
    with ExitStack() as stack:
        yield [stack.enter_context(FakeTriton(spec, length)) for spec in specs or (TEXT, TEXT)]


def url(*fakes: FakeTriton | int) -> str:
    ports = [fake if isinstance(fake, int) else fake.port for fake in fakes]
    return ",".join(f"127.0.0.1:{port}" for port in ports) + "/walks"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def always(fake: FakeTriton, action: Action) -> None:
    fake.script.extend([action] * 1000)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Who is asked.


def test_idle_servers_share_what_is_submitted_at_once() -> None:
    with servers() as (a, b), TritonReward(url(a, b), CONFIG) as reward:
        reward.check()  # both are known
        outputs = ["a" * count for count in range(8)]
        assert values(reward.submit(rollouts(*outputs)).result(WAIT_S)) == [1.0 + n for n in range(8)]
    # A probe each, then shares of about the same number of letters.
    assert sorted(len(fake.requests) for fake in (a, b)) == [2, 2]
    assert sorted(len(fake.requests[1]) for fake in (a, b)) == [3, 5]


def test_each_server_gets_no_more_than_max_in_flight() -> None:
    release = threading.Event()
    config = changed(SINGLES, client={"max_in_flight": 2})
    with servers() as (a, b), TritonReward(url(a, b), config) as reward:
        reward.check()
        for fake in (a, b):
            fake.score = lambda row: [1.0 if release.wait(WAIT_S) else 0.0]
        future = reward.submit(rollouts(*("a" * count for count in range(12))))
        until(lambda: a.most_in_flight == b.most_in_flight == 2)
        assert reward.stats().most_in_flight == 4
        release.set()
        assert values(future.result(WAIT_S)) == [1.0] * 12
        assert max(a.most_in_flight, b.most_in_flight) == 2
        assert reward.stats().most_in_flight <= 4
        until(lambda: reward.stats().most_in_flight == 0)


def test_server_that_has_less_to_do_is_asked() -> None:
    release = threading.Event()
    with servers() as (a, b), TritonReward(url(a, b), SINGLES) as reward:
        reward.check()
        before = len(b.requests)
        a.score = lambda row: [1.0 if release.wait(WAIT_S) else 0.0]
        slow = reward.submit(rollouts("slow"))
        until(lambda: len(a.requests) + len(b.requests) == 2 + before)
        answers = [values(reward.submit(rollouts("q" * n)).result(WAIT_S)) for n in range(1, 6)]
        release.set()
        assert values(slow.result(WAIT_S)) == [1.0]
    assert answers == [[n + 1.0] for n in range(1, 6)]
    assert len(a.requests) == 2 and len(b.requests) == before + 5


def test_of_idle_servers_one_that_just_failed_is_asked_last() -> None:
    with servers() as (a, b), TritonReward(url(a, b), SINGLES) as reward:
        reward.check()
        always(a, BUSY)
        for count in range(1, 9):
            assert values(reward.submit(rollouts("q" * count)).result(WAIT_S)) == [count + 1.0]
    assert len(a.requests) <= 2  # the probe, and the one that failed


def test_rows_gather_while_all_places_are_taken() -> None:
    release = threading.Event()
    config = changed(CONFIG, client={"max_in_flight": 1})
    with servers(TEXT) as (server,), TritonReward(server.url, config) as reward:
        server.script.append(lambda rows, context: release.wait(WAIT_S) and reply([[9.0]])(rows, context))
        futures = [reward.submit(rollouts("x"))]
        until(lambda: len(server.requests) == 1)
        futures += [reward.submit(rollouts("a" * count)) for count in range(2, 8)]
        until(lambda: reward.stats().requests == 2)
        release.set()
        assert [values(future.result(WAIT_S)) for future in futures] == [
            [9.0],
            *([n + 1.0] for n in range(2, 8)),
        ]
    assert [len(rows) for rows in server.requests] == [1, 6]


def test_token_budget_cuts_requests() -> None:
    config = changed(CONFIG, client={"batch_tokens": 8})
    with servers(TEXT) as (server,), TritonReward(server.url, config) as reward:
        outputs = [
            "a" * (4 * tokens - 1 - n) for tokens, n in ((2, 0), (2, 1), (2, 2), (2, 3), (4, 0), (50, 0))
        ]
        reward.submit(rollouts(*outputs)).result(WAIT_S)
    assert sorted(len(rows) for rows in server.requests) == [1, 1, 4]


def test_padding_is_shared_where_the_back_end_cannot_batch_ragged_rows() -> None:
    spec = RewardModelSpec(name="walks", form="token", engine="onnxruntime", max_length=100)
    with servers(spec) as (server,), TritonReward(server.url, CONFIG) as reward:
        for letters in (3, 63, 70):
            assert values(reward.submit(rollouts("a" * letters)).result(WAIT_S)) == [letters + 1.0]
    assert server.widths == [64, 64, 100]  # never wider than the model takes


# Equal samples.


def test_rows_under_way_and_known_scores_are_not_sent_again() -> None:
    release = threading.Event()
    with servers(TEXT) as (server,), TritonReward(server.url, CONFIG) as reward:
        server.score = lambda row: [float(len(row))] if release.wait(WAIT_S) else [0.0]
        first = reward.submit(rollouts("a", "bb", "a"))
        until(lambda: len(server.requests) == 1)
        second = reward.submit(rollouts("bb", "ccc"))
        until(lambda: reward.stats().deduplicated == 2)
        release.set()
        assert values(first.result(WAIT_S)) == [2.0, 3.0, 2.0]
        assert values(second.result(WAIT_S)) == [3.0, 4.0]
        known = reward.submit(rollouts("ccc", "a")).result(WAIT_S)
        assert values(known) == [4.0, 2.0] and {result.latency_s for result in known} == {0.0}
        assert reward.stats().deduplicated == 4
    assert sorted(row for rows in server.requests for row in rows) == ["pa", "pbb", "pccc"]


def test_nothing_is_remembered_if_so_configured_nor_what_failed() -> None:
    config = changed(CONFIG, client={"cache_size": 0})
    with servers(TEXT) as (server,):
        for settings, requests in ((config, 2), (CONFIG, 2)):
            server.requests.clear()
            if settings is CONFIG:
                server.script.append(fail(grpc.StatusCode.INVALID_ARGUMENT, "no"))
            with TritonReward(server.url, settings) as reward:
                for _ in range(2):
                    reward.submit(rollouts("a")).result(WAIT_S)
            assert len(server.requests) == requests


def test_caller_that_cancels_takes_no_reward_from_others() -> None:
    release = threading.Event()
    with servers(TEXT) as (server,), TritonReward(server.url, CONFIG) as reward:
        server.score = lambda row: [1.0] if release.wait(WAIT_S) else [0.0]
        first = reward.submit(rollouts("a"))
        until(lambda: len(server.requests) == 1)
        second = reward.submit(rollouts("a"))
        until(lambda: reward.stats().deduplicated == 1)
        first.cancel()
        release.set()
        assert values(second.result(WAIT_S)) == [1.0]


# A server that fails.


def test_server_that_dies_is_replaced_by_another_and_used_again_when_it_scores() -> None:
    with servers() as (a, b), TritonReward(url(a, b), SINGLES) as reward:
        reward.check()
        a.stop()
        outputs = ["a" * count for count in range(1, 20)]
        assert values(reward.submit(rollouts(*outputs)).result(WAIT_S)) == [n + 1.0 for n in range(1, 20)]
        assert reward.stats().retries_by.keys() <= {"unavailable", "probe"}
        with FakeTriton(TEXT, length, port=a.port) as successor:
            until(lambda: bool(successor.requests))
            assert len(successor.requests[0]) == 1 and successor.requests[0][0] in ["p" + o for o in outputs]
            hold = threading.Event()
            b.score = lambda row: [float(len(row))] if hold.wait(WAIT_S) else [0.0]
            future = reward.submit(rollouts(*("b" * count for count in range(20, 30))))
            until(lambda: len(successor.requests) > 1)
            hold.set()
            assert len(values(future.result(WAIT_S))) == 10


def test_server_that_says_it_is_well_but_does_not_score_is_not_used() -> None:
    with servers() as (a, b), TritonReward(url(a, b), SINGLES) as reward:
        reward.check()
        always(a, fail(grpc.StatusCode.INTERNAL, "Stub process 'walks_0' is not healthy."))
        outputs = ["a" * count for count in range(1, 30)]
        assert values(reward.submit(rollouts(*outputs)).result(WAIT_S)) == [n + 1.0 for n in range(1, 30)]
        assert reward.stats().retries_by["unavailable"] <= SINGLES.client.max_in_flight
        seen = len(a.requests)
        until(lambda: len(a.requests) > seen)  # probed, though its flags and its configuration are fine
        assert [result.ok for result in reward.submit(rollouts("b")).result(WAIT_S)] == [True]


@pytest.mark.parametrize("action", [BUSY, BROKEN])
def test_server_that_fails_fast_does_not_attract_all_requests(action: Action) -> None:
    with servers() as (a, b), TritonReward(url(a, b), SINGLES) as reward:
        reward.check()
        always(a, action)
        results = reward.submit(rollouts(*("a" * count for count in range(1, 60)))).result(WAIT_S)
        assert values(results) == [count + 1.0 for count in range(1, 60)]
        assert (reward.stats().replica_faults > 0) is (action is BROKEN)
    assert len(a.requests) < 30  # its breaker opens


def test_what_a_server_failed_on_goes_to_another_one_though_that_has_more_to_do() -> None:
    release = {"a": threading.Event(), "b": threading.Event()}

    def holding(name: str) -> Action:
        def act(rows: list[Any], context: grpc.ServicerContext) -> Any:
            assert release[name].wait(WAIT_S)
            return reply([[1.0]])(rows, context)

        return act

    with servers() as (a, b), TritonReward(url(a, b), SINGLES) as reward:
        reward.check()
        a.script.extend([holding("a"), holding("a"), BUSY])
        b.script.extend([holding("b")] * 2)
        first = reward.submit(rollouts("q", "r", "s", "t"))
        until(lambda: len(a.requests) == len(b.requests) == 1 + 2)
        release["a"].set()
        until(lambda: reward.stats().most_in_flight == 2)  # only those of the other
        # The idle one is asked and fails; the other has two requests under way, and still gets it.
        assert values(reward.submit(rollouts("z")).result(WAIT_S)) == [2.0]
        assert a.requests.count(["pz"]) == b.requests.count(["pz"]) == 1
        release["b"].set()
        assert values(first.result(WAIT_S)) == [1.0] * 4


def test_frozen_server_costs_one_attempt_and_its_rows_go_elsewhere() -> None:
    config = changed(CONFIG, client={"request_timeout_s": 2.0, "timeout_per_1k_tokens_s": 0})
    release = threading.Event()
    with servers() as (a, b), TritonReward(url(a, b), config) as reward:
        reward.check()
        always(a, hang(release))
        outputs = ["a" * count for count in range(1, 9)]
        assert values(reward.submit(rollouts(*outputs)).result(WAIT_S)) == [n + 1.0 for n in range(1, 9)]
        release.set()
        # On a busy machine the other server's attempt may be too slow as well.
        retries = reward.stats().retries_by
        assert retries.keys() <= {"timeout", "probe"} and 1 <= retries["timeout"] <= 2


def test_port_that_never_speaks_costs_the_connect_timeout_only() -> None:
    config = changed(
        CONFIG, client={"connect_timeout_s": 0.3, "request_timeout_s": WAIT_S * 2, "deadline_s": WAIT_S * 2}
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        reward = TritonReward(url(silent.getsockname()[1]), config)
        with reward:
            future = reward.submit(rollouts("a"))
            until(lambda: reward.stats().retries_by.get("probe", 0) > 1)
            assert not future.done()


def test_connection_that_was_cut_without_a_word_is_given_up() -> None:
    with servers(TEXT) as (server,), TritonReward(server.url, CONFIG) as reward:
        assert reward.submit(rollouts("a")).result(WAIT_S)[0].ok
        limits = [
            connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
            for connection in connections_to(server.port)
        ]
    assert limits == [10_000]  # milliseconds until the kernel gives up what is not acknowledged


def connections_to(port: int) -> Iterator[socket.socket]:
    """Connections of this process to a port of this machine."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as copy:
            if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.getpeername()[1] == port:
                yield copy


def test_row_that_both_servers_refuse_is_bad_data() -> None:
    with servers() as (a, b), TritonReward(url(a, b), CONFIG) as reward:
        reward.check()
        a.poison = b.poison = "p" + "a" * 5
        results = reward.submit(rollouts(*("a" * count for count in range(1, 9)))).result(WAIT_S)
        assert [result.ok for result in results] == [True] * 4 + [False] + [True] * 3
        assert "refused row 4 (sample " in results[4].detail and "aaaaa" not in results[4].detail
        assert (
            f"127.0.0.1:{a.port} or " in results[4].detail or f"127.0.0.1:{b.port} or " in results[4].detail
        )
        assert reward.stats().replica_faults == 0
    alone = [rows for rows in [*a.requests, *b.requests] if rows == [a.poison]]
    assert 1 <= len(alone) <= 2


def test_bad_row_is_asked_at_two_servers_not_at_all() -> None:
    with servers(TEXT, TEXT, TEXT) as fakes, TritonReward(url(*fakes), SINGLES) as reward:
        reward.check()
        for fake in fakes:
            fake.poison = "pa"
        assert not reward.submit(rollouts("a")).result(WAIT_S)[0].ok
    assert sum(fake.requests.count(["pa"]) for fake in fakes) == 2


def test_row_that_the_server_takes_for_a_wrong_request_is_not_asked_elsewhere() -> None:
    with servers() as (a, b), TritonReward(url(a, b), SINGLES) as reward:
        reward.check()
        for fake in (a, b):
            fake.script.append(fail(grpc.StatusCode.INVALID_ARGUMENT, "too long"))
        (result,) = reward.submit(rollouts("a")).result(WAIT_S)
        assert result.status is RewardStatus.INVALID and "too long" in result.detail
        assert len(a.requests) + len(b.requests) == 2 + 1


def test_bad_score_is_asked_for_once_more_at_the_other_server() -> None:
    with servers() as (a, b), TritonReward(url(a, b), CONFIG) as reward:
        reward.check()
        for bad, good in ((a, b), (b, a)):
            bad.score, good.score = (lambda row: [float("nan") if row == "paa" else 1.0]), length
        outputs = ["a" * count for count in range(1, 9)]
        results = reward.submit(rollouts(*outputs)).result(WAIT_S)
        assert all(result.ok for result in results)
        assert reward.stats().replica_faults <= 1


def test_bad_score_of_the_only_server_is_asked_for_once_more_alone() -> None:
    with servers(TEXT) as (server,), TritonReward(server.url, CONFIG) as reward:
        server.script.append(reply([[2.0], [float("inf")]]))
        assert values(reward.submit(rollouts("a", "bb")).result(WAIT_S)) == [2.0, 3.0]
        assert reward.stats().retries_by == {"data": 1}
    assert server.requests == [["pa", "pbb"], ["pbb"]]


def test_score_outside_the_range_is_no_score() -> None:
    config = CONFIG.model_copy(update={"score_range": (0.0, 3.0)})
    with servers(TEXT) as (server,), TritonReward(server.url, config) as reward:
        results = reward.submit(rollouts("a", "bb", "ccc")).result(WAIT_S)
    assert [result.status.value for result in results] == ["ok", "ok", "invalid"]
    assert "4, outside reward.score_range (0.0, 3.0)" in results[2].detail


# Limits and deadlines.


def test_deadline_grows_with_the_length_of_what_is_asked() -> None:
    told: list[float] = []
    config = changed(CONFIG, client={"timeout_per_1k_tokens_s": 1000.0})

    def note(rows: list[Any], context: grpc.ServicerContext) -> Any:
        told.append(context.time_remaining())
        return reply([[1.0]])(rows, context)

    with servers(TEXT) as (server,), TritonReward(server.url, config) as reward:
        for count in (4, 4000):
            server.script.append(note)
            reward.submit(rollouts("a" * (count - 1))).result(WAIT_S)
    # 1 token adds 1 s and 1,000 add 1,000 s to 30 s; what is left of it has passed on the way.
    assert 10 < told[0] < 31.5 and 1000 < told[1] < 1045


def test_deadline_grows_with_what_the_server_works_on_before() -> None:
    told: list[float] = []
    both = threading.Event()
    config = changed(SINGLES, client={"timeout_per_1k_tokens_s": 1000.0})

    def note(rows: list[Any], context: grpc.ServicerContext) -> Any:
        told.append(context.time_remaining())
        if len(told) == 2:
            both.set()
        assert both.wait(WAIT_S)
        return reply([[1.0]])(rows, context)

    with servers(TEXT) as (server,), TritonReward(server.url, config) as reward:
        server.script.extend([note, note])
        results = reward.submit(rollouts("a" * 3999, "b" * 3999)).result(WAIT_S)
        assert values(results) == [1.0, 1.0]
    assert 1000 < min(told) < 1045 and 2000 < max(told) < 2055


def test_too_large_a_row_is_invalid_and_large_rows_go_one_by_one() -> None:
    config = changed(CONFIG, client={"max_request_mb": 0.001})
    with servers(TEXT) as (server,), TritonReward(server.url, config) as reward:
        outputs = ["a" * 600, "a" * 601, "a" * 2000]
        results = reward.submit(rollouts(*outputs)).result(WAIT_S)
    assert [result.status.value for result in results] == ["ok", "ok", "invalid"]
    assert "row 2 (sample " in results[2].detail and "reward.client.max_request_mb=0.001" in results[2].detail
    assert [len(rows) for rows in server.requests] == [1, 1]


def test_headers_are_sent_with_every_request_and_shown_nowhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "conch")
    monkeypatch.setenv("MY_TOKEN", "Bearer hunter2")
    config = changed(CONFIG, auth={"headers_env": {"Authorization": "MY_TOKEN"}})
    with servers(TEXT) as (server,), TritonReward(server.url, config) as reward:
        reward.check()
        assert server.headers["authorization"] == "Bearer hunter2"
        server.script.append(BROKEN)
        result = reward.submit(rollouts("a")).result(WAIT_S)[0]
    assert "hunter2" not in repr(config) + result.detail + caplog.text


# At the start.


def test_server_that_is_away_at_the_start_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    with servers(TEXT) as (server,), TritonReward(url(port, server), SINGLES) as reward:
        reward.check()
        assert f"nothing listens at 127.0.0.1:{port}" in caplog.text
        assert values(reward.submit(rollouts("a")).result(WAIT_S)) == [2.0]
        with FakeTriton(TEXT, length, port=port) as late:
            until(lambda: bool(late.requests))  # it is probed, and so comes into use


def test_all_servers_away_is_an_error_that_names_them() -> None:
    ports = free_port(), free_port()
    with TritonReward(url(*ports), CONFIG) as reward:
        words = f"2 of 2 replicas cannot be used: .*127.0.0.1:{ports[0]}.*; .*127.0.0.1:{ports[1]}"
        with pytest.raises(RewardUnavailableError, match=words):
            reward.check()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (RewardModelSpec(name="walks", content_sha256=NEW), "serves content"),
        (RewardModelSpec(name="walks", content_sha256=OLD, reward_names=("a", "b")), "gives the rewards"),
        (RewardModelSpec(name="walks", content_sha256=OLD, form="token"), "takes"),
    ],
)
def test_servers_with_different_models_are_refused(other: RewardModelSpec, words: str) -> None:
    with servers(TEXT, other) as (a, b):
        b.score = lambda row: [1.0] * len(other.reward_names)
        with TritonReward(url(a, b), CONFIG) as reward:
            with pytest.raises(RewardInvalidError, match=words) as caught:
                reward.check()
            assert all(f"127.0.0.1:{fake.port}" in str(caught.value) for fake in (a, b))
        a.requests.clear()
        b.requests.clear()
        with TritonReward(url(a, b), CONFIG) as reward:  # without a check, only one of them is asked
            assert all(result.ok for result in reward.submit(rollouts("a", "bb", "ccc")).result(WAIT_S))
            until(lambda: reward.stats().requests >= 3)
    assert bool(a.requests) is not bool(b.requests)


# A model that changes.


def swap(server: FakeTriton, version: str = "2", content: str = NEW) -> None:
    server.version = version
    server.config.parameters["content_sha256"].string_value = content
    server.score = lambda row: [-1.0]


@pytest.mark.parametrize("policy", ["raise", "warn", "accept"])
def test_swapped_model_is_noticed(policy: OnModelChange, caplog: pytest.LogCaptureFixture) -> None:
    config = changed(CONFIG, failure={"on_model_change": policy})
    with servers(TEXT) as (server,), TritonReward(server.url, config) as reward:
        assert values(reward.submit(rollouts("a")).result(WAIT_S)) == [2.0]
        swap(server)
        results = [reward.submit(rollouts(output)).result(WAIT_S)[0] for output in ("b", "c", "a")]
        change = reward.stats().model_change
    if policy == "raise":
        assert {result.status for result in results[:2]} == {RewardStatus.INVALID}
        assert "now serves version 2, content 111111111111" in change and change in results[0].detail
        assert [rows for rows in server.requests] == [["pa"], ["pb"]]  # nothing more is asked
    else:
        # What was remembered of the old model is forgotten.
        assert values(results) == [-1.0] * 3 and {result.version for result in results} == {"2"}
        assert change == "" and caplog.text.count("the reward model has changed") == (policy == "warn")


def test_late_answer_of_the_old_model_is_not_remembered() -> None:
    release = threading.Event()
    config = changed(CONFIG, failure={"on_model_change": "accept"})
    with servers(TEXT) as (server,), TritonReward(server.url, config) as reward:
        reward.submit(rollouts("a")).result(WAIT_S)
        server.script.append(lambda rows, context: release.wait(WAIT_S) and reply([[5.0]])(rows, context))
        late = reward.submit(rollouts("late"))
        until(lambda: len(server.requests) == 2)
        swap(server)
        assert values(reward.submit(rollouts("b")).result(WAIT_S)) == [-1.0]
        release.set()
        assert [(result.version, *result.scores.values()) for result in late.result(WAIT_S)] == [("1", 5.0)]
        assert values(reward.submit(rollouts("late")).result(WAIT_S)) == [-1.0]


def test_republished_content_under_a_new_number_is_no_change() -> None:
    with servers(TEXT) as (server,), TritonReward(server.url, CONFIG) as reward:
        reward.submit(rollouts("a")).result(WAIT_S)
        server.version = "2"
        assert reward.submit(rollouts("b")).result(WAIT_S)[0].ok
        assert reward.stats().model_change == ""


def test_server_that_comes_back_with_another_model_is_noticed_under_the_old_number() -> None:
    with servers(TEXT) as (server,), TritonReward(server.url, CONFIG) as reward:
        reward.submit(rollouts("a")).result(WAIT_S)
        server.stop()
        future = reward.submit(rollouts("b"))
        until(lambda: reward.stats().retries > 0)
        other = RewardModelSpec(name="walks", max_batch_size=8, content_sha256=NEW)
        with FakeTriton(other, length, port=server.port):
            assert future.result(WAIT_S)[0].status is RewardStatus.INVALID
            assert "content 111111111111, another model" in reward.stats().model_change


# Statistics.


def add_requests(server: FakeTriton, count: int, *, queue_s: float, compute_s: float) -> None:
    stats = server.statistics.inference_stats
    stats.success.count += count
    stats.queue.ns += int(queue_s * 1e9)
    stats.compute_infer.ns += int(compute_s * 1e9)


def test_server_times_are_what_was_gained_since_the_last_question() -> None:
    with servers() as (a, b):
        add_requests(a, 1000, queue_s=50, compute_s=50)  # of others, before us
        with TritonReward(url(a, b), CONFIG) as reward:
            reward.check()
            add_requests(a, 3, queue_s=0.5, compute_s=1.0)
            add_requests(b, 1, queue_s=0.25, compute_s=2.0)
            gained = reward.server_statistics().result(WAIT_S)
            assert (gained.requests, gained.queue_s, gained.compute_s) == (4, 0.75, pytest.approx(3.0))
            assert reward.server_statistics().result(WAIT_S).requests == 0
            a.statistics.inference_stats.Clear()  # loaded anew
            add_requests(a, 2, queue_s=0.1, compute_s=0.2)
            assert reward.server_statistics().result(WAIT_S).requests == 2


def test_server_that_keeps_its_statistics_to_itself_adds_nothing() -> None:
    with servers(TEXT) as (server,):
        server.statistics = None
        with TritonReward(server.url, CONFIG) as reward:
            reward.check()
            assert reward.server_statistics().result(WAIT_S).requests == 0


# A client that breaks, by a mistake of ours, must not leave anybody waiting.


@pytest.mark.parametrize("part", ["infer", "describe"])
def test_mistake_in_a_transport_fails_the_samples_with_its_name(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*arguments: Any) -> Any:
        raise KeyError("oops")

    with servers(TEXT) as (server,), TritonReward(server.url, CONFIG) as reward:
        assert reward.submit(rollouts("a")).result(WAIT_S)[0].ok
        monkeypatch.setattr(TritonTransport, part, broken)
        server.version = "2"  # so that its configuration is read again
        (result,) = reward.submit(rollouts("b")).result(WAIT_S)
    assert result.status is RewardStatus.INVALID
    assert "the client broke: KeyError: 'oops'" in result.detail


def test_mistake_in_the_background_is_told_to_all_who_wait_and_all_who_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*arguments: Any, **named: Any) -> Any:
        raise KeyError("oops")

    with servers(TEXT) as (server,), TritonReward(server.url, CONFIG) as reward:
        monkeypatch.setattr(RequestQueue, "next_batch", broken)
        for _ in range(2):
            (result,) = reward.submit(rollouts("a")).result(WAIT_S)
            assert result.status is RewardStatus.INVALID and "the client broke: KeyError" in result.detail

"""TritonReward against a server that fails in ways the real one cannot be made to, over real sockets."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import model_config_pb2

from conch.config import RewardClientConfig, RewardConfig
from conch.errors import RewardError, RewardInvalidError, RewardUnavailableError
from conch.rewards.served import TritonReward
from conch.triton.contract import RewardModelSpec
from conch.types import RewardResult, RewardStatus, Rollout
from tests.fakes.rollouts import letter_ids, rollout, rollouts
from tests.fakes.triton_server import Action, FakeTriton, fail, hang, reply, response
from tests.reward_settings import changed

WAIT_S = 120
CONFIG = RewardConfig(client=RewardClientConfig(request_timeout_s=30, deadline_s=100))
HASTY = RewardConfig(client=RewardClientConfig(request_timeout_s=0.3, deadline_s=1))
TEXT = RewardModelSpec(name="walks", max_batch_size=4)
TOKEN = RewardModelSpec(name="walks", form="token", max_batch_size=4)


def length(row: Any) -> list[float]:
    return [float(len(row))]


def score(server: FakeTriton, batch: Sequence[Rollout], config: RewardConfig = CONFIG) -> list[RewardResult]:
    with TritonReward(server.url, config) as reward:
        return reward.submit(batch).result(WAIT_S)


def values(results: Sequence[RewardResult]) -> list[float]:
    return [result.scores["reward"] for result in results]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# What is sent, and how replies come back.


def test_text_form_scores_in_order_in_batches_within_the_servers_limit() -> None:
    outputs = ["a" * count for count in (5, 1, 9, 3, 7, 2, 8, 4, 6)]
    with FakeTriton(TEXT, length) as server:
        results = score(server, rollouts(*outputs))
    assert values(results) == [len("p" + output) for output in outputs]
    assert sorted(len(rows) for rows in server.requests) == [1, 4, 4]
    assert all(len({len(row) for row in rows}) == len(rows) for rows in server.requests)
    assert max(server.requests, key=lambda rows: len(rows[0])) == ["p" + "a" * 9]
    assert {(result.model, result.version) for result in results} == {("walks", "1")}
    assert all(0 < result.latency_s < WAIT_S for result in results)


def test_micro_batch_size_of_the_config_lowers_the_limit() -> None:
    with FakeTriton(TEXT, length) as server:
        score(server, rollouts("a", "aa", "aaa"), changed(CONFIG, client={"batch_rows": 2}))
    assert sorted(len(rows) for rows in server.requests) == [1, 2]


def test_unicode_and_empty_texts_arrive_as_they_are() -> None:
    batch = [rollout("", ""), *(rollout(text, "") for text in ("日本\x00語", "🐚" * 50))]
    with FakeTriton(TEXT, length) as server:
        assert values(score(server, batch)) == [0.0, 4.0, 50.0]


def test_equal_samples_are_scored_once() -> None:
    with FakeTriton(TEXT, length) as server:
        assert values(score(server, rollouts("a", "bb", "a", "a"))) == [2.0, 3.0, 2.0, 2.0]
    assert sorted(row for rows in server.requests for row in rows) == ["pa", "pbb"]


def test_several_columns_are_named_by_the_server() -> None:
    spec = RewardModelSpec(name="rm", reward_names=("help", "harm"))
    with FakeTriton(spec, lambda row: [1.0, -float(len(row))]) as server:
        assert score(server, rollouts("a"))[0].scores == {"help": 1.0, "harm": -2.0}


def test_submit_returns_at_once_and_no_more_than_max_in_flight_are_sent() -> None:
    go = threading.Event()
    config = changed(CONFIG, client={"batch_rows": 1, "max_in_flight": 2})

    def slow(row: str) -> list[float]:
        assert go.wait(WAIT_S)
        return [1.0]

    with FakeTriton(TEXT, slow) as server, TritonReward(server.url, config) as reward:
        future = reward.submit(rollouts("a", "b", "c", "d", "e"))
        deadline = time.monotonic() + WAIT_S
        while server.most_in_flight < 2:
            assert time.monotonic() < deadline, "two were not sent"
            time.sleep(0.01)
        assert not future.done()
        assert reward.stats().requests == 3  # for the model's configuration, and two for scores
        go.set()
        assert len(future.result(WAIT_S)) == 5
    assert server.most_in_flight == 2


@pytest.mark.parametrize("dtype", ["INT32", "INT64"])
def test_token_form_sends_the_sampled_ids_padded_and_masked(dtype: str) -> None:
    spec = RewardModelSpec(name="walks", form="token", max_batch_size=2, input_dtype=dtype)
    # The text says something else than the ids: it must not be tokenised again.
    odd = rollout("p", "ab")
    batch = [rollout("p", "abcd"), odd, rollout("p", "abc"), rollout("p", "a")]
    with FakeTriton(spec, lambda ids: [100.0 * len(ids) + sum(ids)]) as server:
        assert values(score(server, batch)) == [526.0, 319.0, 422.0, 217.0]
    assert sorted(server.widths) == [3, 5]
    assert (16, 1, 2) in [row for rows in server.requests for row in rows]


def test_model_without_a_mask_never_sees_padding() -> None:
    spec = RewardModelSpec(name="walks", form="token", takes_attention_mask=False, input_dtype="INT32")
    with FakeTriton(spec, length) as server:
        assert values(score(server, rollouts("aaa", "b", "ccc", "d"))) == [4.0, 2.0, 4.0, 2.0]
    expected = [[letter_ids("pb"), letter_ids("pd")], [letter_ids("paaa"), letter_ids("pccc")]]
    assert sorted(server.requests) == sorted(expected)


def test_given_tokenizer_replaces_the_sampled_ids() -> None:
    def tokenizer(sample: str) -> list[int]:
        if "z" in sample:
            raise KeyError("z")
        return [7] * len(sample)

    server = FakeTriton(TOKEN, lambda ids: [float(sum(ids))])
    with server, TritonReward(server.url, CONFIG, tokenizer) as reward:
        results = reward.submit(rollouts("a", "z")).result(WAIT_S)
    assert results[0].scores == {"reward": 14.0}
    assert results[1].status is RewardStatus.INVALID and "KeyError" in results[1].detail


def test_too_long_sample_is_invalid_and_the_others_are_scored() -> None:
    spec = RewardModelSpec(name="walks", form="token", max_length=3)
    with FakeTriton(spec, length) as server:
        results = score(server, rollouts("aa", "aaa"))
    assert [result.status.value for result in results] == ["ok", "invalid"]
    assert "row 1 (sample " in results[1].detail
    assert "has 4 tokens, the model takes 3 at most" in results[1].detail


def test_text_that_is_no_unicode_is_invalid_and_the_others_are_scored() -> None:
    with FakeTriton(TEXT, length) as server:
        results = score(server, [rollout("p\ud800", ""), rollout("p", "a")])
    assert [result.status.value for result in results] == ["invalid", "ok"]
    assert "cannot be encoded" in results[0].detail


# Replies that are not what was asked for.


def test_nan_invalidates_its_row_only() -> None:
    with FakeTriton(TEXT, lambda row: [float("nan") if row == "pbb" else 1.0]) as server:
        results = score(server, rollouts("cccc", "a", "bb"))
    assert [result.status.value for result in results] == ["ok", "ok", "invalid"]
    # The row as the caller counts, though the request was sorted by length.
    assert "nan instead of a score for row 2 (sample " in results[2].detail
    assert "pbb" not in results[2].detail


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (reply([[1.0]] * 4), "shape is [4, 1], expected [1, 1]"),
        (reply([[1.0]] * 3), "shape is [3, 1], expected [1, 1]"),
        (reply([[1.0, 2.0]] * 2), "shape is [2, 2], expected [1, 1]"),
        (reply([1.0, 2.0]), "shape is [2], expected [1, 1]"),
        (reply([[1.0]] * 2, dtype="FP64"), "dtype is FP64, expected FP32"),
        (reply([[1]] * 2, dtype="INT64"), "dtype is INT64, expected FP32"),
        (reply([[1.0]] * 2, output="logits"), "no output `rewards`"),
    ],
)
def test_wrong_reply_is_bad_data_and_its_rows_get_another_chance(action: Action, words: str) -> None:
    with FakeTriton(TEXT, length) as server:
        server.script.extend([action, action])
        results = score(server, rollouts("a", "bb"))
    assert [result.status for result in results] == [RewardStatus.INVALID, RewardStatus.OK]
    assert words in results[0].detail
    assert server.requests == [["pa", "pbb"], ["pa"], ["pbb"]]


def test_reply_with_too_few_bytes_is_bad_data() -> None:
    def act(rows: list[Any], context: grpc.ServicerContext) -> Any:
        message = response(np.zeros((1, 1), dtype=np.float32))
        message.raw_output_contents[0] = b"123"
        return message

    with FakeTriton(TEXT, length) as server:
        server.script.append(act)
        assert "bytes do not fit" in score(server, rollouts("a"))[0].detail


# Errors: which are asked again, and what becomes of the samples.


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (grpc.StatusCode.UNAVAILABLE, "Server exiting"),
        (grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "too slow"),
        (grpc.StatusCode.INTERNAL, "Stub process 'walks_0' is not healthy."),
    ],
)
def test_passing_failure_is_asked_again(code: grpc.StatusCode, message: str) -> None:
    with FakeTriton(TEXT, length) as server, TritonReward(server.url, CONFIG) as reward:
        server.script.extend([fail(code, message)] * 3)
        assert values(reward.submit(rollouts("a")).result(WAIT_S)) == [2.0]
        # A dead model process concerns every request: what is repeated is a probe, until one is scored.
        assert reward.stats().retries == (4 if "Stub" in message else 3)
        assert len(server.requests) == 1 + reward.stats().retries


@pytest.mark.parametrize(
    ("code", "message", "status"),
    [
        (
            grpc.StatusCode.UNAVAILABLE,
            "This protocol is restricted, expecting header x",
            RewardStatus.UNAVAILABLE,
        ),
        (grpc.StatusCode.UNAVAILABLE, "SSL: CERTIFICATE_VERIFY_FAILED", RewardStatus.UNAVAILABLE),
        (grpc.StatusCode.UNAVAILABLE, "errors resolving gpu:8001", RewardStatus.UNAVAILABLE),
        (grpc.StatusCode.NOT_FOUND, "Request for unknown model", RewardStatus.UNAVAILABLE),
        (grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape", RewardStatus.INVALID),
    ],
)
def test_lasting_failure_is_not_asked_again(
    code: grpc.StatusCode, message: str, status: RewardStatus
) -> None:
    with FakeTriton(TEXT, length) as server:
        server.script.append(fail(code, message))
        results = score(server, rollouts("a"))
    assert [result.status for result in results] == [status]
    assert message in results[0].detail and "`walks` at 127.0.0.1" in results[0].detail
    assert len(server.requests) == 1


def test_failing_batch_is_halved_down_to_the_bad_row() -> None:
    spec = RewardModelSpec(name="walks", max_batch_size=8)
    with FakeTriton(spec, length) as server:
        server.poison = "p" + "a" * 5
        results = score(server, rollouts(*("a" * count for count in range(8))))
    assert [result.status.value for result in results] == ["ok"] * 5 + ["invalid"] + ["ok"] * 2
    assert "refused row 5 (sample " in results[5].detail
    assert "ValueError: bad" in results[5].detail and "\n" not in results[5].detail
    assert "aaaaa" not in results[5].detail
    assert [len(rows) for rows in server.requests] == [8, 4, 4, 2, 1, 1, 2]


def test_hanging_server_times_out_and_later_requests_go_on() -> None:
    release = threading.Event()
    with FakeTriton(TEXT, length) as server, TritonReward(server.url, HASTY) as reward:
        server.script.extend([hang(release)] * 8)
        results = reward.submit(rollouts("a")).result(WAIT_S)
        assert results[0].status is RewardStatus.TIMEOUT
        assert "no reply in time" in results[0].detail
        release.set()
        server.script.clear()
        assert values(in_the_end(reward)) == [2.0]


def in_the_end(reward: TritonReward) -> list[RewardResult]:
    """Asked with haste again and again, which a busy machine may need."""
    deadline = time.monotonic() + WAIT_S
    while not (results := reward.submit(rollouts("a")).result(WAIT_S))[0].ok:
        assert time.monotonic() < deadline, results[0].detail
    return results


def test_nothing_listening_is_unavailable_for_all_within_one_deadline() -> None:
    config = RewardConfig(
        client=RewardClientConfig(request_timeout_s=2, deadline_s=3, batch_rows=1, max_in_flight=1)
    )
    with FakeTriton(TEXT, length) as server, TritonReward(server.url, config) as reward:
        reward.check()
        server.stop()
        started = time.monotonic()
        results = reward.submit(rollouts(*("a" * count for count in range(60)))).result(WAIT_S)
    assert [result.status for result in results] == [RewardStatus.UNAVAILABLE] * 60
    assert "1 attempt in" in results[0].detail and "not back after" in results[-1].detail
    assert time.monotonic() - started < 60  # one after the other they would take three minutes


def test_server_that_comes_back_on_its_port_is_used_again() -> None:
    port = free_port()
    config = changed(HASTY, client={"cache_size": 0})  # the same sample is to be asked for again
    with TritonReward(f"127.0.0.1:{port}/walks", config) as reward:
        assert reward.submit(rollouts("a")).result(WAIT_S)[0].status is RewardStatus.UNAVAILABLE
        for _ in range(2):
            with FakeTriton(TEXT, length, port=port):
                assert in_the_end(reward)[0].ok
            assert reward.submit(rollouts("a")).result(WAIT_S)[0].status is RewardStatus.UNAVAILABLE


# Preflight.


def check(url: str, config: RewardConfig = CONFIG) -> None:
    with TritonReward(url, config) as reward:
        reward.check()


def test_check_passes_and_scores_a_probe() -> None:
    for spec in (TEXT, TOKEN):
        with FakeTriton(spec, length) as server:
            check(server.url)
            assert len(server.requests) == 1


def test_check_names_a_host_that_cannot_be_resolved() -> None:
    with pytest.raises(RewardUnavailableError, match=r"cannot resolve the host name `no-such-host\.invalid`"):
        check("no-such-host.invalid:8001/walks")


def test_check_says_that_nothing_listens() -> None:
    port = free_port()
    with pytest.raises(RewardUnavailableError, match=f"nothing listens at 127.0.0.1:{port}"):
        check(f"127.0.0.1:{port}/walks")


def test_check_does_not_hang_on_a_silent_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(RewardUnavailableError, match=f"127.0.0.1:{port}"):
            check(f"127.0.0.1:{port}/walks", HASTY)


def test_check_recognises_a_port_that_speaks_something_else() -> None:
    def answer_in_http(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer_in_http, args=(listener,), daemon=True)
        thread.start()
        with pytest.raises(RewardUnavailableError, match="does not speak Triton's gRPC"):
            check(f"127.0.0.1:{listener.getsockname()[1]}/walks", HASTY)
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(WAIT_S)


def test_check_lists_the_models_that_are_there() -> None:
    words = r"model `runs` is not in the server at .*; there is: walks"
    with FakeTriton(TEXT, length) as server, pytest.raises(RewardUnavailableError, match=words):
        check(f"127.0.0.1:{server.port}/runs")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (
            {"walks": ("UNAVAILABLE", "load failed: no weights")},
            "is not ready at .*: UNAVAILABLE, load failed",
        ),
        ({"walks": ("", "")}, "is in the store .* but not loaded"),
        ({}, "there is: no model at all"),
        (None, "is not ready at .*, or not there; no other model is loaded"),
    ],
)
def test_check_says_why_a_model_is_not_ready(index: dict[str, tuple[str, str]] | None, words: str) -> None:
    with FakeTriton(TEXT, length) as server:
        server.ready, server.index = False, index
        with pytest.raises(RewardUnavailableError, match=words):
            check(server.url)


def test_check_lists_what_is_loaded_where_the_store_is_kept_to_the_server() -> None:
    with FakeTriton(TEXT, length) as server:
        server.index = None
        words = (
            rf"model `wakls` is not loaded at .*; there is: walks; did you mean 127.0.0.1:{server.port}/walks"
        )
        with pytest.raises(RewardUnavailableError, match=words):
            check(f"127.0.0.1:{server.port}/wakls")
        server.statistics = None
        words = "does not list its models: ask who runs it, or on its machine `conch serve status`"
        with pytest.raises(RewardUnavailableError, match=words):
            check(f"127.0.0.1:{server.port}/wakls")


def test_model_of_neither_form_is_invalid_in_check_and_in_submit() -> None:
    with FakeTriton(TEXT, length) as server:
        server.config = model_config_pb2.ModelConfig(name="walks", max_batch_size=4)
        server.config.input.add(name="image", data_type=model_config_pb2.TYPE_FP32, dims=[3])
        with pytest.raises(RewardInvalidError, match="image FP32"):
            check(server.url)
        result = score(server, rollouts("a"))[0]
    assert result.status is RewardStatus.INVALID and "image FP32" in result.detail


@pytest.mark.parametrize(
    ("action", "kind", "words"),
    [
        (reply([[float("nan")]]), RewardInvalidError, "probe sample was not scored: .* nan"),
        (fail(grpc.StatusCode.INTERNAL, "ValueError: bad"), RewardInvalidError, "ValueError: bad"),
        (fail(grpc.StatusCode.UNAVAILABLE, "protocol is restricted"), RewardUnavailableError, "restricted"),
    ],
)
def test_check_fails_when_the_probe_does(action: Action, kind: type[RewardError], words: str) -> None:
    with FakeTriton(TEXT, length) as server:
        server.script.append(action)
        with pytest.raises(kind, match=words):
            check(server.url)


# Life cycle.


LEAVES_NOTHING = """
import contextlib, gc, os, socket, sys, threading, time
from conch.config import RewardConfig
from conch.rewards.served import TritonReward
from tests.fakes.rollouts import rollouts

def sockets():
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed by another thread since it was listed
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                found.append(int(name))
    return found

def connections():
    families = []
    for descriptor in sockets():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as copy:
            families.append(copy.family)
    return [family for family in families if family != socket.AF_UNIX]

def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.02)
    assert condition()

for _ in range(3):
    reward = TritonReward(sys.argv[1], RewardConfig())
    future = reward.submit(rollouts("a"))
    # Asked for the model's configuration, then for scores, which never come.
    wait_until(lambda: reward.stats().requests == 2)
    assert connections()
    reward.close()
    reward.close()
    assert future.cancelled()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reward-")]
    del future  # what was cancelled keeps its connection for as long as somebody keeps its traceback
    wait_until(lambda: not connections())
del reward  # gRPC keeps a thread and a pair of sockets until its last object is gone
wait_until(lambda: not sockets() and threading.active_count() == 1)
"""


def test_close_leaves_no_thread_no_socket_and_no_waiting_caller() -> None:
    release = threading.Event()
    with FakeTriton(TEXT, length) as server:
        server.script.extend([hang(release)] * 3)
        # In a process of its own: the sockets of the fake server live in this one.
        command = [sys.executable, "-c", LEAVES_NOTHING, server.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
        release.set()
    assert (done.returncode, done.stderr) == (0, "")


def test_program_that_forgets_to_close_ends_cleanly() -> None:
    code = """
import sys
from conch.config import RewardConfig
from conch.rewards.served import TritonReward
from tests.fakes.rollouts import rollouts
reward = TritonReward(sys.argv[1], RewardConfig())
print(reward.submit(rollouts("a")).result(60)[0].scores)
reward.submit(rollouts("b"))
"""
    with FakeTriton(TEXT, length) as server:
        command = [sys.executable, "-c", code, server.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "{'reward': 2.0}", "")

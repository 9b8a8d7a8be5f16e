"""Rewards over HTTP: dialects, replicas, secrets, TLS, and what each failure becomes. Real sockets."""

from __future__ import annotations

import json
import logging
import re
import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import pytest
import trustme

from conch.addresses import parse_urls
from conch.config import RewardAuthConfig, RewardConfig, load
from conch.errors import ConfigError, RewardError, RewardInvalidError, RewardUnavailableError
from conch.rewards.factory import from_user
from conch.rewards.served import HttpReward
from conch.types import RewardResult
from tests.fakes.json_rewards import Reply, endpoint, goals, lengths
from tests.fakes.rollouts import rollouts

WAIT_S = 60
QUICK = {"client": {"deadline_s": 20.0, "request_timeout_s": 10.0}}


def score(url: str, *outputs: str, **settings: Any) -> list[RewardResult]:
    """Results of outputs to the prompt `p`."""
    with HttpReward(url, load(RewardConfig, {**QUICK, **settings})) as source:
        return source.submit(rollouts(*outputs)).result(WAIT_S)


def test_query_dialect_sends_samples_and_reads_rewards() -> None:
    with endpoint() as served, from_user(served.url, RewardConfig()) as source:
        assert isinstance(source, HttpReward)
        source.check()
        served.asked.clear()
        (result, *_) = found = source.submit(rollouts("a", "bbb")).result(WAIT_S)

    assert [each.scores for each in found] == [{"reward": 2.0}, {"reward": 4.0}]
    assert served.asked == [{"query": ["pa", "pbbb"]}] and set(served.paths) == {"/score"}
    assert result.model == served.url and result.latency_s > 0


def test_goals_dialect_sends_a_list_and_reads_objectives() -> None:
    with endpoint(goals) as served:
        found = score(served.url, "a", "bbb", dialect="goals", goal_server={"form": "list", "send": "sample"})

    assert [each.scores for each in found] == [{"long": 2.0, "one": 1.0}, {"long": 4.0, "one": 1.0}]
    assert served.asked[-1] == ["pa", "pbbb"]


def test_requests_hold_no_more_than_batch_rows() -> None:
    with endpoint() as served:
        found = score(
            served.url, *("a" * n for n in range(1, 8)), client={"batch_rows": 3, "max_in_flight": 1}
        )

    assert [each.scores["reward"] for each in found] == [float(n + 1) for n in range(1, 8)]
    assert max(len(body["query"]) for body in served.asked) == 3


def test_a_replica_that_is_gone_is_replaced_by_the_other(caplog: pytest.LogCaptureFixture) -> None:
    with endpoint() as served:
        address = served.url.removesuffix("/score")
        url = f"http://127.0.0.1:{free_port()},{address}/score"
        with HttpReward(url, load(RewardConfig, QUICK)) as source:
            source.check()
            found = source.submit(rollouts("a", "bb")).result(WAIT_S)
    assert [each.scores["reward"] for each in found] == [2.0, 3.0]
    assert "one of 2 replicas cannot be used yet" in caplog.text


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Fails:
    """Fails so often, then scores."""

    def __init__(self, status: int, times: int) -> None:
        self.status, self.left = status, times
        self.lock = threading.Lock()

    def __call__(self, samples: list[str]) -> Reply:
        with self.lock:
            self.left -= 1
            return (self.status, b"secret text") if self.left >= 0 else lengths(samples)


@pytest.mark.parametrize("status", [429, 502, 503, 504, 0])
def test_passing_failures_are_tried_again(status: int) -> None:
    with endpoint(Fails(status, 2)) as served:
        (found,) = score(served.url, "aa", client={"deadline_s": 50.0})
    assert found.scores == {"reward": 3.0}
    assert len(served.asked) >= 3


@pytest.mark.parametrize(
    ("status", "kind", "says"),
    [
        (401, "unavailable", "HTTP 401 Unauthorized: it wants a token.*reward.auth.headers_env"),
        (403, "unavailable", "HTTP 403 Forbidden: it wants a token"),
        (404, "unavailable", "HTTP 404 Not Found: check the path"),
        (302, "unavailable", "HTTP 302 Found to /elsewhere, which is not followed: check the path"),
        (422, "invalid", "HTTP 422"),
        (500, "invalid", "HTTP 500 Internal Server Error"),
    ],
)
def test_lasting_failures_are_not_tried_again_and_show_no_text(status: int, kind: str, says: str) -> None:
    with (
        endpoint(Fails(status, 10**9)) as served,
        HttpReward(served.url, load(RewardConfig, QUICK)) as source,
    ):
        with pytest.raises(RewardError, match=says) as refused:
            source.check()
        assert isinstance(refused.value, RewardInvalidError if kind == "invalid" else RewardUnavailableError)
        assert "secret text" not in str(refused.value)
        assert len(served.asked) < 4


def replies(content: Any) -> Any:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda samples: (200, body) if samples != ["a"] else lengths(samples)  # `a` is the probe


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"<html>", "not JSON"),
        (b'{"rewards": [NaN]}', "holds NaN"),
        (b'{"rewards": [1e999]}', "inf"),
        ({"rewards": [None]}, "NoneType|None"),
        ({"rewards": ["1.0"]}, "str"),
        ({"rewards": [1.0, 2.0]}, "2 scores"),
        ({"rewards": 1.0}, "expected a list"),
        ({"scores": [1.0]}, 'no "rewards"'),
        ([1.0], "a JSON list"),
        ({"rewards": [[1.0]]}, "list"),
    ],
)
def test_a_reply_that_is_no_score_is_bad_data(content: Any, says: str) -> None:
    with endpoint(replies(content)) as served:
        (found,) = score(served.url, "bb")
    assert found.status.value == "invalid"
    assert re.search(says, found.detail), found.detail
    assert "pbb" not in found.detail


def test_one_bad_row_does_not_take_the_others_along() -> None:
    def picky(samples: list[str]) -> Reply:
        return (500, b"") if any("x" in sample for sample in samples) else lengths(samples)

    with endpoint(picky) as served:
        found = score(served.url, "a", "x", "bb", "ccc")
    assert [each.ok for each in found] == [True, False, True, True]


def test_an_endless_reply_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conch.rewards.client.http._REPLY_LIMIT", 1000)
    with endpoint(replies(b'{"rewards": [' + b" " * 2000 + b"1.0]}")) as served:
        (found,) = score(served.url, "bb")
    assert "larger than 1000 bytes" in found.detail


def test_a_frozen_endpoint_ends_by_its_deadline() -> None:
    thaw = threading.Event()

    def frozen(samples: list[str]) -> Reply:
        thaw.wait(WAIT_S)
        return lengths(samples)

    with endpoint(frozen) as served:
        (found,) = score(served.url, "a", client={"request_timeout_s": 0.2, "deadline_s": 0.5})
        thaw.set()
    assert found.status.value == "timeout"


def test_secret_headers_are_sent_and_never_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_TOKEN", "Bearer s3cret")
    with endpoint() as served, caplog.at_level(logging.DEBUG):
        score(served.url, "a", auth={"headers_env": {"Authorization": "MY_TOKEN"}})
    assert served.headers[-1]["authorization"] == "Bearer s3cret"
    assert "s3cret" not in caplog.text


def test_tls_is_verified(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with endpoint(tls=context) as served:
        (trusted,) = score(served.url, "a", auth={"tls": {"ca": tmp_path / "ca.pem"}})
        (stranger,) = score(served.url, "a")
    assert trusted.scores == {"reward": 2.0}
    assert stranger.status.value == "unavailable" and "check `reward.auth.tls`" in stranger.detail


def test_nobody_there_is_said_at_the_start() -> None:
    url = f"http://127.0.0.1:{free_port()}/score"
    with (
        HttpReward(url, load(RewardConfig, QUICK)) as source,
        pytest.raises(RewardUnavailableError, match=r"cannot be reached .*correct `reward.url`"),
    ):
        source.check()


@pytest.mark.parametrize(
    ("text", "urls"),
    [
        ("http://h:1/score", ("http://h:1/score",)),
        ("https://h", ("https://h/",)),
        ("http://a:1,http://b:2/score", ("http://a:1/score", "http://b:2/score")),
        ("http://a:1/x, http://b:2/y", ("http://a:1/x", "http://b:2/y")),
        ("http://[::1]:1/score", ("http://[::1]:1/score",)),
    ],
)
def test_addresses(text: str, urls: tuple[str, ...]) -> None:
    assert parse_urls(text) == urls


@pytest.mark.parametrize("text", ["http://", "http://h:x/", "http://a:1,b:2/m", "http://a:1/x,http://a:1/x"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="http"):
        parse_urls(text)


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="header") as refused:
        parse_urls("http://me:s3cret@h:1/score")
    assert "s3cret" not in str(refused.value)


def test_a_tritons_secret_is_not_for_endpoints() -> None:
    with pytest.raises(ConfigError, match="headers_env"):
        HttpReward("http://h:1/score", RewardConfig(auth=RewardAuthConfig(secret_env="X")))

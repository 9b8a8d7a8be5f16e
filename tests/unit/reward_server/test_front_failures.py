"""What a reward server answers where there is no reward, and whom it lets in. Real sockets."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest

from conch.config import load
from conch.errors import RewardInvalidError, RewardUnavailableError
from conch.reward_server.server import add_goals
from conch.reward_server.server_config import RewardServerConfig
from conch.rewards.goals import GoalSpace
from conch.rewards.goals.base import MeasuredGoal
from conch.rewards.goals.source import GoalsReward
from conch.types import RewardResult, RewardStatus
from tests.certificates import make_certificates
from tests.footprint import wait_until
from tests.reward_servers import Lengths, Served, served

SECRET = "correct-horse-battery"

BODIES: dict[str, Any] = {
    "/get_reward": lambda text: {"query": [text], "prompts": [""], "labels": [""]},
    "/slime": lambda text: {"prompt": "", "response": text, "label": None},
    "/classify": lambda text: {"model": "m", "input": text, "use_activation": False},
    "/v1/embeddings": lambda text: {"model": "m", "input": text},
    "/pooling": lambda text: {"model": "m", "input": text},
    "/score": lambda text: {"text_1": "", "text_2": text},
    "/rerank": lambda text: {"query": "", "documents": [text]},
    "/": lambda text: {"texts": [text]},
    "/v2/models/lengths/infer": lambda text: {
        "inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}]
    },
}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(Lengths(), max_request_mb=0.1) as running:
        yield running


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("sign", "status", "retry"), [("invalid", 422, None), ("down", 503, "1"), ("late", 504, "1")]
)
def test_no_form_gets_a_number_for_a_failure(
    server: Served, path: str, sign: str, status: int, retry: str | None
) -> None:
    reply = server.ask("POST", path, json=BODIES[path](f"[{sign}]"))
    assert reply.status_code == status and reply.headers.get("retry-after") == retry
    answer = reply.json()
    assert len(answer["statuses"]) == 1 and answer["statuses"] != ["ok"]
    assert not {"rewards", "reward", "scores", "data", "results", "outputs"} & answer.keys()
    told = answer["error"] if "error" in answer else answer["detail"]
    assert "the sample got no reward" in (told["message"] if isinstance(told, dict) else told)


def test_one_failure_fails_the_request_and_bad_data_goes_before_what_may_pass(server: Served) -> None:
    status, answer = server.post("/", {"texts": ["a", "[down]", "[invalid]"]})
    assert status == 422 and answer["statuses"] == ["ok", "unavailable", "invalid"]
    assert answer["detail"] == "2 of 3 samples got no reward (invalid): a sample is invalid"
    assert server.post("/", {"texts": ["a", "[down]", "[late]"]})[0] == 503


def test_numbers_that_json_has_not_cannot_be_told() -> None:
    infinite = Lengths(lambda text: RewardResult(RewardStatus.OK, {"a": 1e308, "b": 1e308}))
    with served(infinite) as server:
        status, answer = server.post("/", {"texts": ["a"]})
        assert status == 422 and "add up to inf" in answer["detail"]


def test_scores_of_tokens_are_no_reward_of_a_sample() -> None:
    with served(Lengths(lambda text: RewardResult(RewardStatus.OK, token_scores=()))) as server:
        status, answer = server.post("/get_reward", BODIES["/get_reward"]("a"))
        assert status == 422 and "gives a score for each token" in answer["detail"]


def test_wrong_weights_are_told() -> None:
    with served(Lengths(), source={"weights": {"helpful": 2.0}}) as server:
        status, answer = server.post("/", {"texts": ["a"]})
        assert status == 500 and "names `helpful`" in answer["detail"]


@pytest.mark.parametrize(("path", "status"), [("/get_reward", 429), ("/slime", 429), ("/classify", 503)])
def test_too_much_waiting_is_a_status_that_the_client_asks_again_after(path: str, status: int) -> None:
    source = Lengths()
    with served(source, max_waiting=1) as server:
        waiting = threading.Thread(target=server.post, args=("/", {"texts": ["[hold]"]}))
        waiting.start()
        wait_until(lambda: bool(source.asked), lambda: "nothing was asked")
        reply = server.ask("POST", path, json=BODIES[path]("a"))
        source.release()
        waiting.join()
        assert reply.status_code == status and reply.headers["retry-after"] == "1"
        assert "`max_waiting` = 1" in reply.text


def test_late_scores_are_504() -> None:
    source = Lengths()
    with served(source, deadline_s=0.1) as server:
        status, answer = server.post("/", {"texts": ["[hold]"]})
        assert status == 504 and answer["statuses"] == ["timeout"]
        source.release()


def test_request_beyond_the_limit_is_413(server: Served) -> None:
    reply = server.ask("POST", "/", json={"texts": ["x" * 200_000]})
    assert reply.status_code == 413 and "`max_request_mb` = 0.1" in reply.json()["detail"]
    assert server.post("/", {"texts": ["a"]})[0] == 200


def test_reward_that_cannot_be_reached_yet_is_503_until_it_is() -> None:
    source = Lengths()
    source.problem = RewardUnavailableError("reward model `x` cannot be reached: start it")
    with served(source, is_ready=False) as server:
        wait_until(
            lambda: "cannot be reached" in server.ask("GET", "/ready").text, lambda: "it was not asked"
        )
        reply = server.ask("POST", "/get_reward", json=BODIES["/get_reward"]("a"))
        assert reply.status_code == 503 and reply.headers["retry-after"] == "1"
        assert "is not ready: reward model `x` cannot be reached" in reply.json()["detail"]
        assert server.ask("GET", "/ready").status_code == 503
        assert server.ask("GET", "/v2/health/ready").status_code == 503
        assert server.ask("GET", "/v2/models/lengths/ready").status_code == 503
        assert server.ask("GET", "/health").json() == {"ready": False}
        assert 'conch_reward_ready{reward="lengths"} 0.0' in server.ask("GET", "/metrics").text
        source.problem = None
        server.wait_until_ready()
        assert server.post("/get_reward", BODIES["/get_reward"]("a"))[0] == 200


def test_readiness_falls_and_rises_with_the_source() -> None:
    source = Lengths()
    with served(source) as server:
        source.ready = False
        wait_until(lambda: server.ask("GET", "/ready").status_code == 503, lambda: "still ready")
        # What waits for a server that is away is the source's to decide.
        assert server.post("/", {"texts": ["a"]})[0] == 200
        source.ready = True
        server.wait_until_ready()


def test_reward_that_is_none_ends_the_server() -> None:
    source = Lengths()
    source.problem = RewardInvalidError("`x` gives no rewards")
    server = Served({"lengths": source}, {})
    server.thread.join(60)
    assert [str(error) for error in server.errors] == ["`x` gives no rewards"] and source.closed


def test_what_is_under_way_is_answered_before_the_server_stops() -> None:
    source, answers = Lengths(), list[tuple[int, Any]]()
    with served(source) as server:
        asking = threading.Thread(target=lambda: answers.append(server.post("/", {"texts": ["[hold]"]})))
        asking.start()
        wait_until(lambda: bool(source.asked), lambda: "nothing was asked")
        server.listener.should_exit = True
        time.sleep(0.3)
        assert server.thread.is_alive() and not source.closed
        source.release()
        asking.join()
        server.thread.join(60)
    assert answers[0][0] == 200 and source.closed


@pytest.fixture(scope="module")
def guarded() -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FRONT_SECRET", SECRET)
        with served(Lengths(), is_ready=False, secret_env="FRONT_SECRET") as running:
            yield running


def basic(password: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"conch:{password}".encode()).decode()}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer x"},
        basic("x"),
        basic(""),
        {"authorization": "Basic %%"},
        {"api-key": SECRET},
    ],
)
def test_strangers_are_told_nothing_about_models(guarded: Served, headers: dict[str, str]) -> None:
    for method, path in (
        *(("POST", path) for path in BODIES),
        *(
            ("GET", path)
            for path in ("/health", "/ready", "/metrics", "/v1/models", "/v2/models/lengths", "/x")
        ),
    ):
        reply = guarded.ask(method, path, headers=headers)
        assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer"
        assert "lengths" not in reply.text and "secret" in reply.json()["detail"]


def test_secret_may_come_as_a_token_or_as_a_password(guarded: Served) -> None:
    for headers in ({"authorization": f"Bearer {SECRET}"}, basic(SECRET)):
        status, answer = guarded.post("/", {"texts": ["a"]}, **headers)
        assert (status, answer.get("rewards")) == (200, [1.0])
    url = guarded.url.replace("://", f"://any:{SECRET}@")
    with httpx2.Client(trust_env=False) as client:
        assert client.post(f"{url}/slime", json=BODIES["/slime"]("ab")).json() == 2.0


def test_server_speaks_tls_and_asks_for_certificates(tmp_path: Path) -> None:
    made = make_certificates(tmp_path, "127.0.0.1")
    settings = {
        "tls_cert": made.server,
        "tls_key": made.server_key,
        "tls_ca": made.ca,
        "require_client_cert": True,
    }
    with served(Lengths(), is_ready=False, **settings) as server:
        context = ssl.create_default_context(cafile=str(made.ca))
        with pytest.raises(httpx2.TransportError), httpx2.Client(verify=context, trust_env=False) as client:
            client.post(f"{server.url}/slime", json=BODIES["/slime"]("ab"))
        context.load_cert_chain(made.client, made.client_key)
        with httpx2.Client(verify=context, trust_env=False) as client:
            wait_until(lambda: client.get(f"{server.url}/ready").is_success, lambda: "not ready")
            assert client.post(f"{server.url}/slime", json=BODIES["/slime"]("ab")).json() == 2.0


def raw(server: Served) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    return connection


def test_headers_that_do_not_end_are_hung_up_on(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conch.servers.listening._HEADERS_S", 600.0)
    with raw(server) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nx: ")
        with pytest.raises(ConnectionError):
            for _ in range(300):
                connection.sendall(b"y" * 10_000)
                time.sleep(0.01)
    assert server.post("/", {"texts": ["a"]})[0] == 200


def read_until(connection: socket.socket, what: bytes, times: int = 1) -> bytes:
    """What a connection brings, up to and with this."""
    got = b""
    while got.count(what) < times:
        part = connection.recv(10_000)
        assert part, got
        got += part
    return got


def test_headers_that_do_not_come_in_time_are_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conch.servers.listening._HEADERS_S", 1.0)
    content = json.dumps({"texts": ["abc"]}).encode()
    request = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(content) + content
    with served(Lengths()) as server, raw(server) as idle, raw(server) as good:
        for _ in range(4):  # requests that stay on one connection, each with a pause before it
            good.sendall(request)
            read_until(good, b"[3.0]")
            time.sleep(0.4)
        with raw(server) as slow:
            slow.sendall(b"POST / HTTP/1.1\r\nx: ")
            for connection in (idle, slow):
                with contextlib.suppress(ConnectionError):
                    assert connection.recv(1) == b""


def test_pipelined_requests_are_answered_in_order(server: Served) -> None:
    with raw(server) as connection:
        whole = b""
        for text in ("a", "bb"):
            content = json.dumps({"texts": [text]}).encode()
            whole += b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(content) + content
        connection.sendall(whole)
        got = read_until(connection, b"]}", 2)
        assert got.index(b"[1.0]") < got.index(b"[2.0]")


def test_metrics_count_requests_samples_and_failures() -> None:
    source = Lengths()
    with served(source) as server:
        server.post("/get_reward", {"query": ["a", "b"], "prompts": None, "labels": None})
        server.post("/slime", BODIES["/slime"]("[down]"))
        server.post("/classify", {"nothing": 1})
        waiting = threading.Thread(target=server.post, args=("/", {"texts": ["[hold]"] * 3}))
        waiting.start()
        wait_until(lambda: len(source.asked) == 3, lambda: "not asked")
        lines = server.ask("GET", "/metrics").text.splitlines()
        source.release()
        waiting.join()
    for line in (
        'conch_reward_requests_total{code="200",form="openrlhf"} 1.0',
        'conch_reward_requests_total{code="503",form="slime"} 1.0',
        'conch_reward_requests_total{code="400",form="classify"} 1.0',
        'conch_reward_samples_total{reward="lengths",status="ok"} 2.0',
        'conch_reward_samples_total{reward="lengths",status="unavailable"} 1.0',
        'conch_reward_request_seconds_count{form="openrlhf"} 1.0',
        'conch_reward_waiting{reward="lengths"} 3.0',
        'conch_reward_ready{reward="lengths"} 1.0',
    ):
        assert line in lines, "\n".join(lines)


def test_metrics_count_requests_that_are_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_SECRET", SECRET)
    with served(Lengths(), is_ready=False, secret_env="REWARD_SECRET", max_request_mb=0.001) as server:
        known = {"authorization": f"Bearer {SECRET}"}
        assert server.post("/", {"texts": ["a"]})[0] == 401
        for _ in range(2):
            assert server.post("/", {"texts": ["a" * 2000]}, **known)[0] == 413
        lines = server.ask("GET", "/metrics", headers=known).text.splitlines()
    counted = [line for line in lines if line.startswith("conch_reward_requests_total")]
    assert counted == [
        'conch_reward_requests_total{code="401",form="refused"} 1.0',
        'conch_reward_requests_total{code="413",form="refused"} 2.0',
    ]


def test_model_chooses_among_several_rewards() -> None:
    one, two = Lengths(), Lengths()
    one.name, two.name = "one", "two"
    with served(one, two) as server:
        assert server.post("/classify", {"model": "two", "input": "a"})[1]["model"] == "two"
        assert (len(one.asked), len(two.asked)) == (0, 1)
        assert server.post("/models/one/get_reward", {"query": ["abc"]})[1]["rewards"] == [3.0]
        assert server.post("/models/one", {"texts": ["abc"]})[1]["model"] == "one"
        assert len(one.asked) == 2
        status, answer = server.post("/get_reward", {"query": ["a"]})
        assert status == 400 and "names no `model`; there are `one`, `two`" in answer["detail"]
        status, answer = server.post("/classify", {"model": "three", "input": "a"})
        assert status == 404 and "at /models/NAME/classify" in answer["detail"]
        listed = server.ask("GET", "/v1/models").json()["data"]
        assert [each["id"] for each in listed] == ["one", "two"]


def test_goal_space_behind_it_has_its_own_addresses_too() -> None:
    from conch.config import RewardConfig, load
    from conch.reward_server.server import add_goals
    from conch.reward_server.server_config import RewardServerConfig
    from conch.rewards.factory import from_user

    source = from_user("goals:text_length", RewardConfig())
    source.name = "goals"
    with served(source) as server:
        add_goals(server.front, [source], load(RewardServerConfig, {}))
        assert server.ask("GET", "/goals").json() == {"goals": ["text_length"]}
        status, answer = server.post("/goalspace", {"texts": ["one two three"], "normalize": False})
        assert (status, answer) == (200, {"text_length": [3.0]})
        assert server.post("/get_reward", {"query": ["a b"], "prompts": [""], "labels": [""]})[0] == 200


def test_goal_that_hangs_is_late_and_holds_up_nothing_else() -> None:
    held = threading.Event()

    def slow(texts: Sequence[str]) -> list[float]:
        if "[hang]" in texts:
            held.wait(30)
        return [float(len(text)) for text in texts]

    source = GoalsReward(GoalSpace([MeasuredGoal("slow", slow)], {"slow": None}))
    source.name = "goals"
    with served(source, deadline_s=0.5) as server:
        add_goals(server.front, [source], load(RewardServerConfig, {"deadline_s": 0.5}))
        try:
            assert server.post("/goalspace", ["abc"]) == (200, {"slow": [3.0]})
            asking = [
                threading.Thread(target=server.post, args=("/goalspace", ["[hang]"])) for _ in range(40)
            ]
            for thread in asking:
                thread.start()
            reply = server.ask("POST", "/goalspace", json=["[hang]"])
            assert reply.status_code == 504 and reply.headers["retry-after"] == "1"
            assert reply.json() == {"detail": "no values within 0.5 s"}
            assert server.post("/", {"texts": ["[hang]"]})[0] == 504
            assert not held.is_set() and server.ask("GET", "/metrics").status_code == 200
            # A process ends without waiting for these.
            measuring = [thread for thread in threading.enumerate() if thread.name.startswith("goals")]
            assert measuring and all(thread.daemon for thread in measuring)
        finally:
            held.set()
        for thread in asking:
            thread.join()

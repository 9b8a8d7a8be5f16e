"""A reward server before real sources: models on servers that come and go, verifiers, functions, several."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from conch.config import RewardConfig, load
from conch.rewards.factory import from_user
from conch.triton.contract import RewardModelSpec
from tests.fakes.json_rewards import endpoint
from tests.fakes.triton_server import FakeTriton
from tests.footprint import wait_until
from tests.launches import free_port
from tests.reward_servers import Served, served

TEXT = RewardModelSpec("walks", "text")
DIALOGUES = RewardModelSpec("chat", "text", reads="dialogues")
TOKENS = RewardModelSpec("walks", "token")
QUICK = {"client": {"deadline_s": 3.0, "request_timeout_s": 2.0, "cache_size": 0}}
PARIS = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Paris"}]


def length(row: Any) -> list[float]:
    return [float(len(row))]


def source(word: Any, **settings: Any) -> Any:
    return from_user(word, load(RewardConfig, {**QUICK, **settings}))


def query(*texts: str) -> dict[str, Any]:
    return {"query": list(texts), "prompts": [""] * len(texts), "labels": [""] * len(texts)}


def is_ready(server: Served) -> bool:
    return server.ask("GET", "/ready").is_success


def test_requests_of_many_callers_are_scored_together() -> None:
    with FakeTriton(TEXT, length) as triton, served(source(triton.url)) as server:
        triton.requests.clear()
        texts = [f"text {'x' * number}" for number in range(48)]
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda text: server.post("/get_reward", query(text)), texts))
        assert [answer["rewards"] for _, answer in answers] == [[float(len(text))] for text in texts]
        rows = [row for rows in triton.requests for row in rows]
        assert {*texts} <= {*rows} and len(triton.requests) < len(rows)


def test_query_of_a_model_need_not_begin_with_its_prompt() -> None:
    with FakeTriton(TEXT, length) as triton, served(source(triton.url)) as server:
        body = {"query": ["cut</s>"], "prompts": ["uncut"], "labels": [""]}
        assert server.post("/get_reward", body)[1]["rewards"] == [7.0]


def test_server_of_the_model_may_come_late_go_and_come_back() -> None:
    port = free_port()
    with ExitStack() as stack:
        server = stack.enter_context(served(source(f"127.0.0.1:{port}/walks"), is_ready=False))
        wait_until(lambda: "not asked yet" not in server.ask("GET", "/ready").text, lambda: "not asked")
        assert server.post("/get_reward", query("a"))[0] == 503
        with FakeTriton(TEXT, length, port=port):
            server.wait_until_ready()
            assert server.post("/get_reward", query("ab"))[1]["rewards"] == [2.0]
        wait_until(lambda: not is_ready(server), lambda: "still ready")
        started = time.monotonic()
        status, answer = server.post("/get_reward", query("ab"))
        # It has waited for the server, as long as the client's deadline allows.
        assert status == 503 and time.monotonic() - started > 1.0, answer
        with FakeTriton(TEXT, length, port=port):
            server.wait_until_ready()
            assert server.post("/get_reward", query("abc"))[1]["rewards"] == [3.0]


def test_one_of_two_replicas_is_enough() -> None:
    first = FakeTriton(TEXT, length)
    with first, FakeTriton(TEXT, length) as second:
        both = f"127.0.0.1:{first.port},127.0.0.1:{second.port}/walks"
        with served(source(both)) as server:
            first.stop()
            for _ in range(5):
                assert server.post("/get_reward", query("ab"))[1]["rewards"] == [2.0]
                time.sleep(0.1)
            assert is_ready(server)
            second.stop()
            wait_until(lambda: not is_ready(server), lambda: "still ready")


def test_model_that_takes_token_ids_is_refused_at_the_start() -> None:
    with FakeTriton(TOKENS, lambda row: [0.0]) as triton:
        server = Served({"walks": source(triton.url)}, {})
        server.thread.join(60)
    assert "takes token ids" in str(server.errors[0])


def test_dialogues_reach_a_model_that_reads_them_and_no_other() -> None:
    with FakeTriton(TEXT, length) as texts, FakeTriton(DIALOGUES, length) as chat:
        with served(source(texts.url)) as server:
            status, answer = server.post("/classify", {"model": "m", "messages": PARIS})
            assert status == 422 and "--template chat" in answer["detail"]
            assert server.post("/", {"prompt": PARIS[:1], "completion": "Paris"})[0] == 422
        with served(source(chat.url)) as server:
            answer = server.post("/classify", {"model": "m", "messages": PARIS})[1]
            assert answer["data"][0]["probs"][0] > len("Paris")
            status, answer = server.post("/classify", {"model": "m", "input": "a text"})
            assert status == 422 and "dialogue" in answer["detail"]


def test_our_own_client_can_ask_it() -> None:
    with FakeTriton(DIALOGUES, length) as triton, served(source(triton.url)) as server:
        from conch.types import Completion, Dialogue, Prompt, Rollout

        prompt = Prompt("Where?", (), dialogue=Dialogue(tuple(PARIS[:1])))
        rollout = Rollout(prompt, Completion("Paris", (), (), "eos"), 0)
        with source(f"{server.url}/get_reward", dialect="messages") as client:
            client.check()
            (result,) = client.submit([rollout]).result(60)
        # Beside it come the looks whether the model is still there.
        (asked,) = [row for rows in triton.requests for row in rows if "Paris" in row]
        assert result.scores["reward"] == float(len(asked))


@pytest.fixture(scope="module")
def gsm8k() -> Iterator[Served]:
    with served(source("verifier:gsm8k")) as server:
        yield server


@pytest.mark.parametrize(
    ("label", "score"), [("72", 1.0), ("work #### 72", 1.0), ({"answer": "72"}, 1.0), ("71", 0.0)]
)
def test_labels_reach_the_verifier(gsm8k: Served, label: Any, score: float) -> None:
    answer = {"prompt": "q", "response": "It is 72. #### 72", "label": label}
    assert gsm8k.post("/slime/scores", answer)[1]["answer"] == score
    openrlhf = {"query": ["q It is 72. #### 72"], "prompts": ["q "], "labels": [label]}
    assert gsm8k.post("/get_reward", openrlhf)[1]["rewards"] == [score]


def test_missing_label_is_a_failure_not_a_wrong_answer(gsm8k: Served) -> None:
    status, answer = gsm8k.post("/slime", {"prompt": "q", "response": "72", "label": None})
    assert status == 422 and "has no `answer`" in answer["detail"]


def test_ensembles_and_endpoints_stand_behind_it() -> None:
    with FakeTriton(TEXT, length) as triton, endpoint() as json_rewards:
        members = {"a": triton.url, "b": json_rewards.url}
        with served(source(members, combine="mean")) as server:
            assert server.post("/get_reward", query("abcd"))[1]["rewards"] == [4.0]


def test_function_is_called_once_for_many_requests() -> None:
    calls: list[int] = []

    def reward(samples: list[str], prompts: list[str], outputs: list[str], label: list[Any]) -> list[float]:
        calls.append(len(outputs))
        time.sleep(0.05)
        return [float(len(each)) for each in outputs]

    named = from_user(reward, RewardConfig(), metadata_keys=["label"])
    with served(named, label_key="label") as server, ThreadPoolExecutor(16) as pool:
        bodies = [{"prompt": "", "response": "x" * number, "label": number + 1} for number in range(32)]
        answers = list(pool.map(lambda body: server.post("/slime", body), bodies))
        # A function that names the label is called without one as well.
        assert server.post("/slime", {"prompt": "", "response": "xx", "label": None})[1] == 2.0
        calls.pop()
    assert [answer for _, answer in answers] == [float(number) for number in range(32)]
    assert sum(calls) == 32 and len(calls) < 20


def test_function_that_does_not_take_labels_says_so() -> None:
    def reward(samples: list[str], prompts: list[str], outputs: list[str]) -> list[float]:
        return [1.0] * len(outputs)

    with served(source(reward)) as server:
        status, answer = server.post("/slime", {"prompt": "", "response": "x", "label": "y"})
        assert status == 422 and "define it as" in answer["detail"]

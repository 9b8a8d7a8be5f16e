"""Reward functions for TRL on models that a real Triton serves, called with the arguments that TRL sends."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from conch.converters.to_triton import to_triton
from conch.errors import ConfigError
from conch.interop.trl import reward_function
from conch.rewards.score import score
from conch.serving.server.server import TritonServer
from tests.chats import chat_reward_model, chat_tokenizer
from tests.integration.conftest import TEXT_MODEL, TOKEN_MODEL
from tests.trl_calls import Logged, of_async_grpo, of_grpo

QUICK = {"client": {"deadline_s": 120, "request_timeout_s": 120}}
LETTERS = (["ab", "ab", "cd", "cd"], ["a", "bcd", "ef", ""])
USER = {"role": "user", "content": "two and two?"}
SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


@dataclass(frozen=True)
class Chat:
    """A served reward model with the template of `chatml`, and its checkpoint."""

    url: str
    model: Any

    def right(self, messages: Any, **more: Any) -> float:
        row = chat_tokenizer("chatml").apply_chat_template(
            messages, return_dict=True, return_tensors="pt", **more
        )
        with torch.inference_mode():
            return self.model(**row).logits.item()  # pyright: ignore[reportCallIssue]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    root = tmp_path_factory.mktemp("trl-chat")
    model = chat_reward_model(root / "chatml", "chatml")
    to_triton(root / "chatml", name="chatml", model_store=root / "store", template="chat", max_length=150)
    with TritonServer(root / "store", ["chatml"]) as server:
        yield Chat(server.endpoint("chatml"), model)


def test_texts_get_the_scores_of_the_served_model(reward_server: TritonServer) -> None:
    url, logged = reward_server.endpoint(TEXT_MODEL), Logged()
    function = reward_function(url, QUICK)
    assert function.__name__ == TEXT_MODEL
    rewards = asyncio.run(function(**of_grpo(logged, *LETTERS, label=[1, 1, 0, 0])))
    samples = [prompt + completion for prompt, completion in zip(*LETTERS, strict=True)]
    expected = [result.scores["reward"] for result in score(samples, url, QUICK)]
    assert rewards == pytest.approx(expected, abs=1e-6)
    assert len(set(expected)) == 4
    assert logged.metrics == {f"rewards/{TEXT_MODEL}/failed": [0.0]}
    function.close()
    assert asyncio.run(function(**of_grpo(logged, *LETTERS))) == pytest.approx(expected, abs=1e-6)
    function.close()


def test_a_sample_that_cannot_be_sent_is_none_and_the_others_have_scores(
    reward_server: TritonServer,
) -> None:
    function = reward_function(
        reward_server.endpoint(TEXT_MODEL), {**QUICK, "client": {**QUICK["client"], "max_request_mb": 0.001}}
    )
    first, second = asyncio.run(function(**of_async_grpo(["ab", "ab"], ["c", "d" * 2000])))
    assert first is not None and second is None
    assert (function.samples, function.failed) == (2, 1)
    function.close()


def test_messages_with_tools_reach_the_models_own_template(chat: Chat) -> None:
    function = reward_function(chat.url, QUICK, tools=[SCHEMA])
    talk = [
        {**said("")[0], "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "content": "4"},
        *said("4"),
    ]
    call = of_grpo(Logged(), [[USER], [USER]], [said("four"), talk])
    plain, with_tools = asyncio.run(function(**call))
    assert plain == pytest.approx(chat.right([USER, *said("four")], tools=[SCHEMA]), abs=1e-4)
    assert with_tools == pytest.approx(chat.right([USER, *talk], tools=[SCHEMA]), abs=1e-4)
    function.close()
    without = reward_function(chat.url, QUICK)
    (bare,) = asyncio.run(without(**of_grpo(Logged(), [[USER]], [said("four")])))
    assert bare == pytest.approx(chat.right([USER, *said("four")]), abs=1e-4) and bare != plain
    without.close()


def test_prompts_of_the_other_form_are_refused_by_a_sentence(reward_server: TritonServer, chat: Chat) -> None:
    texts = reward_function(reward_server.endpoint(TEXT_MODEL), QUICK)
    with pytest.raises(ConfigError, match=r"reads texts, and the prompts are messages: .* --template chat"):
        asyncio.run(texts(**of_grpo(Logged(), [[USER]], [said("4")])))
    with pytest.raises(ConfigError, match="reads texts, and the prompts are messages"):
        texts.check([{"prompt": [USER]}])
    texts.close()
    dialogues = reward_function(chat.url, QUICK)
    with pytest.raises(ConfigError, match="reads dialogues, but 4 of 4 prompts are texts"):
        asyncio.run(dialogues(**of_grpo(Logged(), *LETTERS)))
    with pytest.raises(ConfigError, match="reads dialogues, but 1 of 1 prompts are texts"):
        dialogues.check([{"prompt": "2+2"}])
    dialogues.check([{"prompt": [USER], "answer": "4"}])
    dialogues.close()


def test_a_model_of_token_ids_is_refused_before_training(reward_server: TritonServer) -> None:
    with pytest.raises(ConfigError, match=r"takes token ids, .* --form text"):
        reward_function(reward_server.endpoint(TOKEN_MODEL), QUICK)


def test_a_forked_child_says_that_grpc_does_not_start_again_in_it(
    reward_server: TritonServer, tmp_path: Path
) -> None:
    function = reward_function(reward_server.endpoint(TEXT_MODEL), QUICK, sync=True)
    before = function(**of_grpo(Logged(), *LETTERS))
    found = tmp_path / "found"
    child = os.fork()
    if child == 0:  # pragma: no cover
        try:
            function(**of_grpo(Logged(), *LETTERS))
        except ConfigError as error:
            found.write_text(str(error))
        finally:
            os._exit(0)
    assert ended(child) == 0
    assert "gRPC does not start again" in found.read_text() and "the method spawn" in found.read_text()
    assert function(**of_grpo(Logged(), *LETTERS)) == before
    function.close()


def _score_in_child(function: Any, answers: Any) -> None:
    answers.put(function(**of_grpo(Logged(), *LETTERS)))


def test_a_spawned_child_opens_connections_of_its_own(reward_server: TritonServer) -> None:
    function = reward_function(reward_server.endpoint(TEXT_MODEL), QUICK, sync=True)
    before = function(**of_grpo(Logged(), *LETTERS))
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    child = context.Process(target=_score_in_child, args=(function, answers))
    child.start()
    assert answers.get(timeout=120) == before
    child.join(60)
    assert child.exitcode == 0
    function.close()


def ended(child: int) -> int:
    """Its exit status; one that does not end is killed."""
    for _ in range(1200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.1)
    os.kill(child, 9)
    return os.waitpid(child, 0)[1]

"""Scores of steps and tokens through the real converter and the real server."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton

from conch.config import RewardClientConfig, RewardConfig, load
from conch.converters.to_triton import main
from conch.errors import ServerStartError
from conch.rewards.served import TritonReward
from conch.serving.server.health import check_golden
from conch.serving.server.server import TritonServer
from conch.store.manifest import Golden
from conch.store.store import read_model
from conch.trainers.ppo import PPORunConfig, PPOTrainer
from conch.triton.channel import Access, open_client
from conch.triton.client import read_steps, request_inputs
from conch.types import Completion, Prompt, Rollout
from tests.checkpoints import (
    EOS,
    LETTERS,
    base_model,
    process_reward,
    save_value_head,
    tokenizer_for,
    value_head_tensors,
)
from tests.runs import batch_of
from tests.tiny import decoder_shape

DEADLINE_S = 120.0
TOKENIZER = tokenizer_for("qwen2")
SEMICOLON = LETTERS.index(";")
STEPS = ["--step_separator", ";", "--granularity", "step"]
ARGUMENTS: dict[str, list[str]] = {
    "steps": [*STEPS, "--max_queue_delay_us", "20000"],
    "steps-token": [*STEPS, "--form", "token", "--aggregate", "prod", "--max_queue_delay_us", "20000"],
    "tokens": ["--granularity", "token", "--base_model", "base", "--template", "{text}{eos}"],
}
"""Name in the store -> how it is converted."""

CHECKPOINTS = {"steps": "steps", "steps-token": "steps", "tokens": "head"}


@dataclass(frozen=True)
class Served:
    """What was converted, and the server that has all of it. model: the process reward."""

    folder: Path
    model: Any
    server: TritonServer


def command(folder: Path, name: str, *more: str) -> list[str]:
    arguments = [str(folder / "base") if argument == "base" else argument for argument in ARGUMENTS[name]]
    return ["--checkpoint", str(folder / CHECKPOINTS[name]), *arguments, *more, "--quiet"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("dense")
    model = process_reward(folder / "steps", "qwen2")
    base = base_model(folder / "base", "gpt2")
    save_value_head(folder / "head", value_head_tensors(base), "pt")
    for name in ARGUMENTS:
        assert main(command(folder, name, "--name", name, "--model_store", str(folder / "store"))) == 0
    with TritonServer(folder / "store", list(ARGUMENTS), ready_timeout_s=300.0) as server:
        yield Served(folder, model, server)


@torch.inference_mode()
def probabilities(model: Any, ids: list[int]) -> list[float]:
    """Of label 1 at every token."""
    logits = model(torch.tensor([ids])).logits[0].double()
    return torch.sigmoid(logits[:, 1] - logits[:, 0]).tolist()


def expected_steps(model: Any, ids: list[int]) -> tuple[list[int], list[float]]:
    """One character is one token, so ends are the same in both forms."""
    every = probabilities(model, ids)
    places = sorted({place for place, token in enumerate(ids) if token == SEMICOLON} | {len(ids) - 1})
    return [place + 1 for place in places], [every[place] for place in places]


def ids_of(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]


def ask(client: triton.InferenceServerClient, served: Served, name: str, texts: list[str]) -> Any:
    """The reply to one request."""
    spec = read_model(served.folder / "store", name).spec
    if spec.form == "text":
        request: dict[str, Any] = {"texts": texts}
    else:
        longest = max(map(len, texts))
        padded = [[*ids_of(text), *[0] * (longest - len(text))] for text in texts]
        mask = [[1] * len(text) + [0] * (longest - len(text)) for text in texts]
        request = {"input_ids": padded, "attention_mask": mask}
    return client.infer(name, request_inputs(request, spec), client_timeout=DEADLINE_S)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_verify_asks_for_dense_scores_as_well(
    served: Served, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(served.folder, name, "--verify", served.server.endpoint(name))
    assert main(arguments) == 0
    assert "batch of 7: each step" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["steps", "steps-token"])
def test_a_reply_is_a_rectangle_filled_up_with_nan_and_minus_one(served: Served, name: str) -> None:
    with open_client(served.server.url, Access()) as client:
        reply = ask(client, served, name, ["ab;cd;e", "a"])
    assert reply.as_numpy("step_ends").tolist() == [[3, 6, 7], [1, -1, -1]]
    assert np.isnan(reply.as_numpy("step_rewards")).tolist() == [[False] * 3, [False, True, True]]
    assert reply.as_numpy("rewards").shape == (2, 1)


@pytest.mark.parametrize("name", ["steps", "steps-token"])
def test_requests_of_other_lengths_share_a_batch_and_get_their_own_steps(served: Served, name: str) -> None:
    """32 callers at once, each with another number of rows and steps; the server joins their requests."""
    texts = [f"{LETTERS[number % 19]};" * (1 + number % 9) + "ab" * (number % 6) for number in range(40)]
    requests = [list(itertools.islice(itertools.cycle(texts), n, n + 1 + n % 4)) for n in range(32)]
    together = threading.Barrier(len(requests))
    with open_client(served.server.url, Access()) as client:
        before = client.get_inference_statistics(name).model_stats[0]

        def call(texts: list[str]) -> Any:
            with open_client(served.server.url, Access()) as own:
                together.wait(DEADLINE_S)
                return ask(own, served, name, texts)

        with ThreadPoolExecutor(len(requests)) as callers:
            replies = list(callers.map(call, requests))
        after = client.get_inference_statistics(name).model_stats[0]

    for asked, reply in zip(requests, replies, strict=True):
        ends, scores = read_steps(reply, name, len(asked))
        for text, own_ends, own_scores in zip(asked, ends, scores, strict=True):
            right_ends, right_scores = expected_steps(served.model, ids_of(text))
            assert own_ends == right_ends
            np.testing.assert_allclose(own_scores, right_scores, atol=1e-5)
    executions = after.execution_count - before.execution_count
    assert executions < len(requests), "no two requests shared a batch"


def test_a_server_that_scores_a_step_otherwise_is_not_ready(served: Served) -> None:
    """The sample's own score, the lowest, stays right."""
    stored = read_model(served.folder / "store", "steps")
    told = stored.golden.model_dump()
    number = max(range(8), key=lambda n: len(told["samples"][n]["step_scores"]))
    scores = list(told["samples"][number]["step_scores"])
    scores[scores.index(max(scores))] += 0.01
    told["samples"][number]["step_scores"] = scores
    wrong = replace(stored, golden=Golden.model_validate(told))
    with open_client(served.server.url, Access()) as client:
        check_golden(client, stored)
        with pytest.raises(ServerStartError, match=f"golden sample {number} scores its steps otherwise"):
            check_golden(client, wrong)


# ------------------------------------------------------------------------------------------------ the client


def decode(ids: Any) -> str:
    return TOKENIZER.decode(list(ids), skip_special_tokens=True)


def rollout(prompt: str, output: str) -> Rollout:
    """One that ends in an eos."""
    ids = (*ids_of(output), EOS)
    return Rollout(
        Prompt(prompt, tuple(ids_of(prompt))), Completion(output, ids, (0.0,) * len(ids), "eos"), 0
    )


def right_row(served: Served, prompt: str, response: tuple[int, ...]) -> list[float]:
    """The reward of each token: the probability of label 1 where a step of the response ends, else 0.

    Tokens of no text (pad, eos, unk) are not part of the sample; the others are a character each.
    """
    read = [place for place, token in enumerate(response) if token < len(LETTERS)]
    every = probabilities(served.model, [*ids_of(prompt), *(response[place] for place in read)])
    every = every[len(prompt) :]
    row = [0.0] * len(response)
    for place, score in zip(read, every, strict=True):
        if response[place] == SEMICOLON or place == read[-1]:
            row[place] = score
    return row


ROLLOUTS = [rollout("a;b", "c;de;f"), rollout("q", ";"), rollout("a;", "bc"), rollout("ab", "k" * 20)]


@pytest.mark.parametrize("name", ["steps", "steps-token"])
def test_a_steps_score_lands_on_the_token_of_the_response_that_ends_it(served: Served, name: str) -> None:
    """Steps of the prompt have none; the closing eos ends no step."""
    config = RewardConfig(dense=True, client=RewardClientConfig(batch_rows=3))
    with TritonReward(served.server.endpoint(name), config, decode=decode) as reward:
        reward.check()
        results = reward.submit(ROLLOUTS).result(DEADLINE_S)
        again = reward.submit(ROLLOUTS[:1]).result(DEADLINE_S)

    for one, result in zip(ROLLOUTS, results, strict=True):
        right = right_row(served, one.prompt.text, one.completion.token_ids)
        assert result.token_scores == pytest.approx(right, abs=1e-5) and not result.scores
    assert again[0].token_scores == results[0].token_scores  # remembered


def test_each_token_of_a_value_head_has_its_score(served: Served) -> None:
    with TritonReward(served.server.endpoint("tokens"), RewardConfig(dense=True), decode=decode) as reward:
        results = reward.submit(ROLLOUTS).result(DEADLINE_S)
    with open_client(served.server.url, Access()) as client:
        reply = ask(client, served, "tokens", [one.sample for one in ROLLOUTS])
    _, scores = read_steps(reply, "tokens", len(ROLLOUTS))

    for one, result, of_sample in zip(ROLLOUTS, results, scores, strict=True):
        right = [*of_sample[len(one.prompt.text) :], 0.0]  # the policy's eos is no text
        assert result.token_scores == pytest.approx(right, abs=1e-5)


def test_without_dense_the_reward_is_the_aggregate(served: Served) -> None:
    with TritonReward(served.server.endpoint("steps"), RewardConfig()) as reward:
        results = reward.submit(ROLLOUTS).result(DEADLINE_S)
    for one, result in zip(ROLLOUTS, results, strict=True):
        _, scores = expected_steps(served.model, ids_of(one.sample))
        assert result.scores == {"reward": pytest.approx(min(scores), abs=1e-5)}
        assert result.token_scores is None


@pytest.mark.parametrize("name", ["steps", "steps-token"])
def test_ppo_learns_from_each_step_where_it_ended(served: Served, name: str, tmp_path: Path) -> None:
    """Without discount and KL a token's return less that of the next is its reward."""
    settings = {
        "model": {"architecture": decoder_shape("gpt2")},
        "generation": {"max_new_tokens": 12, "chunk_size": 8},
        "reward": {"url": served.server.endpoint(name), "dense": True},
        "ppo": {"rollouts_per_step": 24, "lam": 1.0, "kl": {"coef": 0.0}},
        "train": {"run_dir": str(tmp_path / "run")},
    }
    trainer = PPOTrainer(load(PPORunConfig, settings), prompts=["a;b", "cd", "e;"] * 8, tokenizer=TOKENIZER)
    with contextlib.closing(trainer):
        rollouts = trainer.rollout(trainer.prompts)
        batch = batch_of(trainer, rollouts, trainer.score(rollouts))
    returns = torch.nn.functional.pad(batch.returns, (0, 1))
    rewards = (returns[:, :-1] - returns[:, 1:]).tolist()

    steps = 0
    for row, one in zip(rewards, rollouts, strict=True):
        response = one.completion.token_ids
        right = right_row(served, one.prompt.text, response)
        if name == "steps-token":  # the model reads the sampled ids, special ones too
            right = right_row_of_ids(served, one)
        assert row[: len(response)] == pytest.approx(right, abs=1e-5)
        assert not any(row[len(response) :])
        steps += sum(score > 0 for score in right)
    assert steps > len(rollouts), "no response had two steps"


def right_row_of_ids(served: Served, one: Rollout) -> list[float]:
    """The same where the model reads every id; a response of nothing but eos ends no step of its own."""
    ids = [*one.prompt.token_ids, *one.completion.token_ids]
    every, start = probabilities(served.model, ids), len(one.prompt.token_ids)
    last = max(place for place, token in enumerate(ids) if token != EOS)
    ends = [token == SEMICOLON or place == last for place, token in enumerate(ids)]
    return [score if end else 0.0 for score, end in zip(every[start:], ends[start:], strict=True)]

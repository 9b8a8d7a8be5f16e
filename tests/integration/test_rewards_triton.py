"""TritonReward and Scorer against the real server: same scores, and what its deaths look like from here."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import GPT2ForSequenceClassification

from conch.config import RewardClientConfig, RewardConfig
from conch.errors import RewardUnavailableError
from conch.rewards.scorer import RewardScorer
from conch.rewards.served import TritonReward
from conch.serving.server.server import TritonServer
from conch.types import Completion, Prompt, RewardStatus, Rollout
from tests.integration.conftest import TEXT_MODEL, TOKEN_MODEL, RewardModel
from tests.reward_settings import changed

LETTERS = "abcdefghijklmnopqrstu"
EOS = 22
WAIT_S = 120.0
CONFIG = RewardConfig(client=RewardClientConfig(request_timeout_s=30, deadline_s=100))
HASTY = RewardConfig(client=RewardClientConfig(request_timeout_s=2, deadline_s=6))


def walk(prompt: str, output: str) -> Rollout:
    """A rollout that ends in eos, tokenised as the served model does it."""
    prompt_ids, output_ids = (tuple(LETTERS.index(letter) for letter in text) for text in (prompt, output))
    completion = Completion(output, (*output_ids, EOS), (0.0,) * (len(output) + 1), "eos")
    return Rollout(Prompt(prompt, prompt_ids), completion, policy_version=0)


# All lengths that fit, the same walk twice, and nothing but eos.
WALKS = [walk(LETTERS[start], LETTERS[:length]) for start in (3, 7) for length in range(10)]
WALKS += [walk("k", "ba"), walk("k", "ba"), walk("", "")]


@pytest.fixture(scope="module")
def expected(reward_model: RewardModel) -> list[float]:
    """Hugging Face scores of WALKS, one at a time, without padding."""
    model = GPT2ForSequenceClassification.from_pretrained(reward_model.checkpoint).eval()
    ids = [walk.prompt.token_ids + walk.completion.token_ids for walk in WALKS]
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([row])).logits.item() for row in ids]


@pytest.mark.parametrize("batch_rows", [1, 5, 64])
@pytest.mark.parametrize("model", [TEXT_MODEL, TOKEN_MODEL])
def test_served_scores_are_those_of_hugging_face(
    model: str, batch_rows: int, reward_server: TritonServer, expected: list[float]
) -> None:
    config = changed(CONFIG, client={"batch_rows": batch_rows})
    with TritonReward(reward_server.endpoint(model), config) as reward:
        reward.check()
        results = reward.submit(WALKS).result(WAIT_S)
    assert [result.scores["reward"] for result in results] == pytest.approx(expected, abs=1e-5)
    assert {(result.model, result.version) for result in results} == {(model, "1")}


def test_too_long_walk_is_invalid_in_token_form(reward_server: TritonServer) -> None:
    with TritonReward(reward_server.endpoint(TOKEN_MODEL), CONFIG) as reward:
        results = reward.submit([walk("a", LETTERS[:11]), walk("a", "b")]).result(WAIT_S)
    assert [result.status for result in results] == [RewardStatus.INVALID, RewardStatus.OK]
    assert "has 13 tokens, the model takes 12 at most" in results[0].detail


def test_id_outside_the_vocabulary_does_not_take_its_batch_with_it(reward_server: TritonServer) -> None:
    alien = Rollout(Prompt("a", (0,)), Completion("?", (999,), (0.0,), "length"), policy_version=0)
    with TritonReward(reward_server.endpoint(TOKEN_MODEL), CONFIG) as reward:
        results = reward.submit([walk("a", "b"), alien, walk("b", "a")]).result(WAIT_S)
    assert [result.status.value for result in results] == ["ok", "invalid", "ok"]
    assert "refused row 1 (sample " in results[1].detail and "token ids outside" in results[1].detail


def test_check_lists_what_the_real_server_has(reward_server: TritonServer) -> None:
    words = rf"model `runs` is not loaded at .*; there is: {TEXT_MODEL}, {TOKEN_MODEL}"
    missing = pytest.raises(RewardUnavailableError, match=words)
    with TritonReward(reward_server.endpoint("runs"), CONFIG) as reward, missing:
        reward.check()


def test_dead_server_is_unavailable_and_waiting_outlasts_it(
    reward_model: RewardModel, expected: list[float]
) -> None:
    """One server for the whole story, because each start takes seconds."""
    patient = changed(HASTY, failure={"policy": "wait", "wait_budget_s": WAIT_S})
    with TritonServer(reward_model.model_store, [TEXT_MODEL]) as server:
        other, port = server.endpoint(TOKEN_MODEL), int(server.url.rpartition(":")[2])
        unloaded = pytest.raises(RewardUnavailableError, match=f"is not loaded at .* there is: {TEXT_MODEL}")
        with TritonReward(other, CONFIG) as reward, unloaded:
            reward.check()

        reward = TritonReward(server.endpoint(TEXT_MODEL), patient)
        reward.check()
        for stub in stubs_of(server.pid):
            os.kill(stub, signal.SIGKILL)
        assert statuses(reward) <= {RewardStatus.UNAVAILABLE, RewardStatus.TIMEOUT}

        os.kill(server.pid, signal.SIGKILL)
        server.wait(WAIT_S)
        started = time.monotonic()
        assert statuses(reward) == {RewardStatus.UNAVAILABLE}
        assert time.monotonic() - started < 30

    successor = TritonServer(reward_model.model_store, [TEXT_MODEL], grpc_port=port)
    starter = threading.Thread(target=successor.start)
    with reward:
        scorer = RewardScorer(reward, patient)
        scorer.submit(WALKS)
        starter.start()
        try:
            results = scorer.gather()
        finally:
            starter.join(WAIT_S)
            successor.stop()
    assert [result.scores["reward"] for result in results] == pytest.approx(expected, abs=1e-5)
    assert scorer.metrics()["reward/retries"] > 0


def statuses(reward: TritonReward) -> set[RewardStatus]:
    return {result.status for result in reward.submit(WALKS).result(WAIT_S)}


def stubs_of(server_pid: int) -> list[int]:
    """Process ids of the model processes of a server."""
    pids = [child.pid for child in psutil.Process(server_pid).children()]
    stubs = [pid for pid in pids if "stub" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert stubs, "no model process found"
    return stubs

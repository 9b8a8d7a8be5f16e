"""A judge behind vLLM's own OpenAI server, on a CPU: its log-probabilities are those of the model."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import psutil
import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from conch.config import JudgeConfig, load
from conch.errors import ConfigError
from conch.rewards.judge.source import JudgeReward
from conch.types import RewardStatus
from tests.fakes.rollouts import rollouts
from tests.launches import ROOT, free_port
from tests.vllm.conftest import CACHE_BYTES

READY_S = 400.0
OUTPUTS = ("a", "bcd", "the best", "no")


@pytest.fixture(scope="module")
def server(
    lm: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Its address, up to /v1; the model writes letters."""
    folder = tmp_path_factory.mktemp("judge")
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    template = folder / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    port = free_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
        *("--served-model-name", "judge", "--host", "127.0.0.1", "--port", str(port)),
        *("--chat-template", str(template), "--dtype", "float32", "--max-model-len", "160"),
        *("--enforce-eager", "--kv-cache-memory-bytes", str(int(CACHE_BYTES))),
    ]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        _wait_for(process, f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        process.wait(60)
        for left_over in psutil.wait_procs(family, timeout=30)[1]:
            left_over.kill()


def _wait_for(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + READY_S
    while True:
        assert process.poll() is None and time.monotonic() < deadline, "vLLM's server did not start"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)


def judge(server: str, **settings: Any) -> JudgeReward:
    template = {"template": "rate {{ output }}"}
    return JudgeReward(load(JudgeConfig, {"url": server, "model": "judge", **template, **settings}))


def next_probabilities(
    lm: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, output: str
) -> dict[str, float]:
    """Of the twenty likeliest letters, by the model itself."""
    ids = torch.tensor([tokenizer(f"rate {output}")["input_ids"]])
    with torch.no_grad():
        probabilities = lm(ids).logits[0, -1].double().softmax(-1)
    top = probabilities.topk(20).indices.tolist()
    return {tokenizer.decode([index]): float(probabilities[index]) for index in top}


def test_expected_value_is_that_of_the_models_probabilities(
    server: str, lm: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    values = {letter: float(number) for number, letter in enumerate("abcdefgh")}
    settings = {"choices": values, "max_tokens": 1, "min_mass": 0.01, "scaled_to": None}
    with closing(judge(server, parser="logprobs", **settings)) as source:
        source.check()
        results = source.submit(rollouts(*OUTPUTS)).result(120)
    for output, result in zip(OUTPUTS, results, strict=True):
        likeliest = next_probabilities(lm, tokenizer, output)
        mass = sum(likeliest.get(letter, 0.0) for letter in values)
        expected = sum(likeliest.get(letter, 0.0) * value for letter, value in values.items()) / mass
        assert result.ok, result.detail
        assert result.scores["reward"] == pytest.approx(expected, abs=1e-4)


def test_votes_are_sampled_by_their_seeds_and_known_when_asked_again(server: str) -> None:
    choices = {letter: float(number) for number, letter in enumerate("abcdefghijklmnopqrst")}
    settings = {"choices": choices, "max_tokens": 1, "scaled_to": None, "top_logprobs": 20, "min_mass": 0.01}
    with closing(judge(server, parser="logprobs", votes=3, temperature=1.0, **settings)) as source:
        first, again = (source.submit(rollouts("abc")).result(120)[0] for _ in range(2))
        assert first.scores == again.scores
        assert source.stats().requests == 3
        metrics = source.metrics()
        assert metrics["judge/known_answers"] == 3
        assert metrics["judge/tokens_out"] == 3 and metrics["judge/tokens_in"] > 3 * len("rate ")


def test_letters_are_no_number_and_a_cut_answer_is_none(server: str) -> None:
    with closing(judge(server, max_tokens=4, body={"ignore_eos": True})) as source:
        (result,) = source.submit(rollouts("abc")).result(120)
    assert result.status is RewardStatus.INVALID and "cut" in result.detail


def test_model_and_number_of_log_probabilities_are_checked_before_the_run(server: str) -> None:
    other = JudgeReward(load(JudgeConfig, {"url": server, "model": "other"}))
    with closing(other) as source, pytest.raises(ConfigError, match="no such model, but judge"):
        source.check()


def test_prompt_beyond_the_context_is_invalid(server: str) -> None:
    with closing(judge(server)) as source:
        (result,) = source.submit(rollouts("a" * 200)).result(120)
    assert result.status is RewardStatus.INVALID and "HTTP 400" in result.detail

"""A model that vLLM can run on a CPU (heads of 32), and engines over it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# vLLM imports Ray, which reads this once: the cluster of a later test in this process asks for a token.
os.environ.setdefault("RAY_AUTH_MODE", "token")

import pytest
import torch
from jaxtyping import Float
from pydantic import ByteSize
from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from conch.config import RolloutConfig
from conch.models.forward import ForwardInputs
from conch.models.policy import response_logits
from conch.ops import logprobs_of_labels
from conch.rollouts.vllm.engine import ColocatedVLLM
from conch.types import Prompt, Rollout
from tests.runs import redraw
from tests.tiny import char_tokenizer, tiny_gpt2_config

CACHE_BYTES = ByteSize(50 * 2**20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM and what it imports warn of much that is not ours."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter."""
    return char_tokenizer("abcdefghijklmnopqrst ")


def make_lm(tokenizer: PreTrainedTokenizerFast, seed: int) -> GPT2LMHeadModel:
    """A random GPT-2 whose distributions are far from even, the same on each machine."""
    config = tiny_gpt2_config(tokenizer, n_embd=64, n_head=2, n_layer=3, n_positions=160)
    lm = GPT2LMHeadModel(config).eval()
    redraw(lm, 0.1, seed)
    return lm


def prompts(tokenizer: PreTrainedTokenizerFast, *texts: str) -> list[Prompt]:
    """Of texts."""
    return [Prompt(text, tuple(tokenizer(text)["input_ids"])) for text in texts]


def trainers_logprobs(
    lm: PreTrainedModel, rollout: Rollout, temperature: float = 1.0
) -> Float[torch.Tensor, " R"]:
    """Of a completion, by one forward pass over all of it."""
    prompt, response = rollout.prompt.token_ids, rollout.completion.token_ids
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logits = response_logits(
            lm, ForwardInputs(ids, torch.ones_like(ids, dtype=torch.bool), len(response))
        )
    return logprobs_of_labels(logits, torch.tensor([response]), temperature)[0]


@pytest.fixture(scope="session")
def lm(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """The policy, which tests may move: `colocated` holds what it was when its version was asked for."""
    return make_lm(tokenizer, 0)


@pytest.fixture(scope="session")
def colocated(lm: GPT2LMHeadModel) -> Iterator[ColocatedVLLM]:
    """vLLM in this process."""
    config = RolloutConfig(engine="vllm", kv_cache_memory_bytes=CACHE_BYTES)
    before = torch.get_rng_state()
    vllm = ColocatedVLLM(lambda: lm, config, torch.float32, several_ranks=False)
    assert torch.equal(torch.get_rng_state(), before), "vLLM has seeded the trainer's generator"
    yield vllm
    vllm.close()

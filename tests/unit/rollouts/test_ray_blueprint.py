"""What an actor of Ray builds from a blueprint computes what the policy does, once it has its weights."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.config import ModelConfig, RolloutConfig, load
from conch.errors import ModelError
from conch.models.adapter import add_adapter
from conch.models.loading import load_lm, vocabulary_size, with_pad_token
from conch.rollouts.protocol import WeightUpdate, WeightVersion
from conch.rollouts.ray.blueprint import Blueprint, blueprint_of, build_server
from conch.rollouts.weight_sync import checkpoint_tensors
from tests.integration.families.models import random_model
from tests.integration.families.table import FAMILIES
from tests.tiny import char_tokenizer, tiny_decoder

LETTERS = char_tokenizer("abcdefghijklmnopqrstu")


@torch.no_grad()
def logits(lm: PreTrainedModel, ids: Tensor) -> Tensor:
    read = {"decoder_input_ids": ids} if lm.config.is_encoder_decoder else {}
    return lm.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **read).logits


def blueprint(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> Blueprint:
    return blueprint_of(lm, tokenizer, load(RolloutConfig, {"engine": "ray"}), dtype, None)


@torch.no_grad()
def sampler_of(drawn: Blueprint, weights: dict[str, Tensor], folder: Path) -> PreTrainedModel:
    """The model of an actor that has been handed these weights; NaN stands where it has none."""

    async def build() -> Any:
        server = await build_server(drawn, folder)
        for parameter in server.sampler._lm.parameters():  # pyright: ignore[reportAttributeAccessIssue]
            parameter.fill_(float("nan"))
        version = WeightVersion(source="run", version=1)
        await server.update_weights(WeightUpdate(weights=version, handed=True), weights)
        return server.sampler

    return asyncio.run(build())._lm


def largest_difference(policy: PreTrainedModel, sampler: PreTrainedModel) -> float:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary_size(policy) - 3, (2, 30), generator=generator)
    return float((logits(policy, ids).double() - logits(sampler, ids).double()).abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_sampler_in_half_precision_computes_what_the_loaded_model_does(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    tokenizer = with_pad_token(family.tokenizer(), family.pad_token, name=name)
    random = random_model(family, tokenizer)
    with torch.no_grad():
        for key, buffer in random.named_buffers():
            if key in random.state_dict() and buffer.is_floating_point():
                buffer.add_(0.1 * torch.randn_like(buffer))
    random.save_pretrained(tmp_path / "policy")
    policy = load_lm(load(ModelConfig, {"path": str(tmp_path / "policy"), "dtype": "bfloat16"}))
    drawn = blueprint(policy, tokenizer, torch.bfloat16)
    assert largest_difference(policy, sampler_of(drawn, checkpoint_tensors(policy), tmp_path)) == 0.0


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "t5"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sampler_in_full_precision_computes_what_the_policy_does(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    policy = tiny_decoder(family, dtype=dtype)
    policy.resize_token_embeddings(26, mean_resizing=False)
    sampler = sampler_of(blueprint(policy, LETTERS, dtype), checkpoint_tensors(policy), tmp_path)
    assert largest_difference(policy, sampler) < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ],
)
def test_sampler_computes_what_the_adapted_policy_does(settings: dict[str, Any], tmp_path: Path) -> None:
    policy = tiny_decoder("llama")
    add_adapter(policy, {"r": 4, **settings}, merged_when_saved=True)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    sampler = sampler_of(blueprint(policy, LETTERS, policy.dtype), checkpoint_tensors(policy), tmp_path)
    assert largest_difference(policy, sampler) < 1e-10


def test_model_that_changed_since_it_was_configured_is_refused_in_words(tmp_path: Path) -> None:
    policy = tiny_decoder("gptj")
    attention: Any = policy.get_submodule("transformer.h.1.attn")
    attention.embed_positions = attention.embed_positions[:9].clone()
    with pytest.raises(ModelError, match=r"no transformer\.h\.1\.attn\.embed_positions like the policy's"):
        sampler_of(blueprint(policy, LETTERS, policy.dtype), checkpoint_tensors(policy), tmp_path)

"""A LoRA adapter that goes to a transformers sampler by itself is what merging it in the trainer is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conch.config import GenerationConfig
from conch.errors import RolloutError
from conch.models.adapter import add_adapter
from conch.rollouts.hf.engine import HFEngine
from conch.rollouts.hf.weights import ModelWeights, lora_capacity
from conch.rollouts.protocol import WeightUpdate, WeightVersion
from conch.rollouts.weight_sync import WeightSource, adapter_tensors, checkpoint_tensors
from tests.tiny import char_tokenizer, tiny_decoder
from tests.transformers_servers import served
from tests.unit.rollouts.test_transformers_server import all_of, assert_alike, engine_over, prompts

TOKENIZER = char_tokenizer("abcdefghijklmnopqrstu")


@pytest.fixture(autouse=True)
def _has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter must know its base; that of these models comes from nowhere."""
    monkeypatch.setattr("conch.models.adapter._base_path", lambda _model: "base")


def adapted(family: str = "llama", dtype: torch.dtype = torch.float64, **settings: Any) -> PreTrainedModel:
    """A policy with an adapter that is not zero."""
    lm = tiny_decoder(family, seed=2, dtype=dtype)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **settings}
    add_adapter(lm, settings, merged_when_saved=False)
    train(lm)
    return lm


def train(lm: PreTrainedModel) -> None:
    """Move the adapter."""
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)


def put(weights: ModelWeights, part: Any, tensors: dict[str, Tensor]) -> None:
    version = WeightVersion(source="run", version=1)
    weights.load(WeightUpdate(weights=version, part=part, handed=True), tensors)


def assert_holds(held: PreTrainedModel, wanted: dict[str, Tensor]) -> None:
    found = checkpoint_tensors(held)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt_neox"])
def test_base_and_adapter_are_the_merged_policy_to_the_last_bit(family: str, dtype: torch.dtype) -> None:
    target = {"gpt_neox": ["query_key_value", "dense"]}.get(family, ["q_proj", "v_proj"])
    lm, held = adapted(family, dtype, target_modules=target), tiny_decoder(family, dtype=dtype)
    weights = ModelWeights(held, 60.0)
    put(weights, "base", checkpoint_tensors(lm, merged=False))
    assert_holds(held, checkpoint_tensors(lm, merged=False))
    for _ in range(3):  # none is added to the one before
        put(weights, "adapter", adapter_tensors(lm))
        assert_holds(held, checkpoint_tensors(lm))
        train(lm)
    other = tiny_decoder(family, seed=7, dtype=dtype)
    put(weights, "whole", checkpoint_tensors(other))
    assert_holds(held, checkpoint_tensors(other))


def test_layers_without_a_part_of_the_next_adapter_are_the_base_again() -> None:
    lm, held = adapted(), tiny_decoder("llama")
    weights = ModelWeights(held, 60.0)
    put(weights, "base", checkpoint_tensors(lm, merged=False))
    put(weights, "adapter", adapter_tensors(lm))
    fewer = adapted(target_modules=["v_proj"])
    put(weights, "adapter", adapter_tensors(fewer))
    assert_holds(held, checkpoint_tensors(fewer))


@pytest.mark.parametrize(
    "changed",
    [
        {"model.layers.0.self_attn.q_proj.lora_B.weight": None},
        {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(3, 32)},
        {"model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(31, 4)},
        {"model.layers.9.mlp.lora_A.weight": torch.ones(4, 32)},
        {"model.layers.0.self_attn.q_proj.weight": torch.ones(32, 32)},
    ],
    ids=str,
)
def test_adapter_of_another_model_is_refused_and_changes_nothing(changed: dict[str, Any]) -> None:
    lm, held = adapted(), tiny_decoder("llama")
    weights, before = ModelWeights(held, 60.0), tiny_decoder("llama")
    tensors = {**adapter_tensors(lm), **changed}
    with pytest.raises(RolloutError, match=r"the adapter's \S+ fits no layer of this LlamaForCausalLM"):
        put(weights, "adapter", {name: each for name, each in tensors.items() if each is not None})
    assert_holds(held, checkpoint_tensors(before))


def test_capacity_is_the_plain_layers_that_share_no_weight() -> None:
    llama = lora_capacity(tiny_decoder("llama"))
    assert llama is not None and llama.rank == 512
    assert llama.modules == (
        *("down_proj", "gate_proj", "k_proj", "lm_head", "o_proj", "q_proj", "up_proj", "v_proj"),
    )
    assert lora_capacity(tiny_decoder("gpt2")) is None
    tied = lora_capacity(tiny_decoder("llama", tie_word_embeddings=True))
    assert tied is not None and "lm_head" not in tied.modules


@pytest.mark.parametrize("way", ["files", "broadcast"])
def test_server_takes_the_base_once_and_then_adapters(way: str) -> None:
    lm = adapted(lora_alpha=3)
    given = prompts("a", "bcd", "e", "kl")
    own = HFEngine(lambda: lm, TOKENIZER, GenerationConfig(max_new_tokens=6), version=lambda: 0)
    with (
        served(tiny_decoder("llama"), TOKENIZER) as server,
        engine_over(server, lm=lm, weights=way) as remote,
    ):
        assert WeightSource(lambda: lm).sends_adapter_alone(server.sampler.lora)
        loaded: list[str] = []
        load = server.sampler._weights.load

        def watched(update: WeightUpdate, tensors: Any) -> None:
            loaded.append(update.part)
            load(update, tensors)

        server.sampler._weights.load = watched  # pyright: ignore[reportAttributeAccessIssue]
        for version in (3, 4):
            remote._version = lambda version=version: version
            wanted = [rollout.completion for rollout in all_of(own, given, greedy=True)]
            found = all_of(remote, given, greedy=True)
            assert_alike(found, wanted)
            assert {rollout.policy_version for rollout in found} == {version}
            train(lm)
        assert loaded == ["base", "adapter", "adapter"]

"""When a LoRA adapter goes to vLLM by itself, and what goes then."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from transformers import PreTrainedModel

from conch.models.adapter import ADAPTER_NAME, adapter_off, add_adapter, merged_copy
from conch.rollouts import weight_sync as lora_sync
from conch.rollouts.protocol import LoraCapacity
from conch.rollouts.weight_sync import (
    WeightSource,
    adapter_rank,
    adapter_tensors,
    checkpoint_tensors,
    why_always_merged,
    why_unsupported,
)
from tests.tiny import tiny_decoder

LORA = LoraCapacity(rank=8, modules=("q_proj", "k_proj", "v_proj", "up_proj", "dense"))


def adapted(*, family: str = "llama", **settings: Any) -> PreTrainedModel:
    """A model with an adapter on it that is not zero."""
    lm = tiny_decoder(family)
    add_adapter(lm, {"r": 4, "target_modules": ["q_proj", "v_proj"], **settings}, merged_when_saved=False)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    return lm


def why_merged(lm: PreTrainedModel, capacity: LoraCapacity | None) -> str | None:
    """Whatever the reason is."""
    return why_always_merged(lm) or why_unsupported(lm, capacity)


@pytest.fixture(autouse=True)
def _has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter must know its base; that of these models comes from nowhere."""
    monkeypatch.setattr("conch.models.adapter._base_path", lambda _model: "base")


# ------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "r": 8},
        {"target_modules": ["k_proj", "up_proj"], "rank_pattern": {"up_proj": 8}},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.5, "layers_to_transform": [1]},
    ],
)
def test_plain_adapter_goes_alone(settings: dict[str, Any]) -> None:
    assert why_merged(adapted(**settings), LORA) is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "layers.0.self_attn.q_proj adds more than a product (DoraLinearVariant)"),
        ({"family": "qwen2", "lora_bias": True}, "layers.0.self_attn.q_proj has a bias in its adapter"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.modules_to_save.default.weight is trained beside it"),
        ({"target_modules": ["embed_tokens"]}, "model.embed_tokens is a Embedding, no plain linear layer"),
        ({"family": "gpt2", "target_modules": ["c_attn"]}, "h.0.attn.c_attn is a Conv1D, no plain linear"),
        (
            {"target_modules": ["o_proj"]},
            "has no LoRA for model.layers.0.self_attn.o_proj of a Llama",
        ),
        ({"r": 9}, "its rank of 9 is above the server's `max_lora_rank` of 8"),
        ({"rank_pattern": {"v_proj": 16}}, "its rank of 16 is above the server's"),
        ({"r": 513}, "its rank of 513 is above 512, the highest that vLLM"),
    ],
)
def test_adapter_that_vllm_cannot_take_goes_merged(settings: dict[str, Any], reason: str) -> None:
    found = why_merged(adapted(**settings), LORA)
    assert found is not None and reason in found


def test_adapter_goes_merged_where_there_is_no_room() -> None:
    found = why_merged(adapted(), None)
    assert found is not None and "no LoRA for a LlamaForCausalLM, or a server" in found


def test_adapter_goes_merged_where_part_of_the_base_is_trained() -> None:
    lm = adapted()
    lm.get_submodule("model.norm").requires_grad_(True)
    assert why_merged(lm, LORA) == "model.norm.weight is trained beside it"


def test_adapter_that_is_not_what_the_policy_computes_with_goes_merged() -> None:
    lm = adapted()
    with adapter_off(lm):
        assert "switched off" in str(why_merged(lm, LORA))
    lm.get_submodule("model.layers.2.self_attn.v_proj").merge()  # pyright: ignore[reportCallIssue]
    assert "layers.2.self_attn.v_proj has its adapter merged" in str(why_merged(lm, LORA))


def test_adapter_on_a_layer_that_checkpoints_call_otherwise_goes_merged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = adapted()
    renamed = {f"language_model.{name}" for name in checkpoint_tensors(lm)}
    monkeypatch.setattr(lora_sync, "checkpoint_names", lambda _lm: renamed)
    assert "checkpoints have another name for model.layers.0.self_attn.q_proj" in str(why_merged(lm, LORA))


def test_adapter_that_is_switched_off_for_the_reference_still_goes_alone() -> None:
    lm = adapted()
    source = WeightSource(lambda: lm)
    with adapter_off(lm):
        assert source.sends_adapter_alone(LORA)
        assert source.required_lora() is not None


def test_reason_is_said_once_and_only_where_there_is_an_adapter(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        plain = WeightSource(lambda: tiny_decoder("llama"))
        assert not plain.sends_adapter_alone(LORA) and plain.required_lora() is None
        alone = WeightSource(adapted)
        assert alone.sends_adapter_alone(LORA)
        assert alone.required_lora() == LoraCapacity(rank=4, modules=("q_proj", "v_proj"))
        special = WeightSource(lambda: adapted(use_dora=True))
        assert special.required_lora() is None
        assert not caplog.messages
        for _ in range(2):
            assert not special.sends_adapter_alone(None)
        assert not WeightSource(adapted, merge=True).sends_adapter_alone(LORA)
        assert WeightSource(adapted, merge=True).required_lora() is None
    message, of_choice = caplog.messages
    assert "`rollout.merge_adapter` is true" in of_choice
    assert message.startswith(
        "samplers get the policy's weights whole, with the adapter merged in: model.layers.0"
    )


# -------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 12},
        {"lora_alpha": 3, "use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 5}},
    ],
)
def test_product_of_the_factors_is_what_merging_adds(settings: dict[str, Any]) -> None:
    lm = adapted(**settings)
    tensors = adapter_tensors(lm)
    base = checkpoint_tensors(lm, merged=False)
    for name, merged in merged_copy(lm).named_parameters():
        layer = name.removesuffix(".weight")
        found = base[name].double()
        if f"{layer}.lora_A.weight" in tensors:
            first, second = (tensors.pop(f"{layer}.lora_{factor}.weight").double() for factor in "AB")
            found = found + second @ first
        torch.testing.assert_close(found, merged.detach().double(), atol=1e-5, rtol=1e-5)
    assert not tensors


def test_base_is_sent_as_it_is_and_nothing_of_it_copied() -> None:
    lm = adapted()
    tensors = checkpoint_tensors(lm, merged=False)
    plain = tiny_decoder("llama").state_dict()
    assert tensors.keys() == plain.keys() and all(torch.equal(tensors[name], plain[name]) for name in plain)
    owned = {parameter.data_ptr() for parameter in lm.parameters()}
    assert {tensor.data_ptr() for tensor in tensors.values()} <= owned


def test_factors_have_the_names_and_ranks_that_peft_gives_them() -> None:
    lm = adapted(rank_pattern={"q_proj": 7})
    tensors = adapter_tensors(lm)
    saved = get_peft_model_state_dict(lm, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in saved.items()
    }
    assert not any(tensor.requires_grad for tensor in tensors.values())
    capacity = WeightSource(lambda: lm).required_lora()
    assert capacity is not None and adapter_rank(tensors) == 7 == capacity.rank


def test_parts_are_what_they_are_called() -> None:
    lm = adapted()
    source = WeightSource(lambda: lm)
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    base, whole = source.tensors("base"), source.tensors("whole")
    assert base.keys() == whole.keys() and not torch.equal(base[q_proj], whole[q_proj])
    assert source.tensors("adapter").keys() == adapter_tensors(lm).keys()

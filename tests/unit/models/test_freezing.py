"""Recomputed activations change neither loss nor gradients, and sampling keeps its cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from conch.config import GenerationConfig, ModelConfig
from conch.errors import ConfigError, ModelError
from conch.models.forward import ForwardInputs
from conch.models.freezing import checkpoint_activations, freeze_layers, freeze_unreached
from conch.models.loading import load_sequence_classifier
from conch.models.policy import PolicyWithValue
from conch.models.reference import build_reference
from conch.rollouts.hf.engine import HFEngine
from conch.types import Prompt
from tests.odd_families import DECODERS as ODD_DECODERS
from tests.odd_families import ENCODER_DECODERS, gemma3_config, gemma3_model, gemma3_shape, odd_model
from tests.tiny import DECODERS, LANGUAGE_MODELS, char_tokenizer, decoder_shape, tiny_decoder

TOKENIZER = char_tokenizer("abcdefghijklmnopqrstu")
PAD = 21

PARTS: dict[str, dict[str, Any]] = {
    "everything": {},
    "top block": {"num_layers_unfrozen": 1},
    "adapter": {"peft_config": {"r": 2}, "merge_adapter": True},
}


def a_batch() -> ForwardInputs:
    """Rows with 3 and 0 pads on the left."""
    ids = torch.randint(0, PAD, (2, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :3] = False
    return ForwardInputs(ids.masked_fill(~mask, PAD), mask, 4)


def policy_of(family: str, *, num_value_layers: int = 0, **config: Any) -> PolicyWithValue:
    torch.manual_seed(0)
    lm = tiny_decoder(family)
    freeze_layers(lm, ModelConfig(architecture=decoder_shape(family), **config))
    policy = PolicyWithValue(lm, num_value_layers=num_value_layers).double().train()
    torch.manual_seed(1)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return policy


def loss_and_gradients(policy: PolicyWithValue) -> tuple[Tensor, dict[str, Tensor]]:
    output = policy(a_batch())
    loss = output.logits.log_softmax(-1)[..., 0].mean() + (output.values - 1).square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_recomputed_activations_change_neither_loss_nor_gradients(
    family: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, gradients = loss_and_gradients(policy_of(family, **PARTS[part]))
    saver = policy_of(family, **PARTS[part], gradient_checkpointing=True)
    runs = []
    for block in saver.lm.modules():
        if hasattr(block, "_gradient_checkpointing_func"):
            func = block._gradient_checkpointing_func
            monkeypatch.setattr(
                block, "_gradient_checkpointing_func", lambda *a, f=func, **k: (runs.append(1), f(*a, **k))[1]
            )
    loss, recomputed = loss_and_gradients(saver)

    assert runs, "no block was checkpointed"
    torch.testing.assert_close(loss, plain, rtol=0, atol=1e-12)
    assert recomputed.keys() == gradients.keys() != set()
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_value_branch_learns_the_same_with_recomputed_activations(family: str) -> None:
    plain, gradients = loss_and_gradients(policy_of(family, num_value_layers=2))
    loss, recomputed = loss_and_gradients(policy_of(family, num_value_layers=2, gradient_checkpointing=True))

    torch.testing.assert_close(loss, plain, rtol=0, atol=1e-12)
    assert recomputed.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=1e-12)


def test_blocks_are_computed_again_in_the_backward_pass() -> None:
    policy = policy_of("llama", gradient_checkpointing=True)
    runs = []
    policy.lm.model.layers[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    loss_and_gradients(policy)

    assert len(runs) == 2


def test_backward_pass_ends_at_a_frozen_trunk() -> None:
    policy = policy_of("llama", num_layers_unfrozen=1, gradient_checkpointing=True)
    runs = []
    policy.lm.model.layers[1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    loss_and_gradients(policy)

    assert len(runs) == 1, "a frozen block was computed again"


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_sampling_keeps_its_cache(family: str, caplog: pytest.LogCaptureFixture) -> None:
    lm = tiny_decoder(family)
    plain = copy.deepcopy(lm)
    checkpoint_activations(lm)
    widths = []
    lm.register_forward_pre_hook(
        lambda _module, _args, kwargs: widths.append(
            kwargs["decoder_input_ids" if family == "t5" else "input_ids"].shape[1]
        ),
        with_kwargs=True,
    )
    config = GenerationConfig(max_new_tokens=5)
    prompts = [Prompt("abc", (0, 1, 2)), Prompt("d", (3,))]
    samples = []
    for model in (plain, lm.train()):
        torch.manual_seed(4)
        engine = HFEngine(lambda model=model: model, TOKENIZER, config, version=lambda: 0)
        samples.append(list(engine.generate(prompts)))

    assert samples[0] == samples[1]
    read = widths[3:] if family in DECODERS else widths  # in three passes a decoder is tried out
    assert len(read) > 1 and set(read[1:]) == {1}, "each step after the first reads one token"
    assert not caplog.records


@torch.no_grad()
def test_reference_is_exact_beside_recomputed_activations() -> None:
    for config in PARTS.values():
        policy = policy_of("llama", **config, gradient_checkpointing=True)
        reference = build_reference(policy.lm, config.get("num_layers_unfrozen", -1))
        if "peft_config" in config:
            for name, parameter in policy.lm.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        with reference.recording():
            output = policy(a_batch())
        assert torch.equal(reference.logits(a_batch()), output.logits)


@pytest.mark.parametrize(
    ("part", "trained"), [("top block", {"model.layers.2", "score"}), ("everything", None)]
)
def test_head_of_a_classifier_always_trains(part: str, trained: set[str] | None) -> None:
    config = ModelConfig(architecture=decoder_shape("llama"), **PARTS[part])
    model = load_sequence_classifier(config, num_labels=1, pad_token_id=PAD)
    freeze_layers(model, config)
    names = {name for name, p in model.named_parameters() if p.requires_grad}

    assert "score.weight" in names
    if trained is not None:
        assert all(name.startswith(tuple(trained)) for name in names)


def test_architecture_without_checkpoints_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_decoder("gpt2")
    monkeypatch.setattr(type(lm), "supports_gradient_checkpointing", False)

    with pytest.raises(ConfigError, match="GPT2LMHeadModel does not support it"):
        checkpoint_activations(lm)


def test_checkpoints_are_not_reentrant() -> None:
    policy = policy_of("gpt2", gradient_checkpointing=True)
    functions = {
        m._gradient_checkpointing_func
        for m in policy.lm.modules()
        if hasattr(m, "_gradient_checkpointing_func")
    }

    assert {(f.func, f.keywords["use_reentrant"]) for f in functions} == {(checkpoint.checkpoint, False)}


# --------------------------------------------------------------------------------- what no text reaches


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_parts_that_no_text_reaches_are_frozen_and_named(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="conch")
    torch.manual_seed(0)
    model = kind.from_config(gemma3_config()).train()
    assert freeze_unreached(model) == ["model.vision_tower", "model.multi_modal_projector"]
    assert "no text reaches model.vision_tower, model.multi_modal_projector of Gemma3" in caplog.text
    assert model.training
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, "DDP would wait for these"


def test_an_adapter_trains_where_text_reaches_it_alone() -> None:
    lm = gemma3_model()
    peft_config = {"r": 2, "target_modules": "all-linear"}
    freeze_layers(lm, ModelConfig(architecture=gemma3_shape(), peft_config=peft_config, merge_adapter=True))
    names = freeze_unreached(lm)
    assert names and all("vision_tower" in name or "multi_modal_projector" in name for name in names)
    assert all("language_model" in name for name, p in lm.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("family", [*ODD_DECODERS, *ENCODER_DECODERS])
def test_all_of_a_model_of_texts_trains(family: str) -> None:
    """Experts as well, also those that a few tokens do not choose."""
    lm = odd_model(family)
    trained = [name for name, p in lm.named_parameters() if p.requires_grad]
    assert freeze_unreached(lm) == []
    assert [name for name, p in lm.named_parameters() if p.requires_grad] == trained
    assert all(p.grad is None for p in lm.parameters())


def test_a_model_that_cannot_learn_of_text_is_refused() -> None:
    lm = tiny_decoder("gpt2")
    lm.transformer.h[0].mlp.c_fc.weight.data = torch.zeros(3, 5)
    with pytest.raises(
        ModelError, match=r"GPT2LMHeadModel cannot be trained on text, .* fails: RuntimeError"
    ):
        freeze_unreached(lm)

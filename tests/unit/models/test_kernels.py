"""Kernels that are installed apart: refused before anything is loaded where they cannot be used."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from conch.config import ModelConfig
from conch.errors import ConfigError
from conch.models import kernels
from conch.models.kernels import check_kernels
from conch.models.loading import load_lm, load_sequence_classifier
from conch.rollouts.hf.continuous_batching import pad_left
from conch.training.setup import load_policy
from tests.runs import PROMPTS, grpo_trainer, ilql_trainer, policy, ppo_trainer, reward_trainer, sft_trainer
from tests.tiny import decoder_shape, tiny_decoder
from tests.varlen import NAME, reference_kernels

SCORED = [{"text": "abc", "score": 0.5}, {"text": "h", "score": -1.0}]
FLASH = ("flash_attention_2", "flash_attention_3")


def config(family: str = "gpt2", **settings: Any) -> ModelConfig:
    return ModelConfig(architecture=decoder_shape(family), **settings)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """As if exactly these modules could be imported, and a GPU were there."""

    def install(*names: str, gpu: bool = True) -> None:
        monkeypatch.setattr(kernels, "find_spec", lambda name: name if name in names else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)

    return install


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch, installed: Any) -> list[tuple[Any, dict[str, Any]]]:
    """A package in Liger's place, which knows Llama only; what it was asked to do."""
    asked: list[tuple[Any, dict[str, Any]]] = []
    names = ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    package, table = sys.modules[names[1]], sys.modules[names[2]]
    package.monkey_patch = table  # pyright: ignore[reportAttributeAccessIssue]
    table.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None, "opt": None}  # pyright: ignore[reportAttributeAccessIssue]

    def apply(model: PreTrainedModel, **settings: Any) -> None:
        if model.config.model_type == "opt":
            raise TypeError("no OPT")
        asked.append((model, settings))

    package._apply_liger_kernel_to_instance = apply  # pyright: ignore[reportAttributeAccessIssue]
    installed("liger_kernel")
    return asked


# -------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("attention", [None, "sdpa", "eager"])
@pytest.mark.parametrize("load", ["lm", "classifier"])
def test_models_are_loaded_with_the_attention_that_is_asked_for(attention: Any, load: str) -> None:
    wanted = config(attention=attention)
    check_kernels(wanted, "no")
    model = (
        load_lm(wanted) if load == "lm" else load_sequence_classifier(wanted, num_labels=1, pad_token_id=21)
    )
    assert model.config._attn_implementation == (attention or "sdpa")


@pytest.mark.parametrize("attention", [None, "eager"])
def test_checkpoints_are_loaded_with_it_and_keep_no_trace_of_it(tmp_path: Path, attention: Any) -> None:
    """What serves or converts a model trained with other kernels loads it as ever."""
    load_lm(config(attention="eager")).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert not [key for key in saved if "attn_implementation" in key]
    model = load_lm(ModelConfig(path=str(tmp_path), attention=attention))
    assert model.config._attn_implementation == (attention or "sdpa")


def test_classes_that_fix_their_attention_are_made_with_the_one_asked_for() -> None:
    with reference_kernels():
        lm = load_lm(config("gptj").model_copy(update={"attention": NAME}))
    assert type(lm.transformer.h[0].attn).__name__ == "GPTJFlashAttention2"


def test_models_that_know_no_sdpa_are_loaded_as_ever_unless_it_is_asked_for() -> None:
    shape = {"model_type": "bloom", "vocab_size": 24, "hidden_size": 32, "n_layer": 2, "n_head": 2}
    assert load_lm(ModelConfig(architecture=shape)).config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match=r"`model.attention=sdpa`: BloomForCausalLM does not support it"):
        load_lm(ModelConfig(architecture=shape, attention="sdpa"))


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("attention", FLASH)
def test_models_that_know_no_flash_attention_are_refused(tmp_path: Path, attention: Any, saved: bool) -> None:
    shape = {"model_type": "bloom", "vocab_size": 24, "hidden_size": 32, "n_layer": 2, "n_head": 2}
    source: dict[str, Any] = {"architecture": shape}
    if saved:
        # Nothing of the weights is read before.
        AutoConfig.for_model(**shape, architectures=["BloomForCausalLM"]).save_pretrained(tmp_path)
        source = {"path": str(tmp_path)}
    message = rf"`model.attention={attention}`: BloomForCausalLM does not support it; leave it out"
    with pytest.raises(ConfigError, match=message):
        load_lm(ModelConfig(**source, attention=attention))
    with pytest.raises(ConfigError, match="BloomForSequenceClassification does not support it"):
        load_sequence_classifier(ModelConfig(**source, attention=attention), num_labels=1, pad_token_id=21)


@pytest.mark.parametrize(
    ("attention", "package"),
    [
        ("flash_attention_2", r"flash-attn \(`pip install flash-attn"),
        ("flash_attention_3", "folder `hopper`"),
    ],
)
def test_flash_attention_that_is_not_installed_is_refused(
    installed: Any, attention: Any, package: str
) -> None:
    installed("flash_attn" if attention == "flash_attention_3" else "flash_attn_interface")
    with pytest.raises(ConfigError, match=rf"`model.attention={attention}` needs the package .*{package}"):
        check_kernels(config(attention=attention, dtype="bfloat16"), "no")


@pytest.mark.parametrize(
    "names", [("flash_attn", "flash_attn_interface"), ("kernels",)], ids=["packages", "kernels of the hub"]
)
@pytest.mark.parametrize("attention", FLASH)
def test_flash_attention_takes_half_precision_of_weights_or_training(
    installed: Any, attention: Any, names: tuple[str, ...]
) -> None:
    installed(*names)
    check_kernels(config(attention=attention, dtype="bfloat16"), "no")
    check_kernels(config(attention=attention, dtype="float16"), "no")
    check_kernels(config(attention=attention), "bf16")
    with pytest.raises(
        ConfigError, match=r"weights are in float32.*`train.mixed_precision=bf16`, or, .* `model.dtype"
    ):
        check_kernels(config(attention=attention), "no")


@pytest.mark.parametrize("settings", [{"attention": FLASH[0]}, {"attention": FLASH[1]}, {"liger": True}])
def test_kernels_of_a_gpu_are_refused_without_one(installed: Any, settings: dict[str, Any]) -> None:
    installed("flash_attn", "flash_attn_interface", "liger_kernel", gpu=False)
    with pytest.raises(ConfigError, match=r"`model\..*` needs a CUDA GPU, and torch sees none here"):
        check_kernels(config(dtype="bfloat16", **settings), "no")


def test_a_given_model_gets_the_attention_that_is_asked_for() -> None:
    lm = load_policy(policy(), config(attention="eager"), "no")
    assert lm.config._attn_implementation == "eager"
    assert load_policy(lm, config(), "no").config._attn_implementation == "eager", "as it was given"
    with pytest.raises(ConfigError, match=r"`model.attention=sdpa`: GPTJForCausalLM does not support it"):
        load_policy(tiny_decoder("gptj"), config(attention="sdpa"), "no")


def test_a_given_model_whose_class_fixes_its_attention_is_refused(installed: Any) -> None:
    installed("flash_attn")
    with pytest.raises(
        ConfigError, match=r"loaded GPTJForCausalLM cannot change its attention; load it with"
    ):
        load_policy(tiny_decoder("gptj"), config(attention="flash_attention_2"), "bf16")


def test_a_given_model_is_asked_for_its_own_precision(installed: Any) -> None:
    installed("flash_attn")
    lm = policy(dtype=torch.float32)
    lm.config._attn_implementation = FLASH[0]
    with pytest.raises(
        ConfigError,
        match=r"the given model's attention, flash_attention_2,.*in float32.*load the model in bfloat16",
    ):
        load_policy(lm, config(dtype="bfloat16"), "no")
    assert load_policy(lm.bfloat16(), config(), "no") is lm


@pytest.mark.parametrize(
    "make",
    [
        lambda folder, **settings: ppo_trainer(folder, **settings),
        lambda folder, **settings: grpo_trainer(folder, **settings),
        lambda folder, **settings: sft_trainer(folder, PROMPTS, **settings),
        lambda folder, **settings: ilql_trainer(folder, PROMPTS, [0.0] * len(PROMPTS), **settings),
        lambda folder, **settings: reward_trainer(folder, SCORED, **settings),
    ],
    ids=["ppo", "grpo", "sft", "ilql", "reward model"],
)
def test_trainers_refuse_before_they_begin(tmp_path: Path, installed: Any, make: Any) -> None:
    """The precision is that of accelerate, which no config names here."""
    installed("flash_attn", gpu=False)
    with pytest.raises(ConfigError, match=r"`model.attention=flash_attention_2` needs a CUDA GPU"):
        make(tmp_path / "run", model={"attention": "flash_attention_2"})
    assert not (tmp_path / "run").exists()


@torch.no_grad()
def test_sampling_by_attention_of_lengths_goes_through_transformers(tmp_path: Path) -> None:
    """The masks of slots are of a form that it does not take."""
    with reference_kernels():
        lm = policy()
        prompts = [prompt.token_ids for prompt in ppo_trainer(tmp_path / "a", lm=lm).prompts]
        ids, mask = pad_left(prompts, 8, lm.device)
        expected = lm.generate(
            ids, attention_mask=mask.long(), max_new_tokens=5, do_sample=False, pad_token_id=8
        )
        lm.set_attn_implementation(NAME)
        trainer = ppo_trainer(tmp_path / "b", lm=lm)
        [made] = list(trainer.sampler.generate(trainer.prompts, greedy=True))
    for rollout, row in zip(made, expected[:, ids.shape[1] :].tolist(), strict=True):
        assert row[: len(rollout.completion.token_ids)] == list(rollout.completion.token_ids)


# ------------------------------------------------------------------------------------------------------ Liger


def test_liger_that_is_not_installed_is_refused(installed: Any) -> None:
    installed()
    with pytest.raises(ConfigError, match=r"`model.liger` needs the package liger-kernel: `pip install"):
        check_kernels(config("llama", liger=True), "no")


def test_liger_gets_the_model_and_leaves_the_loss_alone(liger: Any, tmp_path: Path) -> None:
    nothing = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    wanted = config("llama", liger=True)
    lm = load_policy(None, wanted, "no")
    given = load_policy(tiny_decoder("llama"), wanted, "no")
    lm.save_pretrained(tmp_path)
    classifier = load_sequence_classifier(
        ModelConfig(path=str(tmp_path), liger=True), num_labels=1, pad_token_id=21
    )
    assert [(id(model), settings) for model, settings in liger] == [
        (id(model), nothing) for model in (lm, given, classifier)
    ]


def test_models_that_liger_does_not_know_are_refused(liger: Any, tmp_path: Path) -> None:
    message = r"Liger has no kernels for the model type gpt2; turn it off \(it has some for llama, opt\)"
    with pytest.raises(ConfigError, match=message):
        load_lm(config("gpt2", liger=True))
    with pytest.raises(ConfigError, match=message):
        load_policy(policy(), config("llama", liger=True), "no")
    with pytest.raises(
        ConfigError, match=r"cannot put its kernels into a OPTForCausalLM \(no OPT\): turn it off"
    ):
        load_lm(config("opt", liger=True))
    AutoModelForCausalLM.from_config(policy().config).config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="model type gpt2"):  # before the weights, of which there are none
        load_lm(ModelConfig(path=str(tmp_path), liger=True))

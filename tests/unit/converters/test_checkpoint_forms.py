"""Checkpoints in forms of other people's: what is read, and from where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conch.converters.checkpoints.files import find_source
from conch.converters.checkpoints.kinds import recognise
from conch.converters.checkpoints.reader import RewardCheckpoint, read_checkpoint
from conch.converters.options import ReadOptions
from conch.converters.parity.inputs import inputs_of
from conch.converters.parity.readings import refuse_lost_separators
from conch.converters.recipes import with_recipe
from conch.errors import ConversionError
from tests.chats import chat_reward_model, chat_tokenizer
from tests.checkpoints import config_of, process_reward, random_model

PLUS_MINUS = ("id:3", "id:4")


def edited(folder: Path, **changes: Any) -> Path:
    """Changes in config.json; None takes a key out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_tensors(folder: Path, head: dict[str, torch.Tensor]) -> Path:
    """The chat classifier of the folder with another head."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["score.weight"]
    save_file({**tensors, **head}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def read(folder: Path | str, **options: Any) -> RewardCheckpoint:
    return read_checkpoint(str(folder), ReadOptions(**options))


def language_model(folder: Path, family: str) -> Path:
    tokenizer = chat_tokenizer("llama")
    shape = config_of(family)
    shape.vocab_size, shape.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    random_model(AutoModelForCausalLM, shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "head",
    [
        {"score.0.weight": torch.ones(8, 32), "score.2.weight": torch.ones(1, 8)},
        {"score.1.weight": torch.ones(1, 32)},
        {"score.weight": torch.ones(1, 32), "score.bias": torch.ones(1)},
        {"classifier.weight": torch.ones(1, 32)},
    ],
    ids=lambda head: "+".join(head),
)
def test_a_head_of_another_form_than_the_named_class_has_is_found(tmp_path: Path, head: Any) -> None:
    chat_reward_model(tmp_path, "llama")
    kind = recognise(find_source(str(with_tensors(tmp_path, head))), ReadOptions())
    assert kind.name == "head" and kind.outputs == 1
    assert kind.head == tuple(name.removesuffix(".weight") for name in head if name.endswith(".weight"))


def test_one_file_of_several_is_the_one_that_is_read(tmp_path: Path) -> None:
    chat_reward_model(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    other = {**tensors, "score.weight": tensors["score.weight"] * 2}
    save_file(other, tmp_path / "best.safetensors", metadata={"format": "pt"})
    checkpoint = read(tmp_path / "best.safetensors")
    assert checkpoint.head is not None
    assert torch.equal(checkpoint.head.layers[0].weight, other["score.weight"])


def test_a_base_model_does_not_replace_the_checkpoints_own_configuration(tmp_path: Path) -> None:
    chat_reward_model(tmp_path / "base", "llama")
    chat_reward_model(tmp_path / "own", "llama")
    own = edited(tmp_path / "own", architectures=["LlamaForReward"], rms_norm_eps=0.01)
    with_tensors(own, {"reward_head.weight": torch.ones(1, 32)})
    assert read(own, base_model=str(tmp_path / "base")).model.config.rms_norm_eps == 0.01


def test_an_unknown_type_on_a_base_model_keeps_what_it_says_of_its_score(tmp_path: Path) -> None:
    chat_reward_model(tmp_path / "base", "llama")
    chat_reward_model(tmp_path / "own", "llama")
    said = {"mean": 0.5, "std": 2.0, "normalize_reward": True, "reward_token_id": 5}
    own = edited(tmp_path / "own", model_type="reward_model", architectures=["RewardModel"], **said)
    with_tensors(own, {"reward_head.weight": torch.ones(1, 32)})
    rules = read(own, base_model=str(tmp_path / "base")).rules
    assert (rules.mean, rules.std, rules.normalise, rules.closing_token_id) == ((0.5,), (2.0,), True, 5)


@pytest.mark.parametrize("steps", [False, True])
def test_of_two_score_tokens_the_first_is_the_reward(tmp_path: Path, steps: bool) -> None:
    language_model(tmp_path, "llama")
    separator = {"step_separator": "a"} if steps else {}
    rules = read(tmp_path, score_tokens=PLUS_MINUS, **separator).rules
    assert (rules.columns, rules.function_to_apply) == ((0,), "softmax")


@pytest.mark.parametrize(
    ("tokens", "family", "expected"),
    [
        (("id:3",), "gemma2", "more of its logits than its head gives"),
        (("id:99999",), "llama", "99999 of --score_tokens is no row of its head"),
    ],
)
def test_logits_that_are_no_rows_of_the_head_are_refused(
    tmp_path: Path, tokens: tuple[str, ...], family: str, expected: str
) -> None:
    language_model(tmp_path, family)
    with pytest.raises(ConversionError, match=expected):
        read(tmp_path, score_tokens=tokens)


@pytest.mark.parametrize("option", [{"head_activation": "relu"}])
def test_an_option_without_a_place_is_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    chat_reward_model(tmp_path, "llama")
    with pytest.raises(ConversionError, match="has no place: leave it out"):
        read(tmp_path, **option)


def test_a_choice_drops_what_a_recipe_says_with_the_other_choice() -> None:
    assert "pooling_token" not in with_recipe({"recipe": "athene-rm", "pooling": "last_token"})
    settings = with_recipe({"recipe": "qwen2.5-math-prm", "granularity": "token"})
    assert not {"step_separator", "step_delimiter"} & set(settings)


# ----------------------------------------------------------------------------------------- steps of dialogues


def steps_of(checkpoint: RewardCheckpoint, answer: str) -> list[str]:
    """The texts that end at the places where steps are read."""
    messages = [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": answer}]
    inputs: Any = inputs_of(checkpoint)
    sample = inputs.sample_of(messages)
    return [checkpoint.tokenizer.decode(list(sample.ids[: place + 1]))[-8:] for place in sample.separators]


def chat_process_reward(folder: Path, template: str) -> Path:
    tokenizer = chat_tokenizer("llama")
    tokenizer.chat_template = template
    process_reward(folder, "llama", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    tokenizer.save_pretrained(folder)
    return folder


TURNS = "{% for message in messages %}{{ message.role }}\n\n{{ message.content CUT}}<|eot_id|>{% endfor %}"


def test_newlines_before_an_answer_end_no_step(tmp_path: Path) -> None:
    folder = chat_process_reward(tmp_path, TURNS.replace("CUT", ""))
    checkpoint = read(folder, step_separator="\n", add_special_tokens="never")
    assert [step[-3:] for step in steps_of(checkpoint, "one\ntwo")] == ["ne\n", "wo\n"]


def test_a_template_that_takes_the_closing_separator_off_is_refused(tmp_path: Path) -> None:
    folder = chat_process_reward(tmp_path, TURNS.replace("CUT", "| trim "))
    with pytest.raises(ConversionError, match=r"of 3 separators .* 2 are found among its tokens"):
        refuse_lost_separators(read(folder, step_separator="\n", add_special_tokens="never"))
    whole = chat_process_reward(tmp_path / "whole", TURNS.replace("CUT", ""))
    refuse_lost_separators(read(whole, step_separator="\n", add_special_tokens="never"))

"""Where a checkpoint can be read in two ways that score otherwise, a conversion stops and shows both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from conch.converters.checkpoints.reader import read_checkpoint
from conch.converters.options import ReadOptions
from conch.converters.parity.readings import refuse_two_readings
from conch.errors import ConversionError
from tests.chats import chat_reward_model
from tests.checkpoints import classifier, process_reward, tokenizer_for


def with_head(folder: Path, head: dict[str, torch.Tensor], **config: Any) -> Path:
    """A Llama trunk with a head that is no class of transformers."""
    chat_reward_model(folder, "llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["score.weight"]
    save_file({**tensors, **head}, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"architectures": ["LlamaForReward"], **config}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def row(outputs: int, width: int = 32) -> torch.Tensor:
    return torch.randn(outputs, width, generator=torch.Generator().manual_seed(outputs))


def check(folder: Path, **options: Any) -> None:
    refuse_two_readings(read_checkpoint(str(folder), ReadOptions(**options)))


def test_a_value_head_in_a_folder_may_be_read_at_two_places_and_one_must_be_named(tmp_path: Path) -> None:
    folder = with_head(tmp_path, {"v_head.weight": row(1)})
    with pytest.raises(ConversionError, match="nothing in the checkpoint says its pooling") as raised:
        check(folder)
    told = str(raised.value)
    assert "--pooling last_token" in told and "--pooling first_eos" in told and "What is two and two?" in told
    check(folder, pooling="last_token")


def test_a_head_of_another_name_is_read_at_the_last_token(tmp_path: Path) -> None:
    check(with_head(tmp_path, {"regression_head.weight": row(1)}))


def test_what_stands_between_two_layers_must_be_said(tmp_path: Path) -> None:
    folder = with_head(tmp_path, {"score.0.weight": row(32), "score.2.weight": row(1)})
    with pytest.raises(ConversionError, match="nothing in the checkpoint says its head_activation") as raised:
        check(folder)
    assert all(
        f"--head_activation {name}" in str(raised.value) for name in ("relu", "gelu", "silu", "tanh", "selu")
    )
    check(folder, head_activation="relu")


def test_a_bos_that_the_tokenizer_adds_and_the_template_does_not_write_must_be_said(tmp_path: Path) -> None:
    chat_reward_model(tmp_path, "llama")
    template = tmp_path / "chat_template.jinja"
    text = template.read_text()
    assert "bos_token" in text
    check(tmp_path)  # the template writes it: one bos either way
    template.write_text(text.replace("{{ bos_token }}", "").replace("{{- bos_token }}", ""))
    with pytest.raises(ConversionError, match="nothing in the checkpoint says its add_special_tokens"):
        check(tmp_path)
    check(tmp_path, add_special_tokens="once")


def test_whether_one_output_of_a_step_is_a_score_or_a_logit_must_be_said(tmp_path: Path) -> None:
    process_reward(tmp_path, "llama", num_labels=1)
    with pytest.raises(
        ConversionError, match="nothing in the checkpoint says its function_to_apply"
    ) as raised:
        check(tmp_path, step_separator=";")
    assert all(f"--function_to_apply {name}" in str(raised.value) for name in ("none", "sigmoid"))
    check(tmp_path, step_separator=";", function_to_apply="sigmoid")


def test_whether_an_encoder_reads_texts_or_pairs_must_be_said(tmp_path: Path) -> None:
    classifier(tmp_path, "bert")
    tokenizer = tokenizer_for("bert")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="a $A b", pair="a $A b $B:1 b:1", special_tokens=[("a", 0), ("b", 1)]
    )
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="nothing in the checkpoint says its template") as raised:
        check(tmp_path)
    assert "--template '{text}'" in str(raised.value) and "--template pair" in str(raised.value)
    check(tmp_path, template="{text}")
    check(tmp_path, template="pair")


def test_an_encoder_of_several_outputs_reads_texts(tmp_path: Path) -> None:
    classifier(tmp_path, "bert", num_labels=2)
    check(tmp_path)

"""Replicas of reward models that are classifiers of transformers: chats, texts and sentence pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.integration.reward_models import templates
from tests.integration.reward_models.classifiers import (
    classifier,
    stripped,
)
from tests.integration.reward_models.parts import byte_level, pieces
from tests.integration.reward_models.replica import Pipeline, Replica

# ------------------------------------------------------------------------------------------------- tokenizers

_LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def llama_3(*more: str, eos: str = "<|eot_id|>", template: str = templates.LLAMA_3, **named: Any) -> Any:
    """Llama 3's tokenizer, which opens a text with the bos and has no pad token unless it is named."""
    return byte_level(
        (*_LLAMA_3, "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>", *more),
        frame="<|begin_of_text|> $A",
        words=("\n\n",),
        bos_token="<|begin_of_text|>",
        eos_token=eos,
        chat_template=template,
        **named,
    )


def qwen(template: str, *more: str) -> Any:
    """Qwen's tokenizer, which adds nothing to a text."""
    return byte_level(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *more),
        words=("\n\n",),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
    )


def gemma() -> Any:
    """Gemma's tokenizer, which opens a text with the bos."""
    return pieces(
        ("<pad>", "<eos>", "<bos>", "<unk>"),
        more=("<start_of_turn>", "<end_of_turn>"),
        frame="<bos> $A",
        opens=False,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=templates.GEMMA,
    )


def sentencepiece(template: str | None, *more: str, frame: str = "<s> $A", **named: Any) -> Any:
    """Llama 2's and Mistral's tokenizer, which opens a text with the bos and has no pad token."""
    return pieces(
        more=more,
        frame=frame,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=template,
        **named,
    )


# ------------------------------------------------------------------------------------------------------ chats


def _skywork_llama(folder: Path) -> Pipeline:
    tokenizer = llama_3("[PAD]", template=templates.LLAMA_31, pad_token="[PAD]")
    return classifier(folder, "llama", tokenizer, stripped, seed=1, shards=2)


def _skywork_llama_32(folder: Path) -> Pipeline:
    tokenizer = llama_3(template=templates.LLAMA_32, pad_token="<|finetune_right_pad_id|>")
    return classifier(folder, "llama", tokenizer, stripped, seed=2, tie_word_embeddings=True)


def _skywork_qwen_3(folder: Path) -> Pipeline:
    tokenizer = qwen(templates.QWEN_3, "<think>", "</think>")
    return classifier(folder, "qwen3", tokenizer, stripped, seed=3)


CHATS: tuple[Replica, ...] = (
    Replica(
        "Skywork-Reward Llama-3.1",
        _skywork_llama,
        source="reward-bench rewardbench/rewardbench.py; card of Skywork-Reward-Llama-3.1-8B-v0.2",
    ),
    Replica(
        "Skywork-Reward-V2 Llama-3.2",
        _skywork_llama_32,
        source="card of Skywork-Reward-V2-Llama-3.2-3B; template of Llama 3.2",
    ),
    Replica("Skywork-Reward-V2 Qwen3", _skywork_qwen_3, source="card of Skywork-Reward-V2-Qwen3-8B"),
)

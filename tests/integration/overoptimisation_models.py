"""Tiny models and instructions of a study of overoptimisation, as its users have them on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from tests.checkpoints import byte_tokenizer

WINDOW = 320
INSTRUCTIONS = [
    {"instruction": f"Name {number} fruits.", "input": "Only red ones." if number % 2 else ""}
    for number in range(1, 25)
]


def policy(folder: Path) -> Path:
    """A random language model of bytes."""
    torch.manual_seed(0)
    GPT2LMHeadModel(_shape()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def reward_model(folder: Path, seed: int, *, num_labels: int = 1) -> Path:
    """A random reward model of bytes, whose scores differ from text to text."""
    torch.manual_seed(seed)
    model = GPT2ForSequenceClassification(_shape(num_labels=num_labels))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def instructions(file: Path) -> Path:
    """Rows as AlpacaFarm's."""
    file.write_text("".join(json.dumps(row) + "\n" for row in INSTRUCTIONS))
    return file


def _shape(**more: Any) -> GPT2Config:
    tokenizer = byte_tokenizer()
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_layer=1,
        n_embd=16,
        n_head=2,
        n_positions=WINDOW,
        bos_token_id=None,
        **special,
        **more,
    )

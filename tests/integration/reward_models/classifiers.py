"""Replicas that are a ...ForSequenceClassification of transformers, and how cards make their input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.integration.reward_models.parts import (
    config_of,
    save_config,
    save_tensors,
    save_tokenizer,
    scattered,
)
from tests.integration.reward_models.replica import Messages

Encode = Callable[[Any, Messages], dict[str, list[int]]]
"""Tokenizer and dialogue -> what the model reads, by name."""


@dataclass(frozen=True)
class Card:
    """A pipeline in its two steps: encode a dialogue, score what came of it."""

    tokenizer: Any
    encode: Encode
    score: Callable[[dict[str, list[int]]], list[float]]

    def __call__(self, messages: Messages) -> list[float]:
        return self.score(self.encode(self.tokenizer, messages))

    def text(self, messages: Messages) -> str:
        """Return what the model reads of a dialogue, special tokens and all."""
        return self.tokenizer.decode(self.encode(self.tokenizer, messages)["input_ids"])


def by_template(tokenizer: Any, messages: Messages) -> dict[str, list[int]]:
    """`apply_chat_template` that makes the tokens as well: only the template writes special tokens."""
    return {"input_ids": tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)}


def stripped(tokenizer: Any, messages: Messages) -> dict[str, list[int]]:
    """RewardBench: every bos is taken out of the rendered text, and the tokenizer adds its own."""
    text = rendered(tokenizer, messages)
    return tokenized(tokenizer, text.replace(tokenizer.bos_token, "") if tokenizer.bos_token else text)


def doubled(tokenizer: Any, messages: Messages) -> dict[str, list[int]]:
    """The rendered text is tokenised like any other: what the template wrote may stand there twice."""
    return tokenized(tokenizer, rendered(tokenizer, messages))


def rendered(tokenizer: Any, messages: Messages) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False)


def tokenized(tokenizer: Any, text: str) -> dict[str, list[int]]:
    """`tokenizer(text)`, without token types as RewardBench asks."""
    return {"input_ids": tokenizer(text).input_ids}


def paired(tokenizer: Any, messages: Messages) -> dict[str, list[int]]:
    """The prompt's contents and the answer, as two sentences."""
    prompt = "\n".join(message["content"] for message in messages[:-1])
    return dict(tokenizer(prompt, messages[-1]["content"]))


def classifier(
    folder: Path,
    family: str,
    tokenizer: Any,
    encode: Encode = by_template,
    *,
    seed: int = 0,
    keys: dict[str, Any] | None = None,
    pad_as_rewardbench: bool = False,
    shards: int = 1,
    **config: Any,
) -> Card:
    """Write a classifier of this family in bfloat16, and return its pipeline.

    keys: of config.json, as published; None takes one out.
    pad_as_rewardbench: take the tokenizer's pad token where config.json has none, and its eos where the
        tokenizer has none either.
    config: settings of the model.
    """
    settings = config_of(family, tokenizer, **{"num_labels": 1, **config})
    model = scattered(AutoModelForSequenceClassification.from_config(settings), seed=seed)
    labels = {index: f"LABEL_{index}" for index in range(settings.num_labels)}
    published = {
        "architectures": [type(model).__name__],
        "id2label": labels,
        "label2id": {label: index for index, label in labels.items()},
        "torch_dtype": "bfloat16",
        "dtype": None,
        "transformers_version": "4.45.1",
    }
    save_config(folder, settings, **published, **(keys or {}))
    save_tensors(folder, model.state_dict(), shards=shards)
    save_tokenizer(folder, tokenizer)
    return card_of(folder, encode, pad_as_rewardbench=pad_as_rewardbench)


def card_of(folder: Path, encode: Encode, *, pad_as_rewardbench: bool = False) -> Card:
    """What a card of a sequence classifier does: load both, encode, read the logits."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    if pad_as_rewardbench:
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token_id = tokenizer.eos_token_id
        model.config.pad_token_id = tokenizer.pad_token_id

    def score(inputs: dict[str, list[int]]) -> list[float]:
        with torch.no_grad():
            return model(**{name: torch.tensor([ids]) for name, ids in inputs.items()}).logits[0].tolist()

    return Card(tokenizer, encode, score)

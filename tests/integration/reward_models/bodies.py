"""Replicas that are a trunk and a head of their own: how they are written, and how cards read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from tests.integration.reward_models.classifiers import Card, Encode
from tests.integration.reward_models.parts import (
    config_of,
    named_tensors,
    save_config,
    save_tensors,
    save_tokenizer,
    scattered,
)

Place = Callable[[list[int]], int]
"""Token ids of a dialogue -> the position whose state is read."""

WIDTH = 32


def last(ids: list[int]) -> int:
    return len(ids) - 1


def first_of(token_id: int) -> Place:
    """The first such token."""
    return lambda ids: ids.index(token_id)


def last_of(token_id: int) -> Place:
    """The last such token."""
    return lambda ids: len(ids) - 1 - ids[::-1].index(token_id)


@dataclass(frozen=True)
class Body:
    """A random trunk and a random head, as they are in memory."""

    trunk: Any
    head: nn.Module
    tokenizer: Any

    def tensors(self, trunk: str, head: str) -> dict[str, Tensor]:
        """Return all tensors, these prefixes before their names."""
        return {**named_tensors(trunk, self.trunk), **named_tensors(head, self.head)}

    def publish(
        self,
        folder: Path,
        tensors: dict[str, Tensor],
        architecture: str,
        *,
        keys: dict[str, Any] | None = None,
        shards: int = 1,
        pickled: bool = False,
    ) -> None:
        """Write weights in bfloat16, config.json and tokenizer.

        keys: of config.json, over those of the trunk; None takes one out.
        """
        common = {"architectures": [architecture], "torch_dtype": "bfloat16", "dtype": None}
        save_config(folder, self.trunk.config, **common, **(keys or {}))
        save_tensors(folder, tensors, shards=shards, pickled=pickled)
        save_tokenizer(folder, self.tokenizer)

    def pipeline(
        self,
        folder: Path,
        encode: Encode,
        place: Place = last,
        finish: Callable[[Tensor], Tensor] = lambda scores: scores,
    ) -> Card:
        """Return what a card computes: encode with the folder's tokenizer, read a state, apply the head.

        finish: what is done to the head's outputs.
        """
        tokenizer = AutoTokenizer.from_pretrained(folder)

        def score(inputs: dict[str, list[int]]) -> list[float]:
            ids = inputs["input_ids"]
            with torch.no_grad():
                states = self.trunk(torch.tensor([ids])).last_hidden_state[0]
                return finish(self.head(states[place(ids)])).tolist()

        return Card(tokenizer, encode, score)


def body(family: str, tokenizer: Any, head: nn.Module, *, seed: int, **config: Any) -> Body:
    """Make a random trunk of this family, and fill the head with random weights."""
    trunk = scattered(AutoModel.from_config(config_of(family, tokenizer, **config)), seed=seed)
    return Body(trunk, scattered(head, seed=seed + 1000), tokenizer)


def linear(*, bias: bool = False) -> nn.Linear:
    return nn.Linear(WIDTH, 1, bias=bias)


def two_layers(inner: int = WIDTH) -> nn.Sequential:
    """Linear, ReLU, linear, as `score.0` and `score.2` of several families."""
    return nn.Sequential(nn.Linear(WIDTH, inner), nn.ReLU(), nn.Linear(inner, 1))


def base_folder(folder: Path, parts: Body, architecture: str) -> Path:
    """Write configuration and tokenizer of the base model beside the checkpoint."""
    base = folder.parent / "base"
    base.mkdir(exist_ok=True)
    save_config(base, parts.trunk.config, architectures=[architecture])
    save_tokenizer(base, parts.tokenizer)
    return base

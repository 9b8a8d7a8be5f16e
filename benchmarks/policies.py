"""What rollouts and steps are measured on: the policy of randomwalks, and one of 30 million weights with the
lengths of Helpful & Harmless."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessor, PreTrainedTokenizerFast

from benchmarks.checkpoint import byte_pairs
from benchmarks.forced_lengths import EndAt
from conch.errors import ConchError
from conch.rollouts.hf.engine import HFEngine
from conch.trainers.grpo import GRPOTrainer
from conch.trainers.ppo import PPOTrainer
from conch.types import Prompt
from examples.randomwalks.task import MAX_LENGTH, RandomWalks, letter_tokenizer

_WALKS_YAML = Path(__file__).resolve().parents[1] / "configs" / "model" / "randomwalks_policy.yaml"
_TURN = "\n\nAssistant:"
_SYNTHETIC = {"prompt": (96, 0.80), "response": (28, 0.88)}
"""Median and spread (standard deviation of the logarithm) of the lengths of harmless-base in tokens."""


@dataclass(frozen=True)
class Case:
    """A policy with its prompts and the lengths of their responses.

    lengths: tokens of each prompt's response, the end included; None where all have `max_new_tokens` and none
    ends. chunk_size: rows that are sampled together.
    """

    name: str
    model_config: GPT2Config
    tokenizer: PreTrainedTokenizerFast
    prompts: list[Prompt]
    lengths: list[int] | None
    max_new_tokens: int
    chunk_size: int

    def model(self) -> GPT2LMHeadModel:
        """Random weights, the same every time."""
        torch.manual_seed(0)
        return GPT2LMHeadModel(self.model_config).eval()

    @property
    def eos_id(self) -> int:
        """The token that ends a response."""
        return int(self.tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]

    @property
    def first_marker(self) -> int:
        """Markers are the last ids of the vocabulary, one a prompt."""
        return self.model_config.vocab_size - len(self.lengths or ())

    def end_at(self) -> EndAt:
        """What gives the rows their lengths."""
        return EndAt(self.eos_id, self.first_marker, self.lengths or ())

    @property
    def expected(self) -> list[int]:
        """Tokens of each prompt's response."""
        return self.lengths or [self.max_new_tokens] * len(self.prompts)


def walk_case(rows: int = 128, chunk_size: int = 64) -> Case:
    """The policy of randomwalks (6 layers, width 144), one letter to start from, 9 tokens a walk."""
    shape = yaml.safe_load(_WALKS_YAML.read_text(encoding="utf-8"))["architecture"]
    del shape["model_type"]
    tokenizer = letter_tokenizer()
    nodes = RandomWalks().start_nodes
    prompts = [_prompt(tokenizer, nodes[row % len(nodes)]) for row in range(rows)]
    return Case("randomwalks", _gpt2(shape), tokenizer, prompts, None, MAX_LENGTH - 1, chunk_size)


def dialogue_case(
    data: Path | None,
    rows: int = 64,
    chunk_size: int = 16,
    *,
    layers: int = 8,
    width: int = 512,
    max_prompt_tokens: int = 256,
    max_new_tokens: int = 128,
) -> Case:
    """A GPT-2 shape of 30 million weights on the first dialogues of a file, whose last answers say how long
    responses are; without a file, on random prompts with log-normal lengths of like quantiles.

    Longer prompts lose their beginning. The vocabulary of 8,192 grows by one marker a prompt (see `EndAt`).

    Raises:
        ConchError: the file cannot be read, is of another form, or holds fewer dialogues.
    """
    if data is None:
        tokenizer, texts, lengths = _drawn(rows)
    else:
        tokenizer, texts, lengths = _read(data, rows)
    first_marker = len(tokenizer)
    tokenizer.add_tokens([f"<row {row}>" for row in range(rows)], special_tokens=True)
    prompts = []
    for row, text in enumerate(texts):
        ids = tokenizer(text).input_ids[-(max_prompt_tokens - 1) :]
        prompts.append(_prompt(tokenizer, f"{tokenizer.decode(ids)}<row {row}>", (*ids, first_marker + row)))
    shape = {"n_layer": layers, "n_embd": width, "n_head": max(1, width // 64), "n_positions": 1024}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = _gpt2({**shape, **special, "bos_token_id": None, "vocab_size": first_marker + rows})
    cut = [min(length, max_new_tokens) for length in lengths]
    name = "HH lengths" if data is not None else "synthetic lengths"
    return Case(name, config, tokenizer, prompts, cut, max_new_tokens, chunk_size)


def case_of(name: str, data: Path | None, *, small: bool = False) -> Case:
    """`walks` or `dialogues`; small: 8 rows, and a shape that computes in no time."""
    if name == "walks":
        return walk_case(8, 4) if small else walk_case()
    if small:
        return dialogue_case(data, 8, 4, layers=1, width=64, max_prompt_tokens=24, max_new_tokens=24)
    return dialogue_case(data)


def forced_engine(trainer: PPOTrainer | GRPOTrainer, end_at: LogitsProcessor) -> HFEngine:
    """The trainer's own engine, but for rows that end where `end_at` lets them."""
    return HFEngine(
        lambda: trainer.policy.lm,
        trainer.tokenizer,
        trainer.config.generation,
        version=lambda: trainer.policy_version,
        autocast=trainer.engine.autocast,
        processors=lambda: nullcontext([end_at]),
    )


def _gpt2(shape: dict[str, Any]) -> GPT2Config:
    return GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def _prompt(tokenizer: PreTrainedTokenizerFast, text: str, ids: Sequence[int] | None = None) -> Prompt:
    return Prompt(text, tuple(tokenizer(text).input_ids if ids is None else ids))


def _read(data: Path, rows: int) -> tuple[PreTrainedTokenizerFast, list[str], list[int]]:
    """A tokenizer made from the dialogues, their prompts, and their answers' tokens with the end."""
    texts = []
    try:
        with gzip.open(data, "rt", encoding="utf-8") if data.suffix == ".gz" else data.open() as lines:
            texts = [json.loads(line)["chosen"] for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConchError(
            f"{data} does not hold JSON lines with `chosen` ({type(error).__name__}: {error})"
        ) from error
    texts = [text for text in dict.fromkeys(texts) if _TURN in text]
    if len(texts) < rows:
        raise ConchError(f"{data} holds {len(texts)} distinct dialogues, {rows} were asked for; lower --rows")
    tokenizer = byte_pairs(texts)
    places = [text.rindex(_TURN) + len(_TURN) for text in texts[:rows]]
    answers = [text[place:] for text, place in zip(texts, places, strict=False)]
    lengths = [len(ids) + 1 for ids in tokenizer(answers).input_ids]
    return tokenizer, [text[:place] for text, place in zip(texts, places, strict=False)], lengths


def _drawn(rows: int) -> tuple[PreTrainedTokenizerFast, list[str], list[int]]:
    """The same of nothing: prompts are random letters, one token each."""
    draw = random.Random(0)

    def length(of: str) -> int:
        median, spread = _SYNTHETIC[of]
        return min(900, max(2, round(draw.lognormvariate(0.0, spread) * median)))

    # Without merges a letter is a token; names of no sense fill the vocabulary.
    tokenizer = byte_pairs([])
    tokenizer.add_tokens([f"<word {number}>" for number in range(8192 - len(tokenizer))])
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = ["".join(draw.choices(letters, k=length("prompt"))) for _ in range(rows)]
    return tokenizer, texts, [length("response") for _ in range(rows)]

"""What all trainers share: starting checks, and reports of updates. Functions, not a base class."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.config import ModelConfig, TokenizerConfig, TrainConfig
from conch.engine import Engine, UpdateReport
from conch.errors import ConfigError, ModelError
from conch.models.loading import (
    check_start_token,
    check_tokenizer,
    disable_dropout,
    load_lm,
    load_tokenizer,
)
from conch.types import Metrics


def given_or_loaded_lm(given: PreTrainedModel | None, config: ModelConfig) -> PreTrainedModel:
    """The model that a user passed, with dropout as the config says, or the one that the config names.

    Raises:
        ModelError, ConfigError: see `load_lm`.
    """
    if given is None:
        return load_lm(config)
    check_start_token(given.config)
    if config.disable_dropout:
        disable_dropout(given)
    return given


def given_or_loaded_tokenizer(
    given: PreTrainedTokenizerBase | None, config: TokenizerConfig, model_path: str | None
) -> PreTrainedTokenizerBase:
    """The tokenizer that a user passed, checked, or else the one that the config names.

    Raises:
        ModelError: there is none, or its special tokens will not do.
    """
    if given is None:
        return load_tokenizer(config, model_path)
    check_tokenizer(given, name=given.name_or_path or type(given).__name__)
    return given


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer whose special tokens the model has no embeddings for.

    Raises:
        ModelError: names the token and both sizes.
    """
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    known = embeddings.num_embeddings
    for name, token_id in (("pad", tokenizer.pad_token_id), ("eos", tokenizer.eos_token_id)):
        if int(token_id) >= known:  # pyright: ignore[reportArgumentType]
            raise ModelError(
                f"the tokenizer's {name} token has id {token_id}, the vocabulary ends at {known - 1}; "
                "take the model's own tokenizer, or a `tokenizer.pad_token` of its vocabulary"
            )


def rows_per_process(engine: Engine, train: TrainConfig, total: int, name: str, minibatches: int = 1) -> int:
    """A process's part of `total` rows, which must divide into minibatches, and these into micro-batches.

    Raises:
        ConfigError: it does not, with the numbers named.
    """
    rows, steps = engine.share(total, name), train.gradient_accumulation_steps
    if rows % (minibatches * steps):
        cut = f"`ppo.minibatches` = {minibatches} times " if minibatches > 1 else ""
        raise ConfigError(
            f"`{name}` = {total} gives each of {engine.num_ranks} processes {rows} rows, which do not divide "
            f"into {cut}`train.gradient_accumulation_steps` = {steps}"
        )
    return rows


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Without gradient and without dropout."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)


def update_metrics(reports: Sequence[UpdateReport]) -> Metrics:
    """What one or more optimizer updates in a row did to the weights; the rate is the last one's."""
    return {
        "train/grad_norm": mean_of_finite([report.grad_norm for report in reports if not report.skipped]),
        "train/learning_rate": reports[-1].learning_rate,
        "train/skipped_updates": float(sum(report.skipped for report in reports)),
    }


def mean_of_finite(column: Sequence[float]) -> float:
    """Mean of what is a number; NaN where nothing is."""
    kept = [value for value in column if math.isfinite(value)]
    return sum(kept) / len(kept) if kept else math.nan

"""What all trainers share: starting checks and the loop over steps. Functions, not a base class."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.cli import save_resolved
from conch.config import ModelConfig, Section, TokenizerConfig, TrackingConfig, TrainConfig
from conch.engine import Engine, UpdateReport
from conch.errors import ConfigError, ModelError
from conch.log import get_logger
from conch.models.loading import (
    check_tokenizer,
    disable_dropout,
    load_causal_lm,
    load_tokenizer,
)
from conch.tracking import Tracker, make_run_dir
from conch.types import Metrics

_log = get_logger(__name__)


@runtime_checkable
class Trainer(Protocol):
    """What the loop drives."""

    config: Any
    engine: Engine
    run_dir: Path

    def step(self) -> Metrics:
        """One step of training."""
        ...

    def evaluate(self, tracker: Tracker | None = None, step: int = 0) -> Metrics:
        """Measure on held-out data; may write tables to `tracker`."""
        ...

    def save_pretrained(self, folder: Path) -> Path:
        """Write the model; called on all ranks."""
        ...


def given_or_loaded_lm(given: PreTrainedModel | None, config: ModelConfig) -> PreTrainedModel:
    """The model that a user passed, with dropout as the config says, or the one that the config names."""
    if given is None:
        return load_causal_lm(config)
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


def shared_run_dir(engine: Engine, config: TrainConfig) -> Path:
    """The run's folder, made by rank 0 and known to all ranks."""
    made: list[str] = []
    engine.together(lambda: made.append(str(make_run_dir(config))) if engine.is_main else None)
    return Path(engine.broadcast(made[0] if made else ""))


def fit(trainer: Trainer, name: str) -> Path:
    """Run all steps, with evaluations and checkpoints as `config.train` says; returns the run folder."""
    config: Section = trainer.config
    train: TrainConfig = trainer.config.train
    if trainer.engine.is_main:
        save_resolved(config, trainer.run_dir / "config.yaml")
    _log.info("run folder: %s", trainer.run_dir)
    tracking: TrackingConfig = trainer.config.tracking
    with Tracker(
        trainer.run_dir, tracking, total_steps=train.total_steps, desc=name, run_config=config
    ) as tracker:
        if train.eval_every:
            tracker.log(0, trainer.evaluate(tracker, 0))
        for step in range(1, train.total_steps + 1):
            last = step == train.total_steps
            metrics = trainer.step()
            if train.eval_every and (last or step % train.eval_every == 0):
                metrics.update(trainer.evaluate(tracker, step))
            tracker.log(step, metrics)
            if last or (train.save_every and step % train.save_every == 0):
                trainer.save_pretrained(trainer.run_dir / "checkpoints" / f"step_{step}")
    return trainer.run_dir


def mean_of_finite(column: Sequence[float]) -> float:
    """Mean of what is a number; NaN where nothing is."""
    kept = [value for value in column if math.isfinite(value)]
    return sum(kept) / len(kept) if kept else math.nan

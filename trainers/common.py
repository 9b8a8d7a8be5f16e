"""What all trainers share: starting checks, and reports of updates. Functions, not a base class."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.checkpoint import save_model
from conch.config import ModelConfig, TokenizerConfig, TrainConfig
from conch.engine import Engine, UpdateReport
from conch.errors import ConfigError, ModelError
from conch.models.kernels import check_kernels, put_kernels
from conch.models.loading import (
    check_start_token,
    check_tokenizer,
    disable_dropout,
    fuse_activations,
    load_lm,
    load_tokenizer,
)
from conch.types import Metrics

VerbT = TypeVar("VerbT", bound=Callable[..., Any])


def with_whole_weights(verb: VerbT) -> VerbT:
    """A trainer's method that runs the model without training it: see `Engine.whole_weights`."""

    @functools.wraps(verb)
    def whole(trainer: Any, *args: Any, **settings: Any) -> Any:
        with trainer.engine.whole_weights():
            return verb(trainer, *args, **settings)

    return whole  # pyright: ignore[reportReturnType]  the same signature


def given_or_loaded_lm(given: PreTrainedModel | None, config: ModelConfig, precision: str) -> PreTrainedModel:
    """The model that a user passed, with dropout and kernels as the config says, or the one that it names.

    precision: the mixed precision that it is trained in, see `Engine.precision`.

    Raises:
        ModelError, ConfigError: see `load_lm` and `check_kernels`.
    """
    check_kernels(config, precision, given)
    if given is None:
        return load_lm(config)
    check_start_token(given.config)
    put_kernels(given, config)
    if config.disable_dropout:
        disable_dropout(given)
    fuse_activations(given)
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
    """A process's part of `total` rows; see `rows_of_rank`.

    Raises:
        ConfigError: it does not come out whole.
    """
    return rows_of_rank(total, name, engine.num_ranks, minibatches, train.gradient_accumulation_steps)


def rows_of_rank(total: int, name: str, ranks: int, minibatches: int, steps: int) -> int:
    """The one place where batches are cut: into ranks, these into minibatches, these into micro-batches.

    total: rows of a whole batch, the setting `name`, which begins with its section. steps: micro-batches of
    an update.

    Raises:
        ConfigError: it does not come out whole, with the numbers named, and the nearest that do.
    """
    unit = ranks * minibatches * steps
    if total % unit == 0:
        return total // ranks
    below = total - total % unit
    remedy = f"take {below} or {below + unit}" if below else f"take {unit}"
    if total % ranks:
        raise ConfigError(f"`{name}` = {total} does not divide among {ranks} processes: {remedy}")
    section = name.partition(".")[0]
    cut = f"`{section}.minibatches` = {minibatches} times " if minibatches > 1 else ""
    raise ConfigError(
        f"`{name}` = {total} gives each of {ranks} processes {total // ranks} rows, which do not divide into "
        f"{cut}`train.gradient_accumulation_steps` = {steps}: {remedy}"
    )


def save_on_main(
    engine: Engine,
    folder: Path,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: ModelConfig,
    **beside: Any,
) -> Path:
    """Write a Hugging Face folder, on rank 0 alone; called on all ranks.

    beside: `heads` and `extra` of `conch.checkpoint.save_model`.

    Raises:
        CheckpointError: it cannot be written; a DistributedError on the other ranks.
    """

    def write() -> None:
        if engine.is_main:
            save_model(folder, lm, tokenizer, merge_adapter=config.merge_adapter, **beside)

    engine.together(write)
    return folder


@contextmanager
def clocked(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the block's seconds to `seconds[name]`."""
    started = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


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


_FIRST = ("train/ratio", "train/approx_kl", "train/clip_fraction")
"""Statistics also reported for the first minibatch alone, where the policy is still the one that sampled:
they must be 1, 0 and 0."""


def update_with_statistics(
    engine: Engine,
    num_rows: int,
    micro_batches: int,
    loss_of: Callable[[torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]],
) -> tuple[Metrics, UpdateReport]:
    """One optimizer update from `num_rows` rows, and statistics summed over micro-batches and ranks.

    loss_of: from a micro-batch's rows, its share of the loss and its share of each statistic.
    """
    summed: dict[str, torch.Tensor] = {}

    def noted(rows: torch.Tensor) -> torch.Tensor:
        loss, shares = loss_of(rows)
        for name, share in shares.items():
            summed[name] = summed.get(name, torch.zeros_like(share)) + share.detach()
        return loss

    report = engine.update(torch.arange(num_rows).chunk(micro_batches), noted)
    totals = engine.sum(torch.stack(list(summed.values()))).tolist()
    return dict(zip(summed, totals, strict=True)), report


def updates_over(
    num_rows: int,
    epochs: int,
    minibatches: int,
    update: Callable[[torch.Tensor], tuple[Metrics, UpdateReport]],
) -> Metrics:
    """All epochs over one step's samples, shuffled anew each time; means over the updates, and what the first
    one found.

    update: one optimizer update on these rows.
    """
    columns: list[Metrics] = []
    reports: list[UpdateReport] = []
    for _ in range(epochs):
        for rows in torch.randperm(num_rows).chunk(minibatches):
            stats, report = update(rows)
            columns.append(stats)
            reports.append(report)
    means = {name: sum(stats[name] for stats in columns) / len(columns) for name in columns[0]}
    first = {f"{name}_first": columns[0][name] for name in _FIRST}
    return {**means, **first, **update_metrics(reports)}


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

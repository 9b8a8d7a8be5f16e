"""What the trainers share: starting checks, the loop over steps, numbers. Functions, not a base class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.cli import save_resolved
from conch.config import GenerationConfig, ModelConfig, Section, TokenizerConfig, TrackingConfig, TrainConfig
from conch.engine import Engine, UpdateReport
from conch.errors import ConfigError, ModelError
from conch.experience import Sequences
from conch.log import get_logger
from conch.models.loading import (
    check_tokenizer,
    context_window,
    disable_dropout,
    load_causal_lm,
    load_tokenizer,
)
from conch.ops import Reduce, kl_estimate, masked_mean, masked_sum, only_this_rank
from conch.rewards.scorer import combine
from conch.tracking import Tracker, make_run_dir
from conch.types import Metrics, RewardResult, Rollout

_log = get_logger(__name__)

MetricFn = Callable[..., Mapping[str, Sequence[float] | float]]
"""`f(samples, prompts, outputs, **metadata)` -> name -> one value per sample, or one for all."""


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


def extra_keys(prompts: Sequence[str | Mapping[str, Any]]) -> list[str]:
    """The keys, beside "prompt", that a reward function gets as metadata."""
    keys = dict.fromkeys(key for prompt in prompts if isinstance(prompt, Mapping) for key in prompt)
    return [key for key in keys if key != "prompt"]


def room_for_prompts(model: PreTrainedModel, generation: GenerationConfig) -> int | None:
    """Tokens that the model's window leaves for a prompt; None where it has no limit.

    Raises:
        ConfigError: none are left.
    """
    window = context_window(model.config)
    if window is None:
        return None
    if window <= generation.max_new_tokens:
        raise ConfigError(
            f"`generation.max_new_tokens` = {generation.max_new_tokens} leaves no room for a prompt in the "
            f"model's window of {window} tokens"
        )
    return window - generation.max_new_tokens


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


class RunningMoments:
    """Mean and variance of all scores so far, over all ranks (parallel update of Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count, self.mean, self.sum_squares = 0.0, 0.0, 0.0

    def update(
        self, scores: Float[Tensor, " B"], valid: Bool[Tensor, " B"], reduce: Reduce = only_this_rank
    ) -> None:
        """Take in this step's scores where `valid` is True."""
        wide = scores.double()
        count = float(reduce(valid.sum().double()))
        if count == 0:
            return
        mean = float(masked_mean(wide, valid, reduce))
        squares = float(reduce(masked_sum((wide - mean) ** 2, valid)))
        delta, total = mean - self.mean, self.count + count
        self.sum_squares += squares + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Biased standard deviation; 1 until there is any spread."""
        std = (self.sum_squares / self.count) ** 0.5 if self.count else 0.0
        return std if std > 1e-8 else 1.0


def total_reward(result: RewardResult, weights: Mapping[str, float]) -> float:
    """A sample's reward as one number: the weighted sum of its objectives, or the sum over its tokens.

    NaN where the reward failed.
    """
    if not result.ok:
        return math.nan
    if result.token_scores is not None:
        return float(sum(result.token_scores))
    return combine(result, weights)


def reward_metrics(rewards: Sequence[RewardResult], weights: Mapping[str, float], reduce: Reduce) -> Metrics:
    """Mean and spread of the rewards of all ranks, NaN where there are none, and the share that failed."""
    raw = torch.tensor([total_reward(reward, weights) for reward in rewards], dtype=torch.float64)
    valid = raw.isfinite()
    share = float(masked_mean(valid.double(), torch.ones_like(valid), reduce))
    mean = float(masked_mean(raw, valid, reduce)) if share else math.nan
    variance = float(masked_mean((raw - mean) ** 2, valid, reduce)) if share else math.nan
    return {"reward/mean": mean, "reward/std": variance**0.5, "reward/failed_fraction": 1 - share}


def rollout_metrics(
    rollouts: Sequence[Rollout], sequences: Sequences, logprobs: Float[Tensor, "B R"], reduce: Reduce
) -> Metrics:
    """Lengths, the share cut by the limit, and the distance of the sampler's log-probs from the trainer's."""
    mask = sequences.response_mask
    reasons = [rollout.completion.finish_reason for rollout in rollouts]
    cut = torch.tensor([reason == "length" for reason in reasons], device=mask.device)
    everyone = torch.ones_like(cut)
    gap = (logprobs - sequences.sampling_logprobs).abs()
    return {
        "rollout/length_mean": float(masked_mean(mask.sum(dim=1).float(), everyone, reduce)),
        "rollout/truncated_fraction": float(masked_mean(cut.float(), everyone, reduce)),
        "rollout/logprob_gap": float(masked_mean(gap, mask, reduce)),
    }


def mean_kl(
    logprobs: Float[Tensor, "B R"],
    reference_logprobs: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    reduce: Reduce,
) -> float:
    """KL(policy || reference) in nats per sample: k1 summed over each response, mean over all ranks."""
    per_token = torch.where(mask, kl_estimate(logprobs, reference_logprobs), torch.zeros_like(logprobs))
    per_sample = per_token.sum(dim=1)
    return float(masked_mean(per_sample, torch.ones_like(per_sample, dtype=torch.bool), reduce))


def explained_variance(
    values: Float[Tensor, "B R"], returns: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], reduce: Reduce
) -> float:
    """1 for perfect values, 0 for values no better than a constant, over all ranks."""
    mean = masked_mean(returns, mask, reduce)
    spread = masked_mean((returns - mean) ** 2, mask, reduce)
    return float(1 - masked_mean((returns - values) ** 2, mask, reduce) / spread.clamp(min=1e-8))


def metric_columns(metric_fn: MetricFn | None, rollouts: Sequence[Rollout]) -> dict[str, list[float]]:
    """The user's metrics, one column each, with one value per rollout."""
    if metric_fn is None:
        return {}
    keys = sorted({key for rollout in rollouts for key in rollout.prompt.metadata})
    columns = metric_fn(
        samples=[rollout.sample for rollout in rollouts],
        prompts=[rollout.prompt.text for rollout in rollouts],
        outputs=[rollout.completion.text for rollout in rollouts],
        **{key: [rollout.prompt.metadata.get(key) for rollout in rollouts] for key in keys},
    )
    return {
        name: [float(v) for v in column] if isinstance(column, Sequence) else [float(column)] * len(rollouts)
        for name, column in columns.items()
    }


def mean_of_finite(column: Sequence[float]) -> float:
    """Mean of what is a number; NaN where nothing is."""
    kept = [value for value in column if math.isfinite(value)]
    return sum(kept) / len(kept) if kept else math.nan

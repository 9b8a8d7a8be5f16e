"""What the trainers that learn from rewards share. Functions and small nouns, not a base class.

Legend: B rollouts, R response tokens.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.config import DataConfig, GenerationConfig, RewardConfig, Section, TokenizerConfig
from conch.data.prompts import make_prompts
from conch.engine import Engine
from conch.errors import ConfigError, DataError
from conch.experience import Sequences
from conch.log import get_logger
from conch.models.loading import context_window
from conch.ops import KLEstimator, Reduce, kl_estimate, masked_mean
from conch.rewards.delta_reward import DeltaReward, check_originals
from conch.rewards.scorer import combine
from conch.rewards.source import RewardSource, UserReward, from_user
from conch.trainers.common import given_or_loaded_tokenizer
from conch.trainers.run import Run
from conch.types import Metrics, Prompt, RewardResult, Rollout

_log = get_logger(__name__)

MetricFn = Callable[..., Mapping[str, Sequence[float] | float]]
"""`f(samples, prompts, outputs, **metadata)` -> name -> one value per sample, or one for all."""


class KLConfig(Section):
    """The penalty for leaving the reference."""

    coef: float = Field(default=0.05, ge=0)
    """Weight c of the KL in the reward; the start value where it adapts."""

    estimator: KLEstimator = "k1"
    """Per-token estimate k; see `conch.ops.kl_estimate`."""

    placement: Literal["reward", "loss"] = "reward"
    """Whether the KL is taken off the rewards, or added to the loss."""

    target: float | None = Field(default=None, gt=0)
    """KL in nats per sample that the weight is steered to; None keeps the weight fixed."""

    horizon: int = Field(default=10_000, ge=1)
    """Samples over which the adaptive weight reacts."""


class KLController:
    """Weight of the KL penalty: fixed, or steered to a target (Ziegler et al. 2019, section 2.2)."""

    def __init__(self, config: KLConfig) -> None:
        self._config = config
        self.coef = config.coef

    def update(self, kl: float, num_samples: int) -> None:
        """kl: measured, in nats per sample. num_samples: samples of all ranks that it was measured on."""
        if self._config.target is None:
            return
        error = min(max(kl / self._config.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * num_samples / self._config.horizon

    def state_dict(self) -> dict[str, float]:
        """What `load_state_dict` needs to go on from here."""
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on where `state_dict` was taken."""
        self.coef = state["coef"]


ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class Ahead(Generic[ValueT]):
    """What the models say of rollouts, computed while their rewards are still under way.

    version: of the policy that was asked.
    """

    rollouts: list[Rollout]
    version: int
    value: ValueT

    def is_of(self, rollouts: Sequence[Rollout], version: int) -> bool:
        """True if nothing has changed since: these very rollouts, and the same policy."""
        same = len(rollouts) == len(self.rollouts) and all(map(operator.is_, rollouts, self.rollouts))
        return same and version == self.version


def known_or_computed(
    ahead: Ahead[ValueT] | None,
    rollouts: Sequence[Rollout],
    version: int,
    compute: Callable[[Sequence[Rollout]], ValueT],
) -> ValueT:
    """What was computed ahead, if it is of these rollouts and this policy; else it is computed now."""
    if ahead is not None and ahead.is_of(rollouts, version):
        return ahead.value
    return compute(rollouts)


def total_reward(result: RewardResult, weights: Mapping[str, float]) -> float:
    """A sample's reward as one number: the weighted sum of its objectives, or the sum over its tokens.

    NaN where the reward failed.
    """
    if not result.ok:
        return math.nan
    if result.token_scores is not None:
        return float(sum(result.token_scores))
    return combine(result, weights)


def agreed_objectives(rewards: Sequence[RewardResult], engine: Engine) -> list[str]:
    """Names of the objectives, the same on all ranks, also on one that has no reward to see them by."""
    own = sorted({name for reward in rewards for name in reward.scores})
    return sorted(set(engine.gather(own)))


def reward_metrics(
    rewards: Sequence[RewardResult], weights: Mapping[str, float], objectives: Sequence[str], reduce: Reduce
) -> Metrics:
    """Mean and spread of the rewards of all ranks, NaN where there are none, and the share that failed.

    objectives: where there are several, each one's mean is reported as well; the same on all ranks.
    """
    metrics = _spread([total_reward(reward, weights) for reward in rewards], reduce)
    if len(objectives) > 1:
        for name in objectives:
            column = [reward.scores.get(name, math.nan) for reward in rewards]
            metrics[f"reward/mean/{name}"] = _spread(column, reduce)["reward/mean"]
    return metrics


def _spread(values: Sequence[float], reduce: Reduce) -> Metrics:
    raw = torch.tensor(values, dtype=torch.float64)
    valid = raw.isfinite()
    share = float(masked_mean(valid.double(), torch.ones_like(valid), reduce))
    mean = float(masked_mean(raw, valid, reduce)) if share else math.nan
    variance = float(masked_mean((raw - mean) ** 2, valid, reduce)) if share else math.nan
    return {"reward/mean": mean, "reward/std": variance**0.5, "reward/failed_fraction": 1 - share}


def rollout_metrics(rollouts: Sequence[Rollout], sequences: Sequences, reduce: Reduce) -> Metrics:
    """Lengths, and the share cut by the limit."""
    mask = sequences.response_mask
    reasons = [rollout.completion.finish_reason for rollout in rollouts]
    cut = torch.tensor([reason == "length" for reason in reasons], device=mask.device)
    everyone = torch.ones_like(cut)
    return {
        "rollout/length_mean": float(masked_mean(mask.sum(dim=1).float(), everyone, reduce)),
        "rollout/truncated_fraction": float(masked_mean(cut.float(), everyone, reduce)),
    }


def logprob_gap(
    logprobs: Float[Tensor, "B R"], sequences: Sequences, reduce: Reduce, alarm: float | None = None
) -> float:
    """Distance of the sampler's log-probs from the trainer's: mean of absolute differences, nats a token.

    alarm: see `warn_of_gap`.
    """
    distance = (logprobs - sequences.sampling_logprobs).abs()
    gap = float(masked_mean(distance, sequences.response_mask, reduce))
    warn_of_gap(gap, alarm)
    return gap


def warn_of_gap(gap: float, alarm: float | None) -> None:
    """Write a warning where `logprob_gap` is above `alarm`, in nats a token."""
    if alarm is not None and gap > alarm:
        _log.warning(
            "the sampler's log-probs are %.3g nats a token from the trainer's, above "
            "`rollout.logprob_gap_alarm` = %g: what is trained on was sampled from another distribution "
            "(another precision, stale weights, or a cut by `generation.top_k` or `top_p`)",
            gap,
            alarm,
        )


def log_rollouts(
    engine: Engine,
    run: Run,
    rollouts: Sequence[Rollout],
    rewards: Sequence[RewardResult],
    kl: Float[Tensor, " B"] | None = None,
) -> None:
    """Write what all ranks are about to train on to `rollouts/step_N.jsonl`.

    kl: to the reference, in nats per sample; None where there is no reference.
    """
    nats_of_each = [None] * len(rollouts) if kl is None else kl.tolist()
    rows = [
        {
            "prompt": rollout.prompt.text,
            "output": rollout.completion.text,
            "finish_reason": rollout.completion.finish_reason,
            "policy_version": rollout.policy_version,
            "reward_status": reward.status.value,
            "scores": dict(reward.scores),
            "token_scores": reward.token_scores,
            "members": dict(reward.members),
            "kl": nats,
        }
        for rollout, reward, nats in zip(rollouts, rewards, nats_of_each, strict=True)
    ]
    rows = engine.gather(rows)
    if engine.is_main:
        folder = run.folder / "rollouts"
        folder.mkdir(exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"step_{run.step + 1}.jsonl").write_text(text, encoding="utf-8")


def kl_of_each(
    logprobs: Float[Tensor, "B R"], reference_logprobs: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]
) -> Float[Tensor, " B"]:
    """KL(policy || reference) of each sample in nats: k1 summed over its response.

    mask: True at response tokens.
    """
    return torch.where(mask, kl_estimate(logprobs, reference_logprobs), torch.zeros_like(logprobs)).sum(dim=1)


def mean_kl(
    logprobs: Float[Tensor, "B R"],
    reference_logprobs: Float[Tensor, "B R"],
    mask: Bool[Tensor, "B R"],
    reduce: Reduce,
) -> float:
    """KL(policy || reference) in nats per sample: the mean of `kl_of_each` over all ranks."""
    per_sample = kl_of_each(logprobs, reference_logprobs, mask)
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
    return {name: _column(name, values, len(rollouts)) for name, values in columns.items()}


def _column(name: str, values: Any, count: int) -> list[float]:
    """A metric as one number per sample, whether it came as a list, an array or one number for all."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence):
        return [float(values)] * count
    if len(values) != count:
        raise DataError(f"metric_fn gave {len(values)} values of `{name}` for {count} samples")
    return [float(value) for value in values]


def extra_keys(prompts: Sequence[str | Mapping[str, Any]]) -> list[str]:
    """The keys, beside "prompt", that a reward function gets as metadata."""
    keys = dict.fromkeys(key for prompt in prompts if isinstance(prompt, Mapping) for key in prompt)
    return [key for key in keys if key != "prompt"]


def checked_source(
    engine: Engine,
    reward: UserReward | Mapping[str, UserReward] | None,
    config: RewardConfig,
    prompts: Sequence[str | Mapping[str, Any]],
    tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None,
) -> RewardSource:
    """The reward source as user and configuration name it, once it has answered every rank.

    tokenizer: gives the policy's, which `reward.dense` needs; called once samples are scored, so it may be
        loaded after the source is found good.

    Raises:
        ConfigError: the source will not do.
        RewardError: it does not answer.
    """
    decode = None if tokenizer is None else lambda ids: decoded(tokenizer(), ids)
    keys = extra_keys(prompts)
    sources: list[RewardSource] = []
    engine.together(
        lambda: sources.append(from_user(reward, config, metadata_keys=keys, decode=decode, rank=engine.rank))
    )
    (source,) = sources
    engine.together(source.check)
    return source


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of sampled ids, as in `Completion.text`."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def less_originals(
    source: RewardSource,
    prompts: Sequence[str | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
) -> RewardSource:
    """Rewards less those of each prompt's original output: `reward.delta`.

    Raises:
        DataError: a prompt has no original output.
    """
    check_originals(prompts)
    return DeltaReward(source, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportReturnType]


def fitting_prompts(
    prompts: Sequence[str | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    config: TokenizerConfig,
    model: PreTrainedModel,
    generation: GenerationConfig,
    lengths: DataConfig | None = None,
    window: int | None = None,
) -> list[Prompt]:
    """Prompts that leave room in the model's window for the longest completion.

    lengths: which prompts to leave out for their length. window: the sampler's own, in tokens.

    Raises:
        ConfigError, DataError: see `room_for_prompts` and `conch.data.prompts.make_prompts`.
    """
    room = room_for_prompts(model, generation, window)
    return make_prompts(prompts, tokenizer, config, max_tokens=room, lengths=lengths)


def opened_reward(
    engine: Engine,
    reward: UserReward | Mapping[str, UserReward] | None,
    config: Any,
    prompts: Sequence[str | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[RewardSource, PreTrainedTokenizerBase]:
    """What a trainer learns from, once it has answered every rank, and the policy's tokenizer.

    config: the run's, for its sections `reward`, `tokenizer` and `model`.

    Raises:
        ConchError: see `checked_source`, `given_or_loaded_tokenizer` and `less_originals`.
    """
    loaded: list[PreTrainedTokenizerBase] = []
    source = checked_source(engine, reward, config.reward, prompts, lambda: loaded[0])
    loaded.append(given_or_loaded_tokenizer(tokenizer, config.tokenizer, config.model.path))
    if config.reward.delta and config.reward.replay is None:  # what is recorded is the difference
        source = less_originals(source, prompts, loaded[0])
    return source, loaded[0]


def texts_of(chunks: Iterable[Sequence[Rollout]]) -> list[str]:
    """The completions' texts, chunk after chunk."""
    return [rollout.completion.text for chunk in chunks for rollout in chunk]


def room_for_prompts(
    model: PreTrainedModel, generation: GenerationConfig, sampler_window: int | None = None
) -> int | None:
    """Tokens that the model's window, or the sampler's where it is shorter, leaves for a prompt; None where
    there is no limit.

    Raises:
        ConfigError: none are left, or the sampler's window is longer than the model's.
    """
    window = context_window(model.config)
    if window is not None and sampler_window is not None and sampler_window > window:
        raise ConfigError(
            f"`rollout.window` = {sampler_window} is longer than the model's window of {window} tokens"
        )
    window = sampler_window or window
    if window is None:
        return None
    if window <= generation.max_new_tokens:
        raise ConfigError(
            f"`generation.max_new_tokens` = {generation.max_new_tokens} leaves no room for a prompt in the "
            f"model's window of {window} tokens"
        )
    return window - generation.max_new_tokens

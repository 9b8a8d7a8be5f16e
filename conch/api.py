"""Train in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.config import Section, load
from conch.errors import ConfigError
from conch.log import setup_logging
from conch.rewards.source import RewardSource
from conch.trainers.online import MetricFn
from conch.trainers.ppo import PPORunConfig, PPOTrainer
from conch.trainers.sft import SFTRunConfig, SFTTrainer

RunConfigT = TypeVar("RunConfigT", PPORunConfig, SFTRunConfig)


def train(
    model: str | PreTrainedModel,
    *,
    reward: Callable[..., Any] | str | RewardSource | None = None,
    prompts: Sequence[str | Mapping[str, Any]] | None = None,
    samples: Sequence[str | Mapping[str, str]] | None = None,
    eval_prompts: Sequence[str | Mapping[str, Any]] | None = None,
    metric_fn: MetricFn | None = None,
    config: Mapping[str, Any] | Section | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PPOTrainer | SFTTrainer:
    """Train `model` and return its trainer: `.run_dir`, `.generate` (PPO), `.save_pretrained`, `.close`.

    With `prompts` the model learns by PPO from `reward`; with `samples` it imitates them (SFT).

    model: folder, hub id, or a loaded decoder (then give its `tokenizer`).
    reward: `f(samples, prompts, outputs, **metadata)`, "host:port/model" of a served reward model, or any
        `RewardSource`; None takes `config["reward"]["url"]` or the TRITON_HOST environment variable.
    prompts: strings, or dicts with a "prompt" whose other keys reach `reward` and `metric_fn` as keyword
    arguments.
    samples: strings, or dicts with "prompt" and "completion".
    metric_fn: extra evaluation metrics, with the arguments of a reward function; returns name -> values.
    config: nested mapping of the keys of `PPORunConfig` or `SFTRunConfig` (`{"train": {"total_steps": 50}}`),
        or one of these; its `model.path` is `model` unless it says otherwise.

    Raises:
        ConchError: before any long work, for what can be known to be wrong; see `conch.errors`.
    """
    setup_logging()
    if (prompts is None) == (samples is None):
        raise ConfigError("give either `prompts` (PPO, with a reward) or `samples` (SFT)")
    loaded = None if isinstance(model, str) else model
    if loaded is not None and tokenizer is None:
        raise ConfigError("a loaded model needs its tokenizer: pass `tokenizer=`")
    if samples is not None:
        if reward is not None:
            raise ConfigError(
                "`samples` are imitated and take no `reward`: pass `prompts` to learn from a reward"
            )
        run = _run_config(SFTRunConfig, config, model)
        sft = SFTTrainer(run, samples=samples, model=loaded, tokenizer=tokenizer)
        sft.fit()
        return sft
    assert prompts is not None
    trainer = PPOTrainer(
        _run_config(PPORunConfig, config, model),
        reward=reward,
        prompts=prompts,
        eval_prompts=eval_prompts,
        metric_fn=metric_fn,
        model=loaded,
        tokenizer=tokenizer,
    )
    trainer.fit()
    return trainer


def _run_config(
    section: type[RunConfigT], config: Mapping[str, Any] | Section | None, model: str | PreTrainedModel
) -> RunConfigT:
    if isinstance(config, section):
        return config
    if isinstance(config, Section):
        raise ConfigError(f"`config` is a {type(config).__name__}; these arguments need a {section.__name__}")
    values = dict(config or {})
    path = model if isinstance(model, str) else (model.name_or_path or "a model in memory")
    values["model"] = {"path": path, **values.get("model", {})}
    return load(section, values)

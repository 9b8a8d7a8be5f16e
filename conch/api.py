"""Train in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.config import Section, load
from conch.errors import ConfigError
from conch.evaluation.metrics import MetricFn
from conch.log import setup_logging
from conch.rewards.base import UserReward
from conch.trainers.async_grpo import AsyncGRPORunConfig, AsyncGRPOTrainer
from conch.trainers.grpo import GRPORunConfig, GRPOTrainer
from conch.trainers.ilql import ILQLRunConfig, ILQLTrainer
from conch.trainers.ppo import PPORunConfig, PPOTrainer
from conch.trainers.rft import RFTRunConfig, RFTTrainer
from conch.trainers.sft import SFTRunConfig, SFTTrainer

RunConfigT = TypeVar("RunConfigT", bound=Section)

_SECTIONS: dict[str, type[Section]] = {
    "ppo": PPORunConfig,
    "grpo": GRPORunConfig,
    "async_grpo": AsyncGRPORunConfig,
    "rft": RFTRunConfig,
    "ilql": ILQLRunConfig,
    "sft": SFTRunConfig,
}
"""Algorithm -> its run config, which has a section of that name; of asynchronous GRPO they are `grpo` and
`asynchronous`."""

_NEEDS: dict[type[Section], set[str]] = {
    PPORunConfig: {"prompts"},
    GRPORunConfig: {"prompts"},
    AsyncGRPORunConfig: {"prompts"},
    RFTRunConfig: {"prompts"},
    ILQLRunConfig: {"samples", "rewards"},
    SFTRunConfig: {"samples"},
}
"""What each algorithm learns from; of those that need the same, the first is taken unless the config says."""

_REWARD_MODELS = (
    "a reward model is trained by `RewardModelTrainer(config, samples=...).fit()` of "
    "`conch.trainers.reward_model`, or by `conch reward-model`"
)


def train(
    model: str | PreTrainedModel,
    *,
    reward: UserReward | Mapping[str, UserReward] | None = None,
    gold: UserReward | None = None,
    prompts: Sequence[str | Mapping[str, Any]] | None = None,
    samples: Sequence[Any] | None = None,
    rewards: Sequence[float] | None = None,
    eval_prompts: Sequence[str | Mapping[str, Any]] | None = None,
    metric_fn: MetricFn | None = None,
    config: Mapping[str, Any] | Section | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    algorithm: str | None = None,
) -> PPOTrainer | GRPOTrainer | RFTTrainer | ILQLTrainer | SFTTrainer:
    """Train `model` and return its trainer: `.run_dir`, `.generate`, `.save_pretrained`, `.close`.

    What is given picks the algorithm: `prompts` are learned from by PPO with a `reward`; `samples` with
    `rewards` by ILQL; `samples` alone by SFT. `algorithm="grpo"` asks for another, and so does a `config`
    that has a section of it (`{"grpo": {"group_size": 4}}`), or that is its run config (`GRPORunConfig` of
    `conch.trainers.grpo`).

    model: folder, hub id, or a loaded model (then give its `tokenizer`).
    reward: `f(samples, prompts, outputs, **metadata)`, "host:port/model" of a served reward model, any
        `RewardSource`, or several of these by name (see `reward.combine`); for PPO, GRPO and RFT, None takes
        `config["reward"]["url"]` or the TRITON_HOST environment variable. ILQL and SFT use it to measure
        evaluation samples, not to learn.
    gold: a reward that watches: what `reward` may be, asked in evaluations only and never learned from. Its
        best evaluation is the run's best checkpoint; None takes `config["evaluation"]["gold"]`.
    prompts: strings, or dicts with a "prompt" whose other keys reach `reward` and `metric_fn` as keyword
        arguments.
    samples: for SFT strings, dicts with "prompt" and "completion", or dialogues; for ILQL strings or lists of
        turns [prompt, output, ...].
    rewards: for ILQL, one number per sample.
    eval_prompts: completed and measured in evaluations; online, None takes `prompts`.
    metric_fn: extra evaluation metrics, with the arguments of a reward function; returns name -> values.
    config: nested mapping of the keys of the algorithm's run config (`{"train": {"total_steps": 50}}`), or
        one of these itself; its `model.path` is `model` unless it says otherwise.
    algorithm: what to train by, where that does not follow from the data: "ppo", "grpo", "async-grpo", "rft",
        "ilql" or "sft". A reward model is trained by `conch.trainers.reward_model.RewardModelTrainer`.

    Raises:
        ConchError: before any long work, for what can be known to be wrong; see `conch.errors`.
    """
    setup_logging()
    if not isinstance(model, str) and tokenizer is None:
        raise ConfigError("a loaded model needs its tokenizer: pass `tokenizer=`")
    data = {"prompts": prompts, "samples": samples, "rewards": rewards}
    given = {name for name, value in data.items() if value is not None}
    section = _section_for(config, given, algorithm)
    run = _run_config(section, config, model)
    inputs: dict[str, Any] = {
        **{name: value for name, value in data.items() if value is not None},
        "reward": reward,
        "gold": gold,
        "eval_prompts": eval_prompts,
        "metric_fn": metric_fn,
        "model": None if isinstance(model, str) else model,
        "tokenizer": tokenizer,
    }
    from conch.runs.checkpoint import no_model_bars  # brings torch, which `_make` needs too

    with no_model_bars():
        trainer = _make(run, inputs)
        trainer.fit()
    return trainer


def _section_for(
    config: Mapping[str, Any] | Section | None, inputs: set[str], algorithm: str | None
) -> type[Section]:
    """The run config of the algorithm that the arguments ask for.

    Raises:
        ConfigError: they ask for none, or contradict each other or the config.
    """
    section = _asked_for(config, algorithm)
    if section is None:
        section = next((kind for kind, needed in _NEEDS.items() if needed == inputs), None)
    if section is None:
        named = " and ".join(f"`{name}`" for name in sorted(inputs)) or "nothing"
        raise ConfigError(
            "give either `prompts` (PPO, with a reward), `samples` with `rewards` (ILQL), or `samples` alone"
            f" (SFT); here is {named}"
        )
    if section not in _NEEDS:
        hint = f"; {_REWARD_MODELS}" if section.__name__ == "RewardModelRunConfig" else ""
        raise ConfigError(f"`config` is a {section.__name__}, which `conch.train` does not train with{hint}")
    if _NEEDS[section] != inputs:
        needed_text = " and ".join(f"`{name}`" for name in sorted(_NEEDS[section]))
        raise ConfigError(
            f"a {section.__name__} learns from {needed_text}, given is {sorted(inputs) or 'nothing'}"
        )
    return section


def _asked_for(config: Mapping[str, Any] | Section | None, algorithm: str | None) -> type[Section] | None:
    """The run config that `algorithm` or the config names; None where neither does."""
    if algorithm is not None:
        algorithm = _known_algorithm(algorithm)
    if isinstance(config, Section):
        named = [type(config)]
    else:
        named = [section for name, section in _SECTIONS.items() if name in (config or {})]
        if algorithm == "async_grpo" or "asynchronous" in (config or {}):
            named = [AsyncGRPORunConfig if section is GRPORunConfig else section for section in named]
            named = named or [AsyncGRPORunConfig]
    if algorithm is not None and named not in ([], [_SECTIONS[algorithm]]):
        names = ", ".join(section.__name__ for section in named)
        raise ConfigError(f"`algorithm` is {algorithm!r}, but `config` is made for another: {names}")
    if len(named) > 1:
        names = ", ".join(name for name, section in _SECTIONS.items() if section in named)
        raise ConfigError(f"`config` has sections of several algorithms: {names}; leave one of them")
    return _SECTIONS[algorithm] if algorithm is not None else next(iter(named), None)


def _known_algorithm(name: str) -> str:
    """The key of `_SECTIONS` that a name is, as `conch train` takes it: with hyphens, in capitals.

    Raises:
        ConfigError: there is none.
    """
    key = name.lower().replace("-", "_")
    if key == "reward_model":
        raise ConfigError(f"`algorithm` = {name!r}: {_REWARD_MODELS}")
    if key not in _SECTIONS:
        there = ", ".join(each.replace("_", "-") for each in _SECTIONS)
        raise ConfigError(f"`algorithm` = {name!r}: there are {there}; {_REWARD_MODELS}")
    return key


def _make(
    run: Section, inputs: dict[str, Any]
) -> PPOTrainer | GRPOTrainer | RFTTrainer | ILQLTrainer | SFTTrainer:
    if isinstance(run, PPORunConfig):
        return PPOTrainer(run, **inputs)
    if isinstance(run, AsyncGRPORunConfig):
        return AsyncGRPOTrainer(run, **inputs)
    if isinstance(run, GRPORunConfig):
        return GRPOTrainer(run, **inputs)
    if isinstance(run, RFTRunConfig):
        return RFTTrainer(run, **inputs)
    if isinstance(run, ILQLRunConfig):
        return ILQLTrainer(run, **inputs)
    assert isinstance(run, SFTRunConfig)
    return SFTTrainer(run, **inputs)


def _run_config(
    section: type[RunConfigT], config: Mapping[str, Any] | Section | None, model: str | PreTrainedModel
) -> RunConfigT:
    if isinstance(config, section):
        return config
    assert not isinstance(config, Section)
    values = dict(config or {})
    path = model if isinstance(model, str) else (model.name_or_path or "a model in memory")
    values["model"] = {"path": path, **values.get("model", {})}
    return load(section, values)

"""From the settings that a client sends to the configuration of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conch.config import RewardConfig, RewardFailureConfig, RolloutConfig, load
from conch.config.algorithms.correction import CorrectionConfig
from conch.config.algorithms.grpo import GRPOConfig, GRPORunConfig
from conch.errors import ConfigError
from conch.service.protocol import TrainingSettings

_ADAPTED = ("peft_config", "merge_adapter", "num_layers_unfrozen")
_COMPUTED = ("dtype", "attention", "liger", "gradient_checkpointing", "disable_dropout", "trial")
_TEXTS = ("add_special_tokens", "max_prompt_tokens", "truncate_prompts", "truncation_side", "pad_token")

# What a client may set: nothing that runs code, reads files or asks other servers. None stands for all keys.
_OPEN: dict[str, tuple[str, ...] | None] = {
    "generation": None,
    "grpo": None,
    "model": _ADAPTED + _COMPUTED,
    "optimizer": None,
    "scheduler": None,
    "shaping": None,
    "tokenizer": _TEXTS,
    "train": ("max_grad_norm", "mixed_precision"),
}
# Key -> the field of `TrainingSettings` that says it.
_SAID = {
    "generation.max_new_tokens": "max_completion_length",
    "grpo.group_size": "num_completions_per_prompt",
    "grpo.prompts_per_step": "training_batch_size",
    "optimizer.learning_rate": "learning_rate",
}
_KEPT_CHECKPOINTS = 2


class RemoteRunConfig(GRPORunConfig):
    """Everything that a run is made from whose prompts and rewards come from clients."""

    grpo: GRPOConfig = GRPOConfig(correction=CorrectionConfig(kind="truncate"), minibatches=1)
    reward: RewardConfig = RewardConfig(failure=RewardFailureConfig(policy="drop", max_fraction=1.0))


def run_config(
    settings: TrainingSettings, run_dir: Path, rollout: RolloutConfig | None = None
) -> RemoteRunConfig:
    """The configuration of a run in `run_dir`, where it goes on with what stands there.

    rollout: what samples; None takes the trainer's process.

    Raises:
        ConfigError: settings do not fit each other, or are none that a client may set.
    """
    values: dict[str, Any] = {
        "model": {"path": settings.model_id},
        "generation": {"max_new_tokens": settings.max_completion_length},
        "grpo": {
            "group_size": settings.num_completions_per_prompt,
            "prompts_per_step": settings.prompts_per_step,
        },
        "optimizer": {"learning_rate": settings.learning_rate},
        "train": {
            "total_steps": settings.max_steps,
            "gradient_accumulation_steps": settings.gradient_accumulation_steps,
            "seed": settings.seed,
            "save_every": settings.save_every,
            "keep_last": _KEPT_CHECKPOINTS,
            "eval_every": 0,
            "run_dir": run_dir,
            "resume": "auto",
        },
    }
    if settings.most_groups < settings.prompts_per_step:
        raise ConfigError(
            f"`max_groups` = {settings.most_groups} is less than the {settings.prompts_per_step} groups that "
            "an update learns from: none could ever be made"
        )
    if rollout is not None:
        values["rollout"] = rollout.model_dump(exclude_unset=True)
    for section, keys in settings.overrides.items():
        values[section] = values.get(section, {}) | _open_keys(section, keys)
    return load(RemoteRunConfig, values)


def check_readable(model_id: str) -> None:
    """See that this process may read the files of a model that is a folder.

    Libraries say of a file that they may not read that it is not there; and safetensors makes its files for
    their owner alone, who is another one where a container trains what was made outside.

    Raises:
        ConfigError: names a file that it may not.
    """
    folder = Path(model_id)
    try:
        files = [file for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
    except PermissionError:
        files = [folder]
    for file in files:
        if not os.access(file, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
            raise ConfigError(
                f"`model_id`: {file} cannot be read by the service, which is user {os.geteuid()}: "
                f"chmod -R a+rX {folder}"
            )


def _open_keys(section: str, keys: Any) -> Mapping[str, Any]:
    if section not in _OPEN:
        raise ConfigError(f"`overrides.{section}` cannot be set by a client; these can: {', '.join(_OPEN)}")
    if not isinstance(keys, Mapping):
        raise ConfigError(f"`overrides.{section}` is a section: give its keys and values")
    allowed = _OPEN[section]
    for key in keys:
        name = f"{section}.{key}"
        if name in _SAID:
            raise ConfigError(f"`overrides.{name}` is said by `{_SAID[name]}`: set that")
        if name == "grpo.max_resamples":
            raise ConfigError("`overrides.grpo.max_resamples` samples again, where clients bring the prompts")
        if allowed is not None and key not in allowed:
            raise ConfigError(
                f"`overrides.{name}` cannot be set by a client; these can: {', '.join(allowed)}"
            )
    return keys

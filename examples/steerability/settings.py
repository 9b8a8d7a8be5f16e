"""Settings of `rl.py`: those of Conch's GRPO, and a section of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from conch.cli import compose
from conch.config import Section, load
from conch.config.algorithms.grpo import GRPORunConfig
from conch.errors import ConfigError, missing_path, yaml_problem

CONFIGS = Path(__file__).resolve().parent / "configs"


class SteerabilityConfig(Section):
    """Which texts are steered, and which device samples."""

    probe: Path | None = None
    """Rows to steer, CSV or JSON lines: `text`, `source_<goal>`, `target_<goal>`, and `original_index`, the
    text's number. None generates small texts of three registers, and measures them with `reward.url`."""

    source_texts: int = Field(default=384, ge=1)
    """Texts of the training half of the probe, or generated."""

    instructions_per_text: int = Field(default=8, ge=1)
    """Rows of each of them."""

    held_out_texts: int = Field(default=8, ge=1)
    """Texts of the other half, which evaluations are on."""

    held_out_instructions: int = Field(default=4, ge=1)
    """Rows of each of them."""

    sampling_seed: int = Field(default=42, ge=0)
    """Chooses texts and rows."""

    own_sampler: bool = True
    """Sample on a device of its own, behind those that train: with `rollout.engine`, in a server that is
    started and ended with the run. False samples where the policy is trained."""

    zero_stage: int = Field(default=2, ge=0, le=2)
    """Stage of DeepSpeed's ZeRO on GPUs, where the launcher names no DeepSpeed itself; 0 does without. On a
    CPU processes train without it."""

    sft: str | None = None
    """File of this folder with settings of SFT that trains the policy to begin with, on a small corpus; None
    begins with `model.path`."""

    sft_rows: int = Field(default=12_000, ge=1)
    """Rows of that corpus."""

    sft_steps: int | None = Field(default=None, ge=1)
    """Steps of that training; None takes what its file says."""


class SteerabilityRunConfig(GRPORunConfig):
    """Everything a run is made from."""

    steerability: SteerabilityConfig = SteerabilityConfig()

    @model_validator(mode="after")
    def _rewards_are_of_steering(self) -> SteerabilityRunConfig:
        if not self.reward.steering.is_on:
            raise ValueError(
                "`reward.steering.rewards` names nothing: rows are steered to targets, for example "
                "rewards=[steerability_error]"
            )
        if self.rollout.engine == "ray":
            raise ValueError("`rollout.engine` = ray: this program starts its own sampler, take hf or vllm")
        if self.rollout.urls is not None and self.steerability.own_sampler:
            raise ValueError(
                "`rollout.urls` names samplers: set `steerability.own_sampler=false`, or leave it out"
            )
        return self


RENAMED: Mapping[str, str] = {
    "model_name_or_path": "model.path",
    "learning_rate": "optimizer.learning_rate",
    "adam_beta1": "optimizer.betas",
    "weight_decay": "optimizer.weight_decay",
    "lr_scheduler_type": "scheduler.name",
    "warmup_ratio": "scheduler.warmup_updates",
    "num_generations": "grpo.group_size",
    "max_completion_length": "generation.max_new_tokens",
    "max_prompt_length": "tokenizer.max_prompt_tokens",
    "temperature": "generation.temperature",
    "beta": "grpo.kl.coef",
    "epsilon_lower": "grpo.clip_low",
    "epsilon_upper": "grpo.clip_high",
    "num_iterations": "grpo.epochs",
    "lora_r": "model.peft_config",
    "use_rslora": "model.peft_config",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "steerability_probe": "steerability.probe",
    "n_source_texts": "steerability.source_texts",
    "instructions_per_text": "steerability.instructions_per_text",
    "steering_goals": "reward.steering.goals",
    "rewards": "reward.steering.rewards",
    "eval_rewards": "reward.steering.eval_rewards",
    "normalize_ortho": "reward.steering.normalize_ortho",
    "normalize_miscal": "reward.steering.normalize_miscal",
    "square_rewards": "reward.steering.square_rewards",
    "rescale_norm": "reward.steering.rescale_norm",
    "good_enough_threshold": "reward.steering.good_enough_threshold",
    "too_bad_threshold": "reward.steering.too_bad_threshold",
    "decile": "reward.steering.decile",
    "port": "reward.url",
    "use_vllm": "rollout.engine",
}
"""Names of the paper's code -> where the same stands here."""

NOT_HERE: Mapping[str, str] = {
    "min_p": "it cuts off tokens that the log-probs which are trained on give a chance; `generation.top_p` "
    "cuts too, and metrics say so",
    "frequency_penalty": "what is sampled would not be of the policy that is trained",
    "rejection_sample_size": "all completions of a group are learned from; `grpo.max_resamples` replaces "
    "groups that teach nothing",
    "rejection_sample_type": "see `rejection_sample_size`",
    "use_sample_weights": "rows count alike; repeat those that shall count more",
    "tau": "there are no sampling weights",
    "lambda_tau": "there are no sampling weights",
    "lopo_epsilon": "the loss is GRPO's",
}
"""Names of the paper's code that have no counterpart here -> what to do."""


def load_settings(config: str, overrides: list[str]) -> SteerabilityRunConfig:
    """Read a file, and `key=value` words over it.

    config: a path, or the name of a file in `configs/`.

    Raises:
        ConfigError: no such file, or what it says is wrong; settings of the paper's own files get the names
            that they have here.
    """
    path = Path(config)
    if path.suffix not in (".yaml", ".yml"):
        path = CONFIGS / f"{config}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(each.stem for each in CONFIGS.glob("*.yaml") if "_" not in each.stem))
        raise ConfigError(f"--config {config}: there is no {path}{missing_path(path)}; presets are {names}")
    _check_names(path)
    values = compose(path.stem, overrides, path.resolve().parent)
    # The presets name their ranges as seen from this folder, where their commands are run.
    reward: Any = values.get("reward")
    goals: Any = reward.get("goals") if isinstance(reward, Mapping) else None
    ranges = goals.get("normalization") if isinstance(goals, Mapping) else None
    if isinstance(ranges, str) and not Path(ranges).is_file() and (CONFIGS.parent / ranges).is_file():
        own = {**goals, "normalization": str(CONFIGS.parent / ranges)}
        values["reward"] = {**reward, "goals": own}
    return load(SteerabilityRunConfig, values)


def _check_names(path: Path) -> None:
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {yaml_problem(error)}") from error
    if content is not None and not isinstance(content, Mapping):
        raise ConfigError(
            f"{path} is to hold settings, as in `model: {{path: ...}}`, not a {type(content).__name__}"
        )
    flat = [str(key) for key, value in (content or {}).items() if not isinstance(value, Mapping)]
    lines = [f"`{key}` has no counterpart here: {NOT_HERE[key]}" for key in flat if key in NOT_HERE]
    lines += [f"`{key}` is `{RENAMED[key]}` here" for key in flat if key in RENAMED]
    if lines:
        raise ConfigError(
            f"{path} has settings by the names of the paper's code; `configs/paper.yaml` has that run's:\n  "
            + "\n  ".join(lines)
        )

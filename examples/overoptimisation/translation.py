"""From a study's settings to a run of Conch's PPO.

trlX counts optimizer updates, Conch rollouts: of the paper's settings, 3,000 updates are 750 rollouts of 4
updates each. trlX counts samples of a process, Conch those of all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conch.config import load
from conch.config.algorithms.ppo import PPORunConfig
from conch.errors import ConfigError
from examples.overoptimisation.entries import laid_over
from examples.overoptimisation.settings import PPOScheduler, StudyConfig

_HALF = {"bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Batches:
    """How a study's batches stand in Conch.

    rollouts: samples of a step, over all processes.
    minibatches: updates of a pass over them.
    updates: of a step.
    steps, eval_every, save_every: in steps.
    """

    rollouts: int
    minibatches: int
    updates: int
    steps: int
    eval_every: int
    save_every: int


def batches_of(config: StudyConfig, num_processes: int) -> Batches:
    """Count in steps what trlX counts in updates; each is rounded up."""
    train, method = config.ppo_config.train, config.ppo_config.method
    own = 1 if config.debug else method.num_rollouts
    # Of a process's samples, all updates of a pass take the same number.
    minibatches = min(n for n in range(1, own + 1) if own % n == 0 and own / n <= train.batch_size)
    updates = minibatches * method.ppo_epochs

    def in_steps(number: int) -> int:
        return math.ceil(number / updates)

    return Batches(
        own * num_processes,
        minibatches,
        updates,
        in_steps(train.total_steps),
        in_steps(train.eval_interval),
        in_steps(train.checkpoint_interval),
    )


def run_config(
    config: StudyConfig, folder: Path, reward: Mapping[str, Any], *, num_processes: int, on_gpu: bool
) -> PPORunConfig:
    """The run that a study's settings ask for.

    folder: of the run.
    reward: keys of Conch's section `reward` that name the reward models.

    Raises:
        ConfigError: the settings contradict each other, or a setting below `conch` has a name of its own.
    """
    ppo, sft, batches = config.ppo_config, config.sft_config, batches_of(config, num_processes)
    method, optimizer = ppo.method, ppo.optimizer.kwargs
    unfrozen = sft.num_layers_unfrozen
    values: dict[str, Any] = {
        "model": {
            "path": sft.model_name,
            "num_layers_unfrozen": ppo.model.num_layers_unfrozen if unfrozen is None else unfrozen,
        },
        "tokenizer": {"truncate_prompts": True, "truncation_side": ppo.tokenizer.truncation_side},
        "optimizer": {
            "learning_rate": optimizer.lr,
            "betas": optimizer.betas,
            "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
        },
        "scheduler": {"name": _schedule(ppo.scheduler, ppo.train.total_steps)},
        "generation": {**method.gen_kwargs.model_dump(), "chunk_size": method.chunk_size},
        "shaping": {"clip": method.cliprange_reward, **_scaling(config)},
        "ppo": {
            "rollouts_per_step": batches.rollouts,
            "epochs": method.ppo_epochs,
            "minibatches": batches.minibatches,
            "gamma": method.gamma,
            "lam": method.lam,
            "clip_ratio": method.cliprange,
            "clip_value": method.cliprange_value,
            "value_coef": method.vf_coef,
            "kl": {
                "coef": method.init_kl_coef,
                "target": method.target if method.init_kl_coef else None,
                "horizon": method.horizon,
            },
        },
        "train": {
            "seed": config.rng_seed,
            "run_dir": str(folder),
            "resume": "auto",
            "total_steps": batches.steps,
            "eval_every": batches.eval_every,
            "save_every": batches.save_every,
        },
        "reward": dict(reward),
    }
    dtype = sft.dtype or config.dtype
    if on_gpu:
        values["train"]["mixed_precision"] = _HALF.get(dtype, "no")
    made = load(PPORunConfig, laid_over(values, _own(config.conch)))
    if not made.evaluation.keep or not made.train.eval_every:
        raise ConfigError(
            "a study is made of the evaluations that its runs keep: leave `conch.evaluation.keep` at true, "
            "and `conch.train.eval_every` above 0"
        )
    return made


def _own(more: Mapping[str, Any]) -> Mapping[str, Any]:
    for section, key in (("train", "run_dir"), ("train", "resume"), ("reward", "url"), ("reward", "members")):
        if key in (more.get(section) or {}):
            raise ConfigError(
                f"`conch.{section}.{key}` has names here: `output_dir`, and `rank_config.model_names`; runs "
                "go on by themselves where they were"
            )
    return more


def _schedule(scheduler: PPOScheduler, total_steps: int) -> str:
    """Conch's falls to 0 at the end of the run. One that lasts for more than twice the run has not fallen by
    half at its end: a constant rate is nearer."""
    if scheduler.name != "cosine_annealing":
        return scheduler.name
    return "constant" if scheduler.kwargs.T_max >= 2 * total_steps else "cosine"


def _scaling(config: StudyConfig) -> dict[str, Any]:
    method = config.ppo_config.method
    scaling = {"running": "running", True: "running", "ref": "reference"}.get(
        method.scale_reward or "", "none"
    )
    if method.ref_std is not None and scaling != "reference":
        raise ConfigError("`ppo_config.method.ref_std` needs `scale_reward: ref`")
    return {"scaling": scaling, **({"reference_std": method.ref_std} if method.ref_std else {})}

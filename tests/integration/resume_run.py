"""Small runs of every trainer, to be killed and resumed; also under torchrun.

python -m tests.integration.resume_run KIND RUN_DIR key=value ...
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from conch.cli import run_main
from conch.config import load
from conch.trainers.grpo import GRPORunConfig, GRPOTrainer
from conch.trainers.ilql import ILQLRunConfig, ILQLTrainer
from conch.trainers.ppo import PPORunConfig, PPOTrainer
from conch.trainers.reward_model import RewardModelRunConfig, RewardModelTrainer
from conch.trainers.rft import RFTRunConfig, RFTTrainer
from conch.trainers.sft import SFTRunConfig, SFTTrainer
from tests.integration.letters_run import LETTERS, SETTINGS, share_of_a
from tests.tiny import char_tokenizer

MODEL = SETTINGS["model"]
SAMPLES = [LETTERS[i:] + LETTERS[:j] for i in range(8) for j in range(3)]
SCORED = [{"text": text, "score": len(text) / 4} for text in SAMPLES]
TRAIN = {"total_steps": 16, "save_every": 1, "keep_last": 3, "eval_every": 4}


def ppo(values: dict[str, Any]) -> Any:
    shaped = {"shaping": {"scaling": "running"}, "ppo": {"rollouts_per_step": 16, "kl": {"target": 0.1}}}
    base = {"model": MODEL, "generation": {"max_new_tokens": 6, "chunk_size": 8}, **shaped, **values}
    config = load(PPORunConfig, base)
    return PPOTrainer(config, reward=share_of_a, prompts=list(LETTERS[:7]), tokenizer=char_tokenizer(LETTERS))


def grpo(values: dict[str, Any]) -> Any:
    grouped = {
        "prompts_per_step": 4,
        "group_size": 4,
        "kl": {"target": 1.0, "horizon": 100},
        "max_resamples": 1,
    }
    base = {"model": MODEL, "generation": {"max_new_tokens": 6}, "grpo": grouped, **values}
    config = load(GRPORunConfig, base)
    return GRPOTrainer(config, reward=share_of_a, prompts=list(LETTERS), tokenizer=char_tokenizer(LETTERS))


def sft(values: dict[str, Any]) -> Any:
    config = load(SFTRunConfig, {"model": MODEL, "sft": {"batch_size": 8}, **values})
    tokenizer = char_tokenizer(LETTERS)
    return SFTTrainer(config, samples=SAMPLES, eval_samples=SAMPLES[:4], tokenizer=tokenizer)


def reward_model(values: dict[str, Any]) -> Any:
    config = load(RewardModelRunConfig, {"model": MODEL, "reward_model": {"batch_size": 8}, **values})
    tokenizer = char_tokenizer(LETTERS)
    return RewardModelTrainer(config, samples=SCORED, eval_samples=SCORED[:6], tokenizer=tokenizer)


def ilql(values: dict[str, Any]) -> Any:
    base = {"model": MODEL, "generation": {"max_new_tokens": 6}, "ilql": {"batch_size": 8}, **values}
    config = load(ILQLRunConfig, base)
    return ILQLTrainer(
        config,
        samples=SAMPLES,
        rewards=[float(sample.count("a")) for sample in SAMPLES],
        eval_prompts=list(LETTERS),
        reward=share_of_a,
        tokenizer=char_tokenizer(LETTERS),
    )


def rft(values: dict[str, Any]) -> Any:
    sampled = {"n_generations_per_prompt": 4, "n_improve_steps": 3, "batch_size": 8, "updates_per_step": 2}
    base = {"model": MODEL, "generation": {"max_new_tokens": 6}, "rft": sampled, **values}
    config = load(RFTRunConfig, base)
    return RFTTrainer(config, reward=share_of_a, prompts=list(LETTERS), tokenizer=char_tokenizer(LETTERS))


KINDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "ppo": ppo,
    "grpo": grpo,
    "sft": sft,
    "reward_model": reward_model,
    "ilql": ilql,
    "rft": rft,
}


def main(argv: Sequence[str]) -> None:
    """Train, or go on with what stands in RUN_DIR."""
    kind, run_dir, *overrides = argv
    torch.set_num_threads(1)
    train: dict[str, Any] = {**TRAIN, "run_dir": str(Path(run_dir)), "resume": "auto"}
    for override in overrides:
        key, value = override.split("=", 1)
        if key == "file_bytes_of_rank_1":  # a write beyond that fails as on a full disk
            if os.environ["RANK"] == "1":
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(value), resource.RLIM_INFINITY))
        else:
            train[key] = yaml.safe_load(value)
    scheduler = {"name": "cosine", "warmup_updates": 3}
    trainer = KINDS[kind]({"train": train, "optimizer": {"learning_rate": 2e-3}, "scheduler": scheduler})
    trainer.fit()
    trainer.close()


if __name__ == "__main__":
    # As a module of its own name, so that the run's classes are those that tests import.
    run_main(main) if len(sys.argv) > 2 else sys.exit(__doc__)

"""A PPO run whose reward is the share of the letter `a` in the output: learned from scratch in seconds.

python -m tests.integration.letters_run RUN_DIR key=value ...      (also under torchrun)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from conch.cli import run_main
from conch.config import load
from conch.trainers.ppo import PPORunConfig, PPOTrainer
from tests.tiny import char_tokenizer

LETTERS = "abcdefgh"
SETTINGS = {
    "model": {
        "architecture": {
            "model_type": "gpt2",
            "n_layer": 2,
            "n_embd": 32,
            "n_head": 2,
            "n_positions": 16,
            "vocab_size": len(LETTERS) + 3,
            "eos_token_id": len(LETTERS) + 1,
            "bos_token_id": None,
            "pad_token_id": len(LETTERS),
        }
    },
    "optimizer": {"learning_rate": 2e-3},
    "scheduler": {"name": "constant"},
    "generation": {"max_new_tokens": 6, "chunk_size": 32},
    "ppo": {"rollouts_per_step": 64, "kl": {"coef": 0.01}},
    "train": {"total_steps": 30, "eval_every": 10, "eval_repeats": 16},
}


def share_of_a(
    samples: Sequence[str], prompts: Sequence[str], outputs: Sequence[str], **_: Any
) -> list[float]:
    """Reward in [0, 1]."""
    return [output.count("a") / max(1, len(output)) for output in outputs]


def main(argv: Sequence[str]) -> None:
    """Train with `key=value` overrides."""
    run_dir, *overrides = argv
    values: dict[str, Any] = yaml.safe_load(yaml.safe_dump(SETTINGS))
    values["train"]["run_dir"] = str(Path(run_dir))
    for override in overrides:
        key, value = override.split("=", 1)
        *sections, name = key.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = yaml.safe_load(value)
    trainer = PPOTrainer(
        load(PPORunConfig, values),
        reward=share_of_a,
        prompts=list(LETTERS),
        tokenizer=char_tokenizer(LETTERS),
    )
    print(f"rank {trainer.collectives.rank} of {trainer.collectives.num_ranks}", flush=True)
    trainer.fit()
    trainer.close()


if __name__ == "__main__":
    run_main(main)

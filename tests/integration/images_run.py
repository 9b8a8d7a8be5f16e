"""Two steps each of SFT, PPO, GRPO and reward modelling, of a model of texts and images.

torchrun --nproc_per_node 2 ... -m tests.integration.images_run FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from conch.config import load
from conch.trainers.reward_model import RewardModelRunConfig, RewardModelTrainer
from tests.odd_families import TOKENIZER, gemma3_model, gemma3_shape
from tests.runs import grpo_trainer, ppo_trainer, sft_trainer


def main(folder: Path) -> None:
    """Train each for two steps, and print the number of ranks."""
    texts = [{"prompt": "ab", "completion": "cd"}, {"prompt": "efg", "completion": "h"}] * 8
    for name, make in (("ppo", ppo_trainer), ("grpo", grpo_trainer)):
        two_steps(make(folder / name, lm=gemma3_model()))
    two_steps(sft_trainer(folder / "sft", texts, lm=gemma3_model(), tokenizer=TOKENIZER))
    settings = {
        "model": {"architecture": gemma3_shape()},
        "reward_model": {"batch_size": 8, "max_length": 16},
        "train": {"run_dir": folder / "reward"},
    }
    rows = [{"text": "ab", "score": 1.0}, {"text": "cde", "score": 0.0}] * 8
    trainer = two_steps(
        RewardModelTrainer(load(RewardModelRunConfig, settings), samples=rows, tokenizer=TOKENIZER)
    )
    print(f"done on {trainer.collectives.num_ranks} ranks")
    trainer.close()


def two_steps(trainer: Any) -> Any:
    for _ in range(2):
        trainer.step()
    return trainer


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""A run of GRPO on letters that a sweep starts: `python -m tests.integration.sweep_run -m key=a,b`.

The reward is the share of the letter a, or what `reward.url` serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from conch.cli import load_run_config, run_main
from conch.trainers.grpo import GRPORunConfig, GRPOTrainer
from tests.integration.letters_run import LETTERS, share_of_a
from tests.tiny import char_tokenizer

CONFIGS = Path(__file__).resolve().parents[1] / "fakes" / "sweep_configs"


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value` overrides of `letters.yaml`."""
    config = load_run_config(GRPORunConfig, argv, default_name="letters", config_dir=CONFIGS)
    torch.set_num_threads(1)
    reward = share_of_a if config.reward.url is None else None
    trainer = GRPOTrainer(config, reward=reward, prompts=list(LETTERS), tokenizer=char_tokenizer(LETTERS))
    trainer.fit()
    trainer.close()


if __name__ == "__main__":
    run_main(main)

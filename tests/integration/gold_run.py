"""A PPO run of a tiny policy that gold watches: torchrun ... -m tests.integration.gold_run FOLDER URL

Each of three steps is evaluated; gold is asked for one sample at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conch.cli import run_main
from conch.trainers.ppo import PPOTrainer
from tests.runs import ppo_trainer


def watched_trainer(folder: Path, url: str) -> PPOTrainer:
    """Greedy evaluations of two completions a prompt, so that ranks sample what one process does."""
    client: dict[str, Any] = {"connect_timeout_s": 1.0, "request_timeout_s": 2.0, "deadline_s": 3.0}
    client |= {"batch_rows": 1, "max_in_flight": 1, "cache_size": 0}
    return ppo_trainer(
        folder,
        evaluation={"gold": url, "gold_client": client},
        eval_generation={"do_sample": False},
        train={"total_steps": 3, "eval_every": 1, "eval_repeats": 2},
    )


def main(argv: Sequence[str]) -> None:
    """Train; the run's folder is FOLDER."""
    trainer = watched_trainer(Path(argv[0]), argv[1])
    try:
        trainer.fit()
    finally:
        trainer.close()


if __name__ == "__main__":
    run_main(main)

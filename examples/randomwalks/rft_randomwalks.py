"""RFT from the SFT policy, with exact optimality as the reward: from the checkout,

    python -m examples.randomwalks.rft_randomwalks train.seed=1
    accelerate launch --num_processes 2 -m examples.randomwalks.rft_randomwalks train.total_steps=50

The first run trains the SFT policy as well (see `sft_start.py`), unless `model.path` names another start.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conch.cli import load_run_config, run_main
from conch.trainers.rft import RFTRunConfig, RFTTrainer
from examples.randomwalks.measured import fit_and_measure
from examples.randomwalks.sft_start import GRAPH_SEED, sft_folder, sft_start
from examples.randomwalks.task import RandomWalks

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def train(config: RFTRunConfig) -> dict[str, float]:
    """Train, and return the final measurement on about 4,000 walks."""
    if config.model.path is not None and Path(config.model.path) == sft_folder(config.train.output_dir):
        sft_start(config.train.output_dir)
    task = RandomWalks(GRAPH_SEED)

    def optimality(samples: Sequence[str], **_: Any) -> list[float]:
        return [task.optimality(walk) for walk in samples]

    trainer = RFTTrainer(config, reward=optimality, prompts=task.start_nodes, metric_fn=task.metric)
    return fit_and_measure(trainer, task)


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value` overrides of `configs/randomwalks/rft.yaml`."""
    train(load_run_config(RFTRunConfig, argv, default_name="randomwalks/rft", config_dir=CONFIGS))


if __name__ == "__main__":
    run_main(main)

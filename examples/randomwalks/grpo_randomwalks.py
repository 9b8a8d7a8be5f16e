"""GRPO from the SFT policy, with exact optimality as the reward: from the checkout,

    python -m examples.randomwalks.grpo_randomwalks train.seed=1
    accelerate launch --num_processes 2 -m examples.randomwalks.grpo_randomwalks train.total_steps=50

The first run trains the SFT policy as well (see `sft_start.py`), unless `model.path` names another start.
No value function is learned: each walk is compared with the others from its node.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conch.cli import load_run_config, run_main
from conch.config.algorithms.grpo import GRPORunConfig
from examples.randomwalks.measured import fit_and_measure
from examples.randomwalks.sft_start import GRAPH_SEED, ensure_sft_start
from examples.randomwalks.task import RandomWalks

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def train(config: GRPORunConfig) -> dict[str, float]:
    """Train, and return the final measurements on about 4,000 walks, sampled and greedy."""
    from conch.trainers.grpo import GRPOTrainer  # loads torch, which help and mistyped keys do without

    ensure_sft_start(config)
    task = RandomWalks(GRAPH_SEED)
    trainer = GRPOTrainer(config, reward=task.reward, prompts=task.start_nodes, metric_fn=task.metric)
    return fit_and_measure(trainer, task)


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value` overrides of `configs/randomwalks/grpo.yaml`."""
    train(load_run_config(GRPORunConfig, argv, default_name="randomwalks/grpo", config_dir=CONFIGS))


if __name__ == "__main__":
    run_main(main)

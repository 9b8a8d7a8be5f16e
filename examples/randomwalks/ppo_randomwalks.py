"""PPO from the SFT policy, with exact optimality as the reward: from the checkout,

    python -m examples.randomwalks.ppo_randomwalks train.seed=1
    accelerate launch --num_processes 2 -m examples.randomwalks.ppo_randomwalks train.total_steps=50

The first run trains the SFT policy as well (see `sft_start.py`), unless `model.path` names another start.
`quickstart.py` does the same against a reward model that is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conch.cli import load_run_config, run_main
from conch.config.algorithms.ppo import PPORunConfig
from examples.randomwalks.measured import fit_and_measure
from examples.randomwalks.sft_start import GRAPH_SEED, ensure_sft_start
from examples.randomwalks.task import RandomWalks

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def train(config: PPORunConfig) -> dict[str, float]:
    """Train, and return the final measurements on about 4,000 walks, sampled and greedy."""
    from conch.trainers.ppo import PPOTrainer  # loads torch, which help and mistyped keys do without

    ensure_sft_start(config)
    task = RandomWalks(GRAPH_SEED)
    trainer = PPOTrainer(config, reward=task.reward, prompts=task.start_nodes, metric_fn=task.metric)
    return fit_and_measure(trainer, task)


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value` overrides of `configs/randomwalks/ppo_exact.yaml`."""
    train(load_run_config(PPORunConfig, argv, default_name="randomwalks/ppo_exact", config_dir=CONFIGS))


if __name__ == "__main__":
    run_main(main)

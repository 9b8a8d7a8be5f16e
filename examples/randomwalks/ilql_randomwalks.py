"""ILQL from scratch on 1,000 random walks: from the checkout,

    python -m examples.randomwalks.ilql_randomwalks train.seed=1
    accelerate launch --num_processes 2 -m examples.randomwalks.ilql_randomwalks train.total_steps=50

The walks are good and bad, 0.35 optimal in the mean, and so is what the language model learns to write
(`eval/optimality@beta=0`). The Q heads learn which letters led to rewards, and decoding by them
(`eval/optimality@beta=100`) combines the good parts of walks into better ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from conch.cli import load_run_config, run_main
from conch.config.algorithms.ilql import ILQLRunConfig
from examples.randomwalks.measured import fit_and_measure
from examples.randomwalks.task import RandomWalks, letter_tokenizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GRAPH_SEED = 1000


def train(config: ILQLRunConfig) -> dict[str, float]:
    """Train, and return the final measurement on about 4,000 walks for each beta."""
    from conch.trainers.ilql import ILQLTrainer  # loads torch, which help and mistyped keys do without

    task = RandomWalks(GRAPH_SEED)
    trainer = ILQLTrainer(
        config,
        samples=[(walk[:1], walk[1:]) for walk in task.walks],
        rewards=[task.optimality(walk) for walk in task.walks],
        eval_prompts=task.start_nodes,
        metric_fn=task.metric,
        tokenizer=letter_tokenizer(),
    )
    return fit_and_measure(trainer, task)


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value` overrides of `configs/randomwalks/ilql.yaml`."""
    train(load_run_config(ILQLRunConfig, argv, default_name="randomwalks/ilql", config_dir=CONFIGS))


if __name__ == "__main__":
    run_main(main)

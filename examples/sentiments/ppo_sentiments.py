"""PPO of a writer of film reviews: its reward is P(positive) of what it wrote. From this folder,

    python ppo_sentiments.py
    accelerate launch --num_processes 7 --config_file ../../configs/accelerate/ddp.yaml ppo_sentiments.py

TRITON_HOST=host:port/model names a server; without it the classifier is hosted here, on the last GPU.
CONFIG_NAME=tiny is for a CPU and a local file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `examples` is not installed

from conch.cli import load_run_config, run_main
from conch.config.algorithms.ppo import PPORunConfig
from conch.evaluation.metrics import MetricFn
from examples.hosting import served_reward
from examples.sentiments.positive import HostedDistilBERT, positive_reward
from examples.sentiments.reviews import ReviewsConfig, preset, prompts, reviews


class PPOSentimentsConfig(PPORunConfig):
    """A PPO run, its prompts, and the classifier that it may have to host."""

    reviews: ReviewsConfig = ReviewsConfig()
    hosted: HostedDistilBERT = HostedDistilBERT()


def train(config: PPOSentimentsConfig, metric_fn: MetricFn | None = None) -> Path:
    """Train; returns the run's folder. metric_fn: measures evaluations besides."""
    from conch.trainers.ppo import PPOTrainer  # loads torch, which help and mistyped keys do without

    rows, _ = reviews(config.data, config.reviews)
    with served_reward(config.reward, config.hosted) as endpoint:
        trainer = PPOTrainer(
            config,
            reward=positive_reward(endpoint, config.reward),
            prompts=prompts(rows, config.reviews),
            eval_prompts=list(config.reviews.eval_prompts),
            metric_fn=metric_fn,
        )
        try:
            return trainer.fit()
        finally:
            trainer.close()


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value` overrides of `configs/sentiments/ppo_<CONFIG_NAME>.yaml`."""
    train(load_run_config(PPOSentimentsConfig, argv, default_name=preset("ppo")))


if __name__ == "__main__":
    run_main(main)

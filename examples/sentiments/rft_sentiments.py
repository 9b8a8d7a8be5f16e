"""RFT of a writer of film reviews: of several continuations of a prompt it imitates those with the highest
P(positive). From this folder,

    python rft_sentiments.py
    accelerate launch --num_processes 7 --config_file ../../configs/accelerate/ddp.yaml rft_sentiments.py

TRITON_HOST=host:port/model names a server; without it the classifier is hosted here, on the last GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `examples` is not installed

from conch.cli import load_run_config, run_main
from conch.config.algorithms.rft import RFTRunConfig
from examples.hosting import served_reward
from examples.sentiments.positive import HostedDistilBERT, positive_reward
from examples.sentiments.reviews import ReviewsConfig, preset, prompts, reviews


class RFTSentimentsConfig(RFTRunConfig):
    """An RFT run, its prompts, and the classifier that it may have to host."""

    reviews: ReviewsConfig = ReviewsConfig()
    hosted: HostedDistilBERT = HostedDistilBERT()


def train(config: RFTSentimentsConfig) -> Path:
    """Train; returns the run's folder."""
    from conch.trainers.rft import RFTTrainer  # loads torch, which help and mistyped keys do without

    rows, _ = reviews(config.data, config.reviews)
    with served_reward(config.reward, config.hosted) as endpoint:
        trainer = RFTTrainer(
            config,
            reward=positive_reward(endpoint, config.reward),
            prompts=prompts(rows, config.reviews),
            eval_prompts=list(config.reviews.eval_prompts),
        )
        try:
            return trainer.fit()
        finally:
            trainer.close()


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value` overrides of `configs/sentiments/rft_<CONFIG_NAME>.yaml`."""
    train(load_run_config(RFTSentimentsConfig, argv, default_name=preset("rft")))


if __name__ == "__main__":
    run_main(main)

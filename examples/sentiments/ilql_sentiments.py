"""ILQL of a writer of film reviews, on reviews rewarded with their label, measured by P(positive) of what it
writes then. From this folder,

    python ilql_sentiments.py
    accelerate launch --num_processes 7 --config_file ../../configs/accelerate/ddp.yaml ilql_sentiments.py

TRITON_HOST=host:port/model names a server; without it the classifier is hosted here, on the last GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `examples` is not installed

from pydantic import Field

from conch.cli import load_run_config, run_main
from conch.config.algorithms.ilql import ILQLRunConfig
from examples.hosting import served_reward
from examples.sentiments.positive import HostedDistilBERT, positive_reward
from examples.sentiments.reviews import ReviewsConfig, preset, reviews


class ILQLSentimentsConfig(ILQLRunConfig):
    """An ILQL run, its reviews, and the classifier that it may have to host."""

    reviews: ReviewsConfig = ReviewsConfig()
    hosted: HostedDistilBERT = HostedDistilBERT()

    max_words: int | None = Field(default=None, ge=1)
    """Learn from so many first words of a review; None learns from all of it."""


def train(config: ILQLSentimentsConfig) -> Path:
    """Train; returns the run's folder."""
    from conch.trainers.ilql import ILQLTrainer  # loads torch, which help and mistyped keys do without

    rows, _ = reviews(config.data, config.reviews)
    with served_reward(config.reward, config.hosted) as endpoint:
        trainer = ILQLTrainer(
            config,
            samples=[" ".join(row.text.split(" ")[: config.max_words]) for row in rows],
            rewards=[float(row.label) for row in rows],
            eval_prompts=list(config.reviews.eval_prompts),
            reward=positive_reward(endpoint, config.reward),
        )
        try:
            return trainer.fit()
        finally:
            trainer.close()


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value` overrides of `configs/sentiments/ilql_<CONFIG_NAME>.yaml`."""
    train(load_run_config(ILQLSentimentsConfig, argv, default_name=preset("ilql")))


if __name__ == "__main__":
    run_main(main)

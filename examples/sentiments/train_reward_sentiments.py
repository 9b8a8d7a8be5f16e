"""A classifier of film reviews whose score is the log-odds of P(positive), also of unfinished ones: from this
folder,

    python train_reward_sentiments.py
    python to_triton.py --checkpoint outputs/sentiments/reward_model --name reviews
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `examples` is not installed

from pydantic import Field

from conch.cli import load_run_config, run_main
from conch.config.algorithms.reward_model import RewardModelRunConfig
from examples.byte_pairs import tokenizer_for
from examples.sentiments.reviews import ReviewsConfig, pairs, preset, reviews


class RewardSentimentsConfig(RewardModelRunConfig):
    """A reward-model run and its reviews."""

    reviews: ReviewsConfig = ReviewsConfig()

    rounds: int = Field(default=4, ge=1)
    """Pairs that each training review is in, with another review and cut at another word each time."""


def train(config: RewardSentimentsConfig) -> Path:
    """Train; returns the run's folder."""
    # It loads torch, which help and mistyped keys do without.
    from conch.trainers.reward_model import RewardModelTrainer

    rows, held_out = reviews(config.data, config.reviews)
    tokenizer = tokenizer_for(config.model, config.tokenizer, [row.text for row in rows])
    eos, seed = str(tokenizer.eos_token), config.train.seed
    trainer = RewardModelTrainer(
        config,
        samples=pairs(rows, eos, rounds=config.rounds, seed=seed),
        eval_samples=pairs(held_out, eos, rounds=1, seed=seed),
        tokenizer=tokenizer,
    )
    try:
        return trainer.fit()
    finally:
        trainer.close()


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value` overrides of `configs/sentiments/reward_model_<CONFIG_NAME>.yaml`."""
    train(load_run_config(RewardSentimentsConfig, argv, default_name=preset("reward_model")))


if __name__ == "__main__":
    run_main(main)

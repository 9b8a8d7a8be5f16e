"""SFT of a writer of film reviews on positive ones, measured by P(positive) of what it writes. From this
folder,

    python sft_sentiments.py
    accelerate launch --num_processes 7 --config_file ../../configs/accelerate/ddp.yaml sft_sentiments.py

TRITON_HOST=host:port/model names a server; without it the classifier is hosted here, on the last GPU.
`learn=all measure_reward=false` teaches to write reviews of either kind and needs no classifier: what PPO,
ILQL and RFT of the tiny presets start from.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `examples` is not installed

from conch.cli import load_run_config, run_main
from conch.config.algorithms.sft import SFTRunConfig
from conch.rewards.base import UserReward
from examples.byte_pairs import tokenizer_for
from examples.hosting import served_reward
from examples.sentiments.positive import HostedDistilBERT, positive_reward
from examples.sentiments.reviews import ReviewsConfig, preset, reviews


class SFTSentimentsConfig(SFTRunConfig):
    """An SFT run, its reviews, and the classifier that it may have to host."""

    reviews: ReviewsConfig = ReviewsConfig()
    hosted: HostedDistilBERT = HostedDistilBERT()

    learn: Literal["positive", "all"] = "positive"
    """Which reviews are imitated."""

    measure_reward: bool = True
    """Whether evaluations write on from the evaluation prompts and have that scored."""


def train(config: SFTSentimentsConfig) -> Path:
    """Train; returns the run's folder."""
    if not config.measure_reward:
        return _fit(config, None)
    with served_reward(config.reward, config.hosted) as endpoint:
        return _fit(config, positive_reward(endpoint, config.reward))


def _fit(config: SFTSentimentsConfig, reward: UserReward | None) -> Path:
    from conch.trainers.sft import SFTTrainer  # loads torch, which help and mistyped keys do without

    rows, held_out = reviews(config.data, config.reviews)
    learned, measured = (
        [row.text for row in part if config.learn == "all" or row.label] for part in (rows, held_out)
    )
    trainer = SFTTrainer(
        config,
        samples=learned,
        eval_samples=measured,
        eval_prompts=None if reward is None else list(config.reviews.eval_prompts),
        reward=reward,
        tokenizer=tokenizer_for(config.model, config.tokenizer, [row.text for row in rows]),
    )
    try:
        return trainer.fit()
    finally:
        trainer.close()


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value` overrides of `configs/sentiments/sft_<CONFIG_NAME>.yaml`."""
    train(load_run_config(SFTSentimentsConfig, argv, default_name=preset("sft")))


if __name__ == "__main__":
    run_main(main)

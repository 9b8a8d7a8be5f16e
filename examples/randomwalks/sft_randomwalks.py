"""SFT from scratch on random walks: from the checkout,

    python -m examples.randomwalks.sft_randomwalks train.seed=1
    python -m examples.randomwalks.sft_randomwalks best_share=0.3
    accelerate launch --num_processes 2 -m examples.randomwalks.sft_randomwalks train.total_steps=50

The model learns to walk along the graph as the walks do, good and bad, and is about as optimal as they are
(0.35). Taught by the best three tenths of them alone, 0.91 optimal in the mean, it comes to about 0.8.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from conch.cli import load_run_config, run_main
from conch.config.algorithms.sft import SFTRunConfig
from examples.randomwalks.measured import fit_and_measure
from examples.randomwalks.task import RandomWalks, letter_tokenizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GRAPH_SEED = 1000
NUM_HELD_OUT = 100


class SFTRandomWalksConfig(SFTRunConfig):
    """An SFT run, and which walks it learns from."""

    best_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the walks to learn from, the most optimal first; 1 takes all."""


def train(config: SFTRandomWalksConfig) -> dict[str, float]:
    """Train, and return the final measurement: the loss on held-out walks, and the optimality of about 4,000
    sampled ones."""
    from conch.trainers.sft import SFTTrainer  # loads torch, which help and mistyped keys do without

    task = RandomWalks(GRAPH_SEED)
    walks = task.walks[NUM_HELD_OUT:]
    best = sorted(walks, key=task.optimality, reverse=True)
    trainer = SFTTrainer(
        config,
        samples=best[: round(config.best_share * len(best))],
        eval_samples=task.walks[:NUM_HELD_OUT],
        eval_prompts=task.start_nodes,
        metric_fn=task.metric,
        tokenizer=letter_tokenizer(),
    )
    return fit_and_measure(trainer, task)


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value` overrides of `configs/randomwalks/sft.yaml`."""
    # The file leaves evaluations off, for those who want nothing but the trained policy.
    overrides = ["train.eval_every=20", *argv]
    train(
        load_run_config(SFTRandomWalksConfig, overrides, default_name="randomwalks/sft", config_dir=CONFIGS)
    )


if __name__ == "__main__":
    run_main(main)

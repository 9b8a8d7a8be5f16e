r"""The reward model of Helpful & Harmless, from pairs of answers of which people chose one: from this folder,

    accelerate launch --num_processes 8 --config_file ../../configs/accelerate/zero2-bf16.yaml \
        train_reward_hh.py
    python to_triton.py --checkpoint outputs/hh/reward_model --name hh-rm
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `examples` is not installed

from conch.cli import load_run_config, run_main
from conch.config.algorithms.reward_model import RewardModelRunConfig
from examples.byte_pairs import tokenizer_for
from examples.hh.hh_data import Comparison, comparisons, preset


def train(config: RewardModelRunConfig) -> Path:
    """Train; returns the run's folder."""
    # It loads torch, which help and mistyped keys do without.
    from conch.trainers.reward_model import RewardModelTrainer

    rows, held_out = comparisons(config.data)
    trainer = RewardModelTrainer(
        config,
        samples=_pairs(rows),
        eval_samples=_pairs(held_out),
        tokenizer=tokenizer_for(config.model, config.tokenizer, [row.prompt + row.chosen for row in rows]),
    )
    try:
        return trainer.fit()
    finally:
        trainer.close()


def _pairs(rows: Sequence[Comparison]) -> list[dict[str, str]]:
    return [{"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in rows]


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value` overrides of `configs/hh/reward_model_<CONFIG_NAME>.yaml`."""
    name = preset("reward_model")
    train(load_run_config(RewardModelRunConfig, argv, default_name=name))


if __name__ == "__main__":
    run_main(main)

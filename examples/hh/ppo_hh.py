"""PPO of an assistant against a served reward model, relative to the answers that people chose: from this
folder,

    accelerate launch --num_processes 7 --config_file ../../configs/accelerate/zero2-bf16.yaml ppo_hh.py
    CONFIG_NAME=125M accelerate launch ... ppo_hh.py train.total_steps=50

TRITON_HOST=host:port/model names the server; without it the reward model is hosted here, on the last GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `examples` is not installed

from conch.cli import load_run_config, run_main
from conch.config.algorithms.ppo import PPORunConfig
from examples.hh.hh_data import comparisons, preset, with_originals
from examples.hh.hh_reward import HostedGPTJ
from examples.hosting import served_reward


class PPOHHConfig(PPORunConfig):
    """A PPO run, and the reward model that it may have to host."""

    hosted: HostedGPTJ = HostedGPTJ()


def train(config: PPOHHConfig) -> Path:
    """Train; returns the run's folder."""
    from conch.trainers.ppo import PPOTrainer  # loads torch, which help and mistyped keys do without

    rows, held_out = comparisons(config.data)
    with served_reward(config.reward, config.hosted) as endpoint:
        trainer = PPOTrainer(
            config,
            reward=endpoint,
            prompts=with_originals(rows),
            eval_prompts=with_originals(held_out),
        )
        try:
            return trainer.fit()
        finally:
            trainer.close()


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value` overrides of `configs/hh/ppo_<CONFIG_NAME>.yaml`."""
    train(load_run_config(PPOHHConfig, argv, default_name=preset("ppo")))


if __name__ == "__main__":
    run_main(main)

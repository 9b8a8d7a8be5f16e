"""PPO with a dense reward: each token gets by how much it changed P(positive). From this folder,

    python train_reward_sentiments.py
    python dense_ppo_sentiments.py

The classifier must give log-odds at each token, of the very tokens that the policy writes: a decoder with the
policy's tokenizer, converted with `--form token --granularity token`. DistilBERT reads whole texts only, so
the classifier here is the one that `train_reward_sentiments.py` trains.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `examples` is not installed

from conch.cli import load_run_config, run_main
from examples.sentiments.ppo_sentiments import PPOSentimentsConfig, train
from examples.sentiments.reviews import preset


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value` overrides of `configs/sentiments/dense_ppo_<CONFIG_NAME>.yaml`."""
    train(load_run_config(PPOSentimentsConfig, argv, default_name=preset("dense_ppo")))


if __name__ == "__main__":
    run_main(main)

"""SFT of an assistant on the answers that people chose, measured by the served reward: from this folder,

    accelerate launch --num_processes 7 --config_file ../../configs/accelerate/zero2-bf16.yaml sft_hh.py

TRITON_HOST=host:port/model names the server; without it the reward model is hosted here, on the last GPU.
`measure_reward=false` does without.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `examples` is not installed

from conch.cli import load_run_config, run_main
from conch.config.algorithms.sft import SFTRunConfig
from conch.rewards.base import RewardSource
from examples.byte_pairs import tokenizer_for
from examples.hh.hh_data import Comparison, comparisons, preset, with_originals
from examples.hh.hh_reward import HostedGPTJ, delta_source
from examples.hosting import served_reward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SFTHHConfig(SFTRunConfig):
    """An SFT run, and the reward model that it may have to host."""

    hosted: HostedGPTJ = HostedGPTJ()

    measure_reward: bool = True
    """Whether evaluations sample answers to held-out prompts and have them scored."""


def train(config: SFTHHConfig) -> Path:
    """Train; returns the run's folder."""
    rows, held_out = comparisons(config.data)
    texts = [row.prompt + row.chosen for row in rows]
    tokenizer = tokenizer_for(config.model, config.tokenizer, texts)
    if not config.measure_reward:
        return _fit(config, texts, held_out, tokenizer, None)
    with served_reward(config.reward, config.hosted) as endpoint:
        source = delta_source(endpoint, config.reward, with_originals(held_out), tokenizer)
        return _fit(config, texts, held_out, tokenizer, source)


def _fit(
    config: SFTHHConfig,
    texts: Sequence[str],
    held_out: Sequence[Comparison],
    tokenizer: PreTrainedTokenizerBase,
    reward: RewardSource | None,
) -> Path:
    from conch.trainers.sft import SFTTrainer  # loads torch, which help and mistyped keys do without

    trainer = SFTTrainer(
        config,
        samples=texts,
        eval_samples=[row.prompt + row.chosen for row in held_out],
        eval_prompts=with_originals(held_out) if reward is not None else None,
        reward=reward,
        tokenizer=tokenizer,
    )
    try:
        return trainer.fit()
    finally:
        trainer.close()


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value` overrides of `configs/hh/sft_<CONFIG_NAME>.yaml`."""
    train(load_run_config(SFTHHConfig, argv, default_name=preset("sft")))


if __name__ == "__main__":
    run_main(main)

"""ILQL of an assistant on chosen answers, rewarded with 1, and rejected ones, with -1, measured by the served
reward: from this folder,

    accelerate launch --num_processes 7 --config_file ../../configs/accelerate/zero2-bf16.yaml ilql_hh.py

TRITON_HOST=host:port/model names the server; without it the reward model is hosted here, on the last GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `examples` is not installed

from conch.cli import load_run_config, run_main
from conch.config.algorithms.ilql import ILQLRunConfig
from examples.byte_pairs import tokenizer_for
from examples.hh.hh_data import comparisons, preset, with_originals
from examples.hh.hh_reward import HostedGPTJ, delta_source
from examples.hosting import served_reward


class ILQLHHConfig(ILQLRunConfig):
    """An ILQL run, and the reward model that it may have to host."""

    hosted: HostedGPTJ = HostedGPTJ()


def train(config: ILQLHHConfig) -> Path:
    """Train; returns the run's folder."""
    from conch.trainers.ilql import ILQLTrainer  # loads torch, which help and mistyped keys do without

    rows, held_out = comparisons(config.data)
    answers = [(row.prompt, answer) for row in rows for answer in (row.chosen, row.rejected)]
    tokenizer = tokenizer_for(config.model, config.tokenizer, [prompt + answer for prompt, answer in answers])
    prompts = with_originals(held_out)
    with served_reward(config.reward, config.hosted) as endpoint:
        trainer = ILQLTrainer(
            config,
            samples=answers,
            rewards=[1.0, -1.0] * len(rows),
            eval_prompts=prompts,
            reward=delta_source(endpoint, config.reward, prompts, tokenizer),
            tokenizer=tokenizer,
        )
        try:
            return trainer.fit()
        finally:
            trainer.close()


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value` overrides of `configs/hh/ilql_<CONFIG_NAME>.yaml`."""
    train(load_run_config(ILQLHHConfig, argv, default_name=preset("ilql")))


if __name__ == "__main__":
    run_main(main)

"""What all trainers share: the loop, checkpoints, reward shaping, evaluation set-up; trainers as programs.

A program's settings are read, and refused, before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from conch.cli import load_run_config, run_main
from conch.config import OnlineRunConfig, RunConfig
from conch.config.algorithms import run_config_of
from conch.machine.imports import uncollected


def train(algorithm: str, argv: Sequence[str]) -> None:
    """Train by a command line: `key=value ...`.

    algorithm: name of a file in `trainers/`.

    Raises:
        ConchError: bad settings or data.
        SystemExit: see `conch.cli.load_run_config` and `conch.training.loop.fit`.
    """
    config = load_run_config(
        run_config_of(algorithm), argv, default_name=algorithm, check=check_sources_named
    )
    reward = getattr(config, "reward", None)
    if reward is not None and reward.function is not None and reward.replay is None:
        from conch.rewards.factory import named_function

        named_function(reward.function)  # a mistake in it is told before a model is loaded
    # Trainers bring torch and transformers, which takes seconds: not before there is something to train.
    with uncollected():
        trainer = import_module(f"conch.trainers.{algorithm}")
        from conch.runs.checkpoint import no_model_bars
    with no_model_bars():
        trainer.run(config)


def check_sources_named(config: RunConfig) -> None:
    """See that a run's rewards and data are named, and that their files are there: all that takes no torch.

    Raises:
        ConfigError, DataError: they are not.
    """
    from conch.data.files import check_rows_named
    from conch.rewards.factory import check_gold_named, check_reward_named

    samples = isinstance(config, OnlineRunConfig)
    reward, evaluation = getattr(config, "reward", None), getattr(config, "evaluation", None)
    if reward is not None:
        check_reward_named(reward, required=samples)
    if evaluation is not None and evaluation.gold is not None:
        check_gold_named(evaluation.gold)
    check_rows_named(config.data, "prompts" if samples else "samples")


def run_program(algorithm: str) -> NoReturn:
    """Run `python -m conch.trainers.<algorithm>`, and leave with its exit code."""
    run_main(lambda argv: train(algorithm, argv))

"""Small runs of asynchronous GRPO on rollout servers, to be killed and resumed; also under torchrun.

python -m tests.integration.async_run RUN_DIR ADDRESSES key=value ...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import yaml

from conch.cli import run_main
from tests.runs import async_grpo_trainer, grpo_trainer, policy

TRAIN = {"total_steps": 12, "resume": "auto"}


def main(argv: Sequence[str]) -> None:
    """Train, or go on with what stands in RUN_DIR.

    `synchronous=true` waits for each step's samples; `dtype=float32` is of the policy's weights.
    """
    run_dir, addresses, *overrides = argv
    torch.set_num_threads(1)
    settings: dict[str, Any] = {"train": {**TRAIN}, "rollout": {"urls": addresses}}
    for override in overrides:
        name, value = override.split("=", 1)
        section, _, key = name.rpartition(".")
        values = settings.setdefault(section, {}) if section else settings
        values[key] = yaml.safe_load(value)
    make = grpo_trainer if settings.pop("synchronous", False) else async_grpo_trainer
    lm = policy(dtype=getattr(torch, settings.pop("dtype", "float64")))
    with closing(make(Path(run_dir), lm=lm, **settings)) as trainer:
        trainer.fit()


if __name__ == "__main__":
    run_main(main) if len(sys.argv) > 2 else sys.exit(__doc__)

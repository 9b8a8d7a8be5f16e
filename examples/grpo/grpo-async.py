"""GRPO as `grpo.py` does it, but completions are sampled while the model is trained: from this folder,

    python grpo-async.py
    python grpo-async.py --config-name grpo_ifeval
    python grpo-async.py train_model.num_devices=2 ref_model.num_devices=2 inference_model.num_devices=2
    python grpo-async.py train.max_staleness=2 train.partial_rollouts=true

Samplers are actors of Ray on devices of their own; training takes the oldest groups that they have finished.
`--print-config` shows all settings, and what they become of Conch's; README.md explains them.
"""

# ruff: noqa: N999  the name is that of TorchRL's program

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `examples` is not installed

from conch.cli import run_main
from examples.grpo import grpo
from examples.grpo.async_settings import AsyncExampleConfig


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value` overrides of `config/grpo_gsm8k.yaml`."""
    grpo.main(argv, AsyncExampleConfig)


if __name__ == "__main__":
    run_main(main)

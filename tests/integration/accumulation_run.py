"""A few updates of SFT under any launcher: how many optimizer steps these were, and what they found.

python -m tests.integration.accumulation_run FILE
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from conch.cli import run_main
from tests.integration.resume_run import KINDS


def main(argv: Sequence[str]) -> None:
    """Train for 4 updates of 2 micro-batches each."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        train = {"run_dir": str(Path(folder) / "run"), "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
        trainer = KINDS["sft"]({"train": train, "optimizer": {"learning_rate": 2e-3}})
        metrics = [trainer.step() for _ in range(4)]
        found = {"metrics": metrics, "optimizer_steps": trainer.engine.module.global_steps}
        Path(argv[0]).write_text(json.dumps(found))
        trainer.close()


if __name__ == "__main__":
    run_main(main) if len(sys.argv) > 1 else sys.exit(__doc__)

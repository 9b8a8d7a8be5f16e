"""Real steps of a trainer in a process of their own, and how much memory they took.

python -m tests.integration.sizing_run KIND RUN_DIR '{architecture}' '{sizes}' '{other settings of the model}'

Prints, as JSON, the bytes by which the process's resident memory grew at most (`peak`), and the bytes of the
trained module's parameters.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from conch.cli import run_main
from conch.config import load
from conch.trainers.ppo import PPORunConfig, PPOTrainer
from conch.trainers.sft import SFTRunConfig, SFTTrainer
from tests.tiny import char_tokenizer, decoder_shape

LETTERS = "abcdefgh"
SMALL = {"rows": 1, "prompt_length": 4, "response_length": 4, "generation_rows": 2}


def sft(values: dict[str, Any], size: dict[str, int]) -> SFTTrainer:
    pair = {"prompt": "a" * size["prompt_length"], "completion": "b" * (size["response_length"] - 1)}
    config = load(SFTRunConfig, {**values, "sft": {"batch_size": 2 * size["rows"]}})
    return SFTTrainer(config, samples=[pair] * 2 * size["rows"], tokenizer=char_tokenizer(LETTERS))


def distinct_prompts(count: int, length: int) -> list[str]:
    """Prompts that differ in their first two letters: equal ones would be read once for several samples."""
    pairs = (first + second for first in LETTERS for second in LETTERS)
    return [pair + "a" * (length - 2) for pair, _ in zip(pairs, range(count), strict=False)]


def ppo(values: dict[str, Any], size: dict[str, int]) -> PPOTrainer:
    settings = {
        "generation": {"max_new_tokens": size["response_length"], "chunk_size": size["generation_rows"]},
        "ppo": {
            "rollouts_per_step": 2 * size["rows"],
            "minibatches": 1,
            "epochs": 1,
            "forward_batch_size": 1,
        },
    }
    return PPOTrainer(
        load(PPORunConfig, {**values, **settings}),
        reward=lambda outputs, **_: [float(len(output)) for output in outputs],
        prompts=distinct_prompts(2 * size["rows"], size["prompt_length"]),
        tokenizer=char_tokenizer(LETTERS),
    )


def main(argv: Sequence[str]) -> None:
    """Two updates: the optimizer's state is there in the second."""
    kind, run_dir = argv[0], Path(argv[1])
    architecture, size, model = (json.loads(part) for part in argv[2:])
    torch.set_num_threads(1)
    _steps(kind, run_dir / "first", {"architecture": decoder_shape(architecture["model_type"])}, SMALL)
    before = psutil.Process().memory_info().rss  # with every library loaded
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    trainer = _steps(kind, run_dir / "second", {"architecture": architecture, **model}, size)
    parameters = sum(p.numel() * p.element_size() for p in trainer.engine.module.parameters())
    print(json.dumps({"peak": _highest() - before, "parameters": parameters}), flush=True)


def _steps(kind: str, run_dir: Path, model: dict[str, Any], size: dict[str, int]) -> SFTTrainer | PPOTrainer:
    train = {"run_dir": str(run_dir), "total_steps": 2, "gradient_accumulation_steps": 2}
    trainer = {"sft": sft, "ppo": ppo}[kind]({"model": model, "train": train}, size)
    for _ in range(2):
        trainer.step()
    return trainer


def _highest() -> int:
    """Largest resident memory since the peak was forgotten, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    run_main(main) if len(sys.argv) > 5 else sys.exit(__doc__)

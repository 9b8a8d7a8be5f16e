"""GRPO steps of TRL, one each time a line comes in: the other side of `benchmarks/grpo_step.py`.

    python -m benchmarks.trl_step SPEC

Runs in an environment with torch and trl, without Conch. SPEC is a file that `grpo_step` writes. A step is
what lies between TRL's callbacks `on_step_begin` and `on_step_end`: rollout, rewards, log-probs and update.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessorList, TrainerCallback

from benchmarks.forced_lengths import EndAt


class Turns(TrainerCallback):
    """Waits for its turn before each step and tells how long it took. tokens: the latest rollout's."""

    tokens = 0

    def __init__(self) -> None:
        self._started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Wait; without a line, the process that asks is gone."""
        if not sys.stdin.readline():
            sys.exit(1)
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Tell."""
        seconds = time.perf_counter() - self._started
        print("STEP " + json.dumps({"seconds": seconds, "tokens": self.tokens}), flush=True)


def settings(spec: dict[str, Any]) -> dict[str, Any]:
    """What `GRPOConfig` is told; all else is TRL's default, the optimizer among it."""
    micro_batches = spec["micro_batches"]
    completions = spec["prompts_per_step"] * spec["group_size"]
    return {
        "output_dir": spec["scratch"],
        "max_steps": spec["steps"],
        "per_device_train_batch_size": completions // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "num_generations": spec["group_size"],
        "max_completion_length": spec["max_new_tokens"],
        "beta": spec["beta"],
        "learning_rate": spec["learning_rate"],
        "lr_scheduler_type": "constant",
        "loss_type": "grpo",
        "disable_dropout": True,
        # TRL's defaults save memory and cost time: bf16 on GPUs, and this everywhere.
        "gradient_checkpointing": spec["trl_checkpoints"],
        "bf16": spec["mixed_precision"] == "bf16",
        "use_cpu": True,
        "model_init_kwargs": {"dtype": "float32"},
        # Nothing is written while steps are timed.
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1_000_000,
    }


def main(spec_file: str) -> None:
    """Take the steps; last comes a line with the process's peak memory and versions."""
    spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    trl, turns = import_module("trl"), Turns()

    def reward(prompts: list[str], completions: list[str], completion_ids: Any, **_: Any) -> list[float]:
        turns.tokens = sum(map(len, completion_ids))
        samples = [prompt + text for prompt, text in zip(prompts, completions, strict=True)]
        return [float(sample.count("a")) for sample in samples]

    datasets: Any = import_module("datasets")
    trainer = trl.GRPOTrainer(
        model=spec["model"],
        reward_funcs=reward,
        args=trl.GRPOConfig(**settings(spec)),
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in spec["prompts"]]),
        callbacks=[turns],
    )
    end_at = EndAt(spec["eos_id"], spec["first_marker"], spec["lengths"])
    model = trainer.model
    model.generate = partial(model.generate, logits_processor=LogitsProcessorList([end_at]))
    trainer.train()
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    versions = {name: version(name) for name in ("trl", "transformers", "torch")}
    print("END " + json.dumps({"peak_bytes": peak, "versions": versions}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

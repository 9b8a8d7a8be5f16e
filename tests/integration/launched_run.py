"""Small runs of all trainers, one after the other in the same processes, under any launcher.

python -m tests.integration.launched_run FOLDER NUM_PROCESSES KIND,KIND,...

Rank 0 writes `FOLDER/found.json`: of each kind the metrics of its run, the number of processes, of how many
tensors of the saved model the values are those that DeepSpeed itself gathers, and the norms of its heads.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from conch.cli import run_main
from tests.integration.resume_run import KINDS

TRAIN = {"total_steps": 4, "eval_every": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    # Far enough that a target that stayed where it was shows.
    "ilql": {"ilql": {"batch_size": 8, "alpha": 0.5}},
    "ppo": {"ppo": {"rollouts_per_step": 16, "num_value_layers_unfrozen": 1}},
}


def run(kind: str, folder: Path, num_processes: int) -> dict[str, Any]:
    """Train, save, and look at both."""
    train = {**TRAIN, "run_dir": str(folder / kind), "num_processes": num_processes}
    schedule = {"optimizer": {"learning_rate": 2e-3}, "scheduler": {"name": "constant"}}
    values = {"train": train, **schedule, **SETTINGS.get(kind, {})}
    trainer = KINDS[kind](values)
    run_dir = trainer.fit()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    in_memory = trainer.engine.accelerator.get_state_dict(trainer.engine.module)
    found = {"num_processes": trainer.collectives.num_ranks, "metrics": rows}
    if not trainer.collectives.is_main:
        return found
    saved = run_dir / f"checkpoints/step_{TRAIN['total_steps']}"
    AutoConfig.from_pretrained(saved)
    return {**found, **compare(saved, in_memory)}


def compare(saved: Path, in_memory: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How many saved tensors equal, bit for bit, what was trained; and the names of those that do not."""
    on_disk = {f"lm.{name}": value for name, value in load_file(saved / "model.safetensors").items()}
    if (saved / "heads.safetensors").exists():
        on_disk |= load_file(saved / "heads.safetensors")
    trained = {_name(name): value for name, value in in_memory.items()}
    same = [name for name, value in on_disk.items() if _equal(value, trained[name])]
    heads = {name: value for name, value in on_disk.items() if not name.startswith("lm.")}
    norms = {name: float(value.float().norm()) for name, value in heads.items()}
    return {"equal": len(same), "different": sorted(on_disk.keys() - set(same)), "norms": norms}


_PARTS = ("lm", "value_head", "value_branch", "q_heads", "target_q_heads")


def _name(trained: str) -> str:
    """A reward model is trained as it is, without a module around it."""
    return trained if trained.startswith(tuple(f"{part}." for part in _PARTS)) else f"lm.{trained}"


def _equal(saved: torch.Tensor, trained: torch.Tensor) -> bool:
    return saved.dtype == trained.dtype and torch.equal(saved, trained.cpu())


def main(argv: Sequence[str]) -> None:
    """See above."""
    torch.set_num_threads(1)
    folder, num_processes, kinds = Path(argv[0]), int(argv[1]), argv[2].split(",")
    found = {kind: run(kind, folder, num_processes) for kind in kinds}
    if found[kinds[0]].get("equal") is not None:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_main(main) if len(sys.argv) > 3 else sys.exit(__doc__)

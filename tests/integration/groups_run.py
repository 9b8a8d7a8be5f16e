"""Runs with a reward of groups, under torchrun: `-m tests.integration.groups_run FOLDER NAME [ADDRESSES]`.

Each rank writes FOLDER/rank_<n>.json: for each submit the prompts and the outputs that the reward got.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from conch.cli import run_main
from tests.fakes.group_rewards import GroupSource
from tests.runs import PROMPTS, async_grpo_trainer, grpo_trainer, rft_trainer

STEPS = 3
TRAIN = {"total_steps": STEPS, "eval_every": STEPS, "eval_repeats": 3}
ASYNC = {"asynchronous": {"max_staleness": 1}, "train": {**TRAIN, "save_every": 1}}


def main(argv: Sequence[str]) -> None:
    """Train and evaluate."""
    torch.set_num_threads(1)
    folder, name, addresses = Path(argv[0]), argv[1], argv[2:]
    settings: dict[str, Any] = {"train": TRAIN, "eval_prompts": PROMPTS[:5]}
    if name == "grpo":
        make: Any = grpo_trainer
        settings |= {"generation": {"chunk_size": 3}, "grpo": {"prompts_per_step": 4}}
    elif name == "rft":
        make = rft_trainer
        settings |= {"rft": {"prompts_per_round": 5, "n_improve_steps": 1}}
    else:
        make = async_grpo_trainer
        settings |= {**ASYNC, "grpo": {"prompts_per_step": 4}, "rollout": {"urls": addresses[0]}}
    source = GroupSource(0.05, 0.0, 0.02)
    with closing(make(folder / "run", reward_fn=source, **settings)) as trainer:
        trainer.fit()
        rank = trainer.collectives.rank
    submitted = [[sorted(names), outputs] for names, outputs in source.submitted]
    (folder / f"rank_{rank}.json").write_text(json.dumps(submitted))


if __name__ == "__main__":
    import sys

    run_main(main) if len(sys.argv) > 2 else sys.exit(__doc__)

"""A GRPO run whose reference and sampler are on servers; each rank writes what it has learned.

torchrun --nproc_per_node 2 ... -m tests.integration.served_devices_run FOLDER REFERENCE_URLS ROLLOUT_URLS

REFERENCE_URLS and ROLLOUT_URLS may be `-`: in the trainer's processes. A file FOLDER/pause lets every step
wait until it is gone; FOLDER/rank_<n>.paused says that a rank waits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from conch.cli import run_main
from tests.runs import grpo_trainer, parameters

STEPS = 4
LONGEST_S = 240.0


def main(argv: Sequence[str]) -> None:
    """Train 4 steps of 2 groups of 4 rollouts; writes FOLDER/rank_<n>.json."""
    folder, reference, rollout = Path(argv[0]), argv[1], argv[2]
    settings = {
        **({} if reference == "-" else {"reference": {"urls": reference, "deadline_s": LONGEST_S}}),
        **({} if rollout == "-" else {"rollout": {"urls": rollout}}),
    }
    trainer = grpo_trainer(
        folder / "run",
        grpo={"prompts_per_step": 4, "group_size": 4, "minibatches": 2, "forward_batch_size": 2},
        optimizer={"learning_rate": 0.01},
        **settings,
    )
    rank, kl = trainer.collectives.rank, []
    try:
        for _ in range(STEPS):
            wait_for_leave(folder, rank)
            kl.append(trainer.step()["policy/kl"])
        found = {"kl": kl, "weights": parameters(trainer.module).tolist()}
        (folder / f"rank_{rank}.json").write_text(json.dumps(found))
    finally:
        trainer.close()


def wait_for_leave(folder: Path, rank: int) -> None:
    """Wait while there is a file FOLDER/pause."""
    deadline = time.monotonic() + LONGEST_S
    while (folder / "pause").exists():
        (folder / f"rank_{rank}.paused").touch()
        assert time.monotonic() < deadline, "nobody let this rank go on"
        time.sleep(0.02)


if __name__ == "__main__":
    run_main(main)

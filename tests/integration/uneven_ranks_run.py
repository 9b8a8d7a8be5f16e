"""A PPO run of two ranks that pause at files, so that a test can kill the server at a chosen moment.

torchrun --nproc_per_node 2 ... -m tests.integration.uneven_ranks_run FOLDER URL ON_FAILURE

Before it samples for its third step, each rank writes FOLDER/rank_<n>.there and waits for FOLDER/rank_<n>.go.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conch.cli import run_main
from tests.runs import ppo_trainer

PAUSE_AT = 2
LONGEST_S = 120.0


def main(argv: Sequence[str]) -> None:
    """Train 4 steps of 8 rollouts; the run folder is FOLDER/run."""
    folder, url, policy = Path(argv[0]), argv[1], argv[2]
    reward = {
        "client": {"request_timeout_s": 2.0, "deadline_s": 4.0},
        "failure": {"policy": policy, "wait_budget_s": LONGEST_S},
    }
    trainer = ppo_trainer(folder / "run", reward_fn=url, reward=reward)
    rollout, rank = trainer.rollout, trainer.collectives.rank

    def paused_rollout(*arguments: Any, **options: Any) -> Any:
        if trainer.run.step == PAUSE_AT:
            pause(folder, rank)
        return rollout(*arguments, **options)

    trainer.rollout = paused_rollout
    print(f"rank {rank} of {trainer.collectives.num_ranks}", flush=True)
    try:
        trainer.fit()
    finally:
        trainer.close()


def pause(folder: Path, rank: int) -> None:
    """Say that this rank is there, and wait until it may go on."""
    (folder / f"rank_{rank}.there").touch()
    deadline = time.monotonic() + LONGEST_S
    while not (folder / f"rank_{rank}.go").exists():
        assert time.monotonic() < deadline, "nobody let this rank go on"
        time.sleep(0.02)


if __name__ == "__main__":
    run_main(main)

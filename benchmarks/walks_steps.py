"""One process of `benchmarks.busy`: PPO steps of the random walks from random weights.

python -m benchmarks.walks_steps STEPS

Prints the seconds of STEPS steps, the first not among them; with 0 it says that the first is done and goes on
until it is killed, or whoever started it is gone.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time

from benchmarks.policies import walk_case
from conch.config import load
from conch.servers.restart import exit_with_parent
from conch.trainers.ppo import PPORunConfig, PPOTrainer
from examples.randomwalks.task import RandomWalks


def _trainer(folder: str) -> PPOTrainer:
    case, task = walk_case(), RandomWalks()
    settings = {
        "model": {"architecture": {"model_type": case.model_config.model_type}},
        "generation": {"max_new_tokens": case.max_new_tokens, "chunk_size": case.chunk_size},
        "ppo": {"rollouts_per_step": 128, "epochs": 4, "minibatches": 2, "forward_batch_size": 128},
        "train": {"total_steps": 10**6, "eval_every": 0, "save_every": 0, "run_dir": folder, "seed": 0},
    }
    config = load(PPORunConfig, settings)
    given = {"model": case.model(), "tokenizer": case.tokenizer}
    return PPOTrainer(config, reward=task.reward, prompts=task.start_nodes, **given)


def main(steps: int) -> None:
    """Run the steps, and print their seconds."""
    exit_with_parent(lambda: os._exit(1))
    with tempfile.TemporaryDirectory(prefix="conch-walks-") as folder:
        trainer = _trainer(folder)
        trainer.step()
        if not steps:
            print("ready", flush=True)
        started = time.perf_counter()
        done = 0
        while not steps or done < steps:
            trainer.step()
            done += 1
        print(time.perf_counter() - started, flush=True)
        trainer.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))

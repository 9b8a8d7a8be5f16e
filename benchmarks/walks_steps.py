"""One process of `benchmarks.busy`: PPO steps of the random walks from random weights.

python -m benchmarks.walks_steps STEPS

Prints the seconds of STEPS steps, the first not among them; with 0 it says that the first is done and goes on
until it is killed.
"""

from __future__ import annotations

import sys
import tempfile
import time

from conch.config import load  # before torch: how its threads wait is set as this package is imported
from conch.trainers.ppo import PPORunConfig, PPOTrainer
from examples.randomwalks.task import RandomWalks, letter_tokenizer

_POLICY = {
    "model_type": "gpt2",
    "n_layer": 6,
    "n_embd": 144,
    "n_head": 12,
    "n_positions": 32,
    "vocab_size": 24,
}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
"""As `configs/model/randomwalks_policy.yaml` has them."""


def _trainer(folder: str) -> PPOTrainer:
    tokenizer, task = letter_tokenizer(), RandomWalks(1000)
    settings = {
        "model": {"architecture": {**_POLICY, **_SPECIAL}},
        "generation": {"max_new_tokens": 9, "chunk_size": 64},
        "ppo": {"rollouts_per_step": 128, "epochs": 4, "minibatches": 2, "forward_batch_size": 128},
        "train": {"total_steps": 10**6, "eval_every": 0, "save_every": 0, "run_dir": folder, "seed": 0},
    }
    config = load(PPORunConfig, settings)
    return PPOTrainer(config, reward=task.reward, prompts=task.start_nodes, tokenizer=tokenizer)


def main(steps: int) -> None:
    """Run the steps, and print their seconds."""
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

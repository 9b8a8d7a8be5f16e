"""A run of two ranks that ends right after its last collective, as scripts do."""

from __future__ import annotations

import torch

from conch.config import OptimizerConfig, SchedulerConfig, TrainConfig
from conch.distributed.train_engine import TrainEngine


def main() -> None:
    """A few updates and collectives, and out."""
    torch.set_num_threads(1)
    engine = TrainEngine(TrainConfig(num_processes=2))
    engine.prepare(torch.nn.Linear(4, 4), OptimizerConfig(), SchedulerConfig(), total_updates=5)
    for step in range(5):
        engine.update([torch.ones(2, 4)], lambda batch: engine.module(batch).sum())
        engine.collectives.all_gather([step])
        engine.collectives.all_reduce_int(step)
        engine.collectives.broadcast([step])
    engine.close()


if __name__ == "__main__":
    main()

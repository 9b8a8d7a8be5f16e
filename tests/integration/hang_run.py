"""Runs of two ranks that do not come to an end by themselves.

python -m tests.integration.hang_run KIND RUN_DIR SECONDS
"""

from __future__ import annotations

import queue
import threading
from pathlib import Path

import torch

from conch.cli import run_main
from conch.config import OptimizerConfig, SchedulerConfig, TrainConfig
from conch.distributed.train_engine import TrainEngine
from conch.errors import StuckError
from conch.training.overlap.watchdog import Progress, Watchdog
from tests.integration.watchdog_run import LONG_S, hang_in_c, wait_for_nobody


def ranks(kind: str, run: Path, timeout_s: float) -> None:
    """Two ranks, of which rank 1 hangs and rank 0 waits for it in a collective of that kind."""
    torch.set_num_threads(1)
    engine = TrainEngine(TrainConfig(num_processes=2, collective_timeout_s=timeout_s))
    collectives = engine.collectives
    collectives.watch(run)
    engine.prepare(torch.nn.Linear(4, 4), OptimizerConfig(), SchedulerConfig(), total_updates=5)
    collectives.barrier()
    if collectives.rank == 1:
        wait_for_nobody(threading.Event())
    if kind == "all_reduce":
        collectives.all_reduce_int(1)
    elif kind == "all_gather":
        collectives.all_gather([1])
    elif kind == "broadcast":
        collectives.broadcast(1)
        collectives.barrier()  # who sends need not wait
    elif kind == "backward":
        rows = torch.ones(2, 4, dtype=next(engine.module.parameters()).dtype)
        engine.update([rows], lambda batch: engine.module(batch).sum())


def watched_ranks(run: Path, deadline_s: float) -> None:
    """Rank 1 hangs in C, rank 0 waits for it; each has a watchdog, whose deadline is the shorter one."""
    engine = TrainEngine(TrainConfig(num_processes=2, collective_timeout_s=LONG_S))
    engine.collectives.watch(run)
    engine.collectives.barrier()
    progress, failures = Progress(), queue.Queue[StuckError]()
    rank = engine.collectives.rank
    with Watchdog(progress, deadline_s=deadline_s, run=run, rank=rank, on_stuck=failures.put, grace_s=2):
        if rank == 1:
            hang_in_c()
        engine.collectives.barrier()


def main(arguments: list[str]) -> None:
    """One run, as the command line says."""
    kind, run, seconds = arguments[0], Path(arguments[1]), float(arguments[2])
    if kind == "watched_ranks":
        watched_ranks(run, seconds)
    else:
        ranks(kind, run, seconds)


if __name__ == "__main__":
    run_main(main)

"""What all these examples end with: train, then measure on about 4,000 walks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from conch.runs.tracking import Tracker
from conch.types import Metrics
from examples.randomwalks.task import RandomWalks

if TYPE_CHECKING:
    from conch.distributed.train_engine import TrainEngine

NUM_MEASURED = 4000


class SamplingTrainer(Protocol):
    """A trainer that evaluates by sampling."""

    engine: TrainEngine

    def fit(self) -> Path: ...

    def evaluate(
        self, tracker: Tracker | None = None, step: int = 0, *, repeats: int | None = None
    ) -> Metrics: ...

    def close(self) -> None: ...


def fit_and_measure(trainer: SamplingTrainer, task: RandomWalks) -> Metrics:
    """Train, and print and return the final measurements."""
    try:
        trainer.fit()
        metrics = trainer.evaluate(repeats=NUM_MEASURED // len(task.start_nodes))
    finally:
        trainer.close()
    if trainer.engine.collectives.is_main:
        for name, value in sorted(metrics.items()):
            print(f"{name:36}{value:8.3f}")
    return metrics

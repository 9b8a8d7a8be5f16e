"""GRPO that samples and scores while it trains.

The step is that of `trainers/grpo.py`, its first line replaced by "take groups from the buffer". What a step
learns from is at most `asynchronous.max_staleness` steps old (`conch/training/overlap/sampling.py` says how
that is kept). The policy that sampled is another than the one that learns, so the loss is decoupled (Hilton
et al. 2022, arXiv:2110.00641; Fu et al. 2025, arXiv:2505.24298): the ratio is to the policy at the beginning
of the step, and `grpo.correction` weighs by that policy over the one that sampled.

With `max_staleness=0` this is synchronous GRPO on the same samplers, bit for bit on a CPU.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is loaded, which help and mistyped keys do without
    from conch.training import run_program

    run_program("async_grpo")

from collections.abc import Sequence

from conch.config.algorithms.async_grpo import AsyncGRPORunConfig as AsyncGRPORunConfig
from conch.trainers.grpo import GRPOTrainer
from conch.training import train
from conch.training.online import run_online
from conch.training.overlap.sampling import Overlap
from conch.types import Metrics


class AsyncGRPOTrainer(GRPOTrainer):
    """GRPO whose samples are taken from a buffer; see `OnlineTrainer` for what it is made from."""

    name = "async_grpo"
    config: AsyncGRPORunConfig
    overlap: Overlap

    def make_overlap(self) -> Overlap:
        return Overlap(self, self.config.asynchronous)

    def step(self) -> Metrics:
        """One step of GRPO on groups from the buffer."""
        with self.overlap.watched():
            metrics = super().step()
            return metrics | self.overlap.finish_step()


def run(config: AsyncGRPORunConfig) -> None:
    """Train with prompts from `data.train`."""
    run_online(AsyncGRPOTrainer, config)


def main(argv: Sequence[str]) -> None:
    """Command line: `python -m conch.trainers.async_grpo key=value ...`."""
    train("async_grpo", argv)

"""GRPO that samples and scores while it trains: the step of `trainers/grpo.py`, its first line replaced by
"take groups from the buffer".

What a step learns from is at most `asynchronous.max_staleness` steps old
(`conch/training/overlap/sampling.py` says how that is kept). The policy that sampled is another than the one
that learns, so the loss is decoupled (Hilton et al. 2022, arXiv:2110.00641; Fu et al. 2025,
arXiv:2505.24298): the ratio is to the policy at the beginning of the step, and `grpo.correction` weighs by
that policy over the one that sampled.

With `max_staleness=0` this is synchronous GRPO on the same samplers, bit for bit on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import model_validator

from conch.cli import run_main
from conch.config import RolloutConfig
from conch.trainers.grpo import GRPOConfig, GRPORunConfig, GRPOTrainer
from conch.training.online import run_online
from conch.training.overlap.correction import CorrectionConfig
from conch.training.overlap.sampling import Overlap
from conch.training.overlap.settings import AsyncConfig
from conch.types import Metrics


class AsyncGRPORunConfig(GRPORunConfig):
    """Everything an asynchronous GRPO run is made from."""

    asynchronous: AsyncConfig = AsyncConfig()
    rollout: RolloutConfig = RolloutConfig(engine="ray")
    grpo: GRPOConfig = GRPOConfig(correction=CorrectionConfig(kind="truncate"))

    @model_validator(mode="after")
    def _sampling_goes_on_elsewhere(self) -> AsyncGRPORunConfig:
        if self.rollout.urls is None and self.rollout.engine != "ray":
            raise ValueError(
                f"`rollout.engine` = {self.rollout.engine} samples in the processes of the trainer, "
                "which then do not train: take `rollout.engine=ray`, or name servers in `rollout.urls`"
            )
        if self.grpo.max_resamples:
            raise ValueError(
                "`grpo.max_resamples` samples again within a step, where asynchronous training throws "
                "nothing away: leave it out, or train with `conch.trainers.grpo`"
            )
        return self


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


def main(argv: Sequence[str]) -> None:
    """Command line: `python -m conch.trainers.async_grpo key=value ...` with prompts from `data.train`."""
    run_online(AsyncGRPOTrainer, AsyncGRPORunConfig, argv)


if __name__ == "__main__":
    run_main(main)

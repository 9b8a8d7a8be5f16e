"""Settings of asynchronous GRPO: how far sampling may run ahead of training."""

from __future__ import annotations

from pydantic import Field, model_validator

from conch.config.algorithms.correction import CorrectionConfig
from conch.config.algorithms.grpo import GRPOConfig, GRPORunConfig
from conch.config.base import Section
from conch.config.rollout import RolloutConfig


class AsyncConfig(Section):
    """Training that does not wait for its samples: how old these may be."""

    max_staleness: int = Field(default=1, ge=0)
    """Steps, at most, between the weights that sampled a completion and the step that learns from it, the
    time of scoring included. A prompt is admitted only where that holds, so that nothing is thrown away; 0
    waits for each step's samples, as synchronous training does."""

    sync_every: int = Field(default=1, ge=1)
    """Steps after which samplers get new weights. More costs age and saves hand-overs, which decide with
    small models; at most `max_staleness` + 1."""

    partial_rollouts: bool = False
    """True lets completions under way go on with new weights from their next token on, so that a long one
    holds nothing up; each token counts with the age of its own weights. False has new weights wait in a
    sampler until what is under way there has ended."""

    deadline_s: float = Field(default=900.0, gt=0)
    """Seconds without a completion, a reward, a hand-over or a step after which the run ends with an account
    of who waits for whom. Longer than one call of a reward function takes."""

    @model_validator(mode="after")
    def _weights_come_in_time(self) -> AsyncConfig:
        if self.sync_every > self.max_staleness + 1:
            raise ValueError(
                f"`sync_every` = {self.sync_every} leaves samplers with weights {self.sync_every - 1} steps "
                f"old, and `max_staleness` = {self.max_staleness}: take at most {self.max_staleness + 1}, or "
                f"`max_staleness={self.sync_every - 1}`"
            )
        return self


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


RUN_CONFIG = AsyncGRPORunConfig

"""Settings of rejection-sampling fine-tuning."""

from __future__ import annotations

from pydantic import Field, model_validator

from conch.config.base import Section
from conch.config.run import OnlineRunConfig


class RFTConfig(Section):
    """The algorithm's own settings."""

    n_generations_per_prompt: int = Field(default=32, ge=1)
    """Completions sampled per prompt of a round."""

    prompts_per_round: int | None = Field(default=None, ge=1)
    """Prompts of a round, over all processes; None takes 64, or every prompt where there are fewer."""

    n_improve_steps: int = Field(default=4, ge=1)
    """Steps that learn from one round's completions before new ones are sampled."""

    start_percentile: float = Field(default=0.7, ge=0, le=1)
    """Share of a prompt's completions that the first step of a round leaves out; 0.7 learns the best 30 %."""

    end_percentile: float = Field(default=0.95, ge=0, le=1)
    """The same for the last step of a round. A round of one step has `start_percentile`."""

    min_score: float | None = None
    """Completions that score less are never learned, however bad the others of their prompt are; None learns
    the best ones of every prompt."""

    batch_size: int = Field(default=32, ge=1)
    """Completions per optimizer update, over all processes."""

    updates_per_step: int = Field(default=8, ge=1)
    """Optimizer updates per step; where fewer completions are kept than they ask for, these come again."""

    @model_validator(mode="after")
    def _bar_rises(self) -> RFTConfig:
        if self.end_percentile < self.start_percentile:
            raise ValueError(
                f"`end_percentile` = {self.end_percentile:g} is below `start_percentile` = "
                f"{self.start_percentile:g}: the bar rises over a round"
            )
        return self


class RFTRunConfig(OnlineRunConfig):
    """Everything an RFT run is made from."""

    rft: RFTConfig = RFTConfig()


RUN_CONFIG = RFTRunConfig

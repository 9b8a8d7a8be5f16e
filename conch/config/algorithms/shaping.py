"""From scores to the rewards that an algorithm learns from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from conch.config.base import Section


class ShapingConfig(Section):
    """What happens to scores before they are learned from, in this order."""

    combine: Literal["sum", "normalise_then_sum", "sum_then_normalise"] = "sum"
    """How several objectives become one score, weighted by `reward.weights`. Normalised means: mean 0 and
    standard deviation 1 over the step's samples. Before the sum it gives objectives of any unit their weight;
    after it, the larger unit decides."""

    clip: float | None = Field(default=None, gt=0)
    """Scores are clipped to plus or minus this; None leaves them."""

    scaling: Literal["none", "running", "reference"] = "none"
    """`running` divides scores by their standard deviation over the run so far; `reference` by that of the
    first step, whose samples are the starting policy's."""

    reference_std: float | None = Field(default=None, gt=0)
    """With `reference`: the standard deviation to divide by, instead of measuring it."""

    missing_eos_penalty: float | None = Field(default=None, ge=0)
    """Taken off the score of a response cut by `max_new_tokens`; None takes nothing off."""

    @model_validator(mode="after")
    def _reference_belongs_to_scaling(self) -> ShapingConfig:
        if self.reference_std is not None and self.scaling != "reference":
            raise ValueError("`reference_std` needs `scaling: reference`")
        return self

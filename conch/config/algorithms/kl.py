"""The distance to the reference: what it costs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from conch.config.base import Section
from conch.config.generation import GenerationConfig

KLEstimator = Literal["k1", "k2", "k3"]


class KLConfig(Section):
    """The penalty for leaving the reference."""

    coef: float = Field(default=0.05, ge=0)
    """Weight c of the KL in the reward; the start value where it adapts."""

    estimator: KLEstimator = "k1"
    """Per-token estimate k; see `conch.ops.kl_estimate`."""

    placement: Literal["reward", "loss"] = "reward"
    """Whether the KL is taken off the rewards, or added to the loss."""

    target: float | None = Field(default=None, gt=0)
    """KL in nats per sample that the weight is steered to; None keeps the weight fixed."""

    horizon: int = Field(default=10_000, ge=1)
    """Samples over which the adaptive weight reacts; at least those of a step."""

    @model_validator(mode="after")
    def _weight_can_move(self) -> KLConfig:
        if self.target is not None and self.coef == 0:
            raise ValueError(
                "`target` steers `coef` by factors, and from 0 it never moves: start above 0, or leave "
                "`target` out"
            )
        return self

    def check_horizon(self, num_samples: int, name: str) -> None:
        """Refuse a horizon within which one step could turn the adaptive weight negative.

        num_samples: of a step, over all processes, which the settings `name` give.

        Raises:
            ValueError: names both.
        """
        if self.target is not None and self.horizon < num_samples:
            raise ValueError(
                f"`kl.horizon` = {self.horizon} is shorter than {name} = {num_samples}: one step could turn "
                "the weight negative; raise the horizon"
            )

    def check_target(self, generation: GenerationConfig, section: str) -> None:
        """Refuse to steer by a KL that samples of a cut distribution do not measure.

        section: that these settings stand in.

        Raises:
            ValueError: names the settings.
        """
        if self.target is not None and generation.cuts:
            raise ValueError(
                f"`{section}.kl.target` steers by the KL of the policy, which samples cut by "
                "`generation.top_k` or `top_p` do not measure: leave one of them out"
            )


class GRPOKLConfig(KLConfig):
    """The penalty for leaving the reference, where GRPO has it: in the loss."""

    coef: float = Field(default=0.04, ge=0)
    """Weight of the KL; 0 does without a reference."""

    estimator: KLEstimator = "k3"
    """Per-token estimate; see `conch.ops.kl_estimate`."""

    placement: Literal["reward", "loss"] = "loss"
    """Whether the KL is added to the loss, or taken off the rewards before they are compared."""

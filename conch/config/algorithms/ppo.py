"""Settings of PPO: `trainers/ppo.py` has its formulas."""

from __future__ import annotations

from pydantic import Field, model_validator

from conch.config.algorithms.kl import KLConfig
from conch.config.algorithms.shaping import ShapingConfig
from conch.config.base import Section
from conch.config.run import OnlineRunConfig


class PPOConfig(Section):
    """The algorithm's own settings."""

    rollouts_per_step: int = Field(default=128, ge=1)
    """Samples per step, over all processes."""

    epochs: int = Field(default=4, ge=1)
    """Passes over a step's samples."""

    minibatches: int = Field(default=2, ge=1)
    """Optimizer updates per pass."""

    forward_batch_size: int = Field(default=64, ge=1)
    """Samples per process in one forward pass without gradient; changes memory, not the result."""

    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per token."""

    lam: float = Field(default=0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation."""

    clip_ratio: float = Field(default=0.2, gt=0)
    """eps of the policy loss."""

    clip_value: float | None = Field(default=0.2, gt=0)
    """eps_V of the value loss; None does not clip."""

    dual_clip: float | None = Field(default=None, gt=1)
    """Bounds the loss of a token with negative advantage whose probability has grown (Ye et al. 2020,
    arXiv:1912.09729, equation 5; they take 3); None does not."""

    value_coef: float = Field(default=1.0, ge=0)
    """Weight of the value loss."""

    num_value_layers_unfrozen: int = Field(default=0, ge=0)
    """Top blocks that the value function has for itself, copied from the policy's; 0 shares them all."""

    whiten_rewards: bool = False
    """Scale per-token rewards, KL included, to standard deviation 1 without moving their mean."""

    kl: KLConfig = KLConfig()
    """Distance to the reference."""

    @model_validator(mode="after")
    def _kl_weight_stays_positive(self) -> PPOConfig:
        self.kl.check_horizon(self.rollouts_per_step, "`rollouts_per_step`")
        return self


class PPORunConfig(OnlineRunConfig):
    """Everything a PPO run is made from."""

    shaping: ShapingConfig = ShapingConfig()
    ppo: PPOConfig = PPOConfig()

    @model_validator(mode="after")
    def _kl_is_measured(self) -> PPORunConfig:
        self.ppo.kl.check_target(self.generation, "ppo")
        return self


RUN_CONFIG = PPORunConfig

"""Optimizer and learning-rate schedule."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from conch.config.base import Section


class OptimizerConfig(Section):
    """AdamW."""

    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""

    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator. 1e-5, the value of the original PPO code, is for small models: gradients that
    are smaller than that, as those of large models, have a lower learning rate with it."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, applied to matrices only (not to biases and norms)."""


class SchedulerConfig(Section):
    """Learning rate over the run, stepped once per optimizer update."""

    name: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape after warm-up: flat, or falling to 0 at the run's last update."""

    warmup_updates: int = Field(default=0, ge=0)
    """Optimizer updates over which the rate rises linearly from 0."""

"""The settings of group-relative policy optimisation; `conch.trainers.grpo` says what they mean."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from conch.advantages import Advantage
from conch.config import (
    EvalGenerationConfig,
    GenerationConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    Section,
)
from conch.losses import LossForm
from conch.ops import KLEstimator
from conch.training.kl import KLConfig
from conch.training.reward_shaping import ShapingConfig


class GRPOKLConfig(KLConfig):
    """The penalty for leaving the reference, where GRPO has it: in the loss."""

    coef: float = Field(default=0.04, ge=0)
    """Weight of the KL; 0 does without a reference."""

    estimator: KLEstimator = "k3"
    """Per-token estimate; see `conch.ops.kl_estimate`."""

    placement: Literal["reward", "loss"] = "loss"
    """Whether the KL is added to the loss, or taken off the rewards before they are compared."""


class GRPOConfig(Section):
    """The algorithm's own settings."""

    prompts_per_step: int = Field(default=16, ge=1)
    """Prompts per step, over all processes."""

    group_size: int = 8
    """G, completions per prompt."""

    epochs: int = Field(default=1, ge=1)
    """Passes over a step's samples."""

    minibatches: int = Field(default=2, ge=1)
    """Optimizer updates per pass."""

    forward_batch_size: int = Field(default=64, ge=1)
    """Samples per process in one forward pass without gradient; changes memory, not the result."""

    loss: LossForm = "grpo"
    """How tokens are weighed, and what the ratio is of; see the head of `trainers/grpo.py`."""

    advantage: Advantage | None = None
    """What a reward is compared with: its group's mean, in standard deviations (`group_std`) or not
    (`group_mean`), or the mean of the others (`leave_one_out`). None takes `group_mean` with dr_grpo, else
    `group_std`."""

    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """eps_low: how far a token's probability may fall in one step before its gradient ends."""

    clip_high: float = Field(default=0.2, gt=0)
    """eps_high: how far it may rise; more than `clip_low` leaves room for rare tokens (DAPO takes 0.28).
    gspo's ratios are means over a response, and want 3e-4 and 4e-4 or so."""

    sampler_correction: float | None = Field(default=None, gt=0)
    """Weigh each token by pi_old of the trainer over that of the sampler, at most this much: for samplers
    with other kernels than the trainer's (truncated importance sampling; 2 is usual). None does not."""

    max_draws: int = Field(default=1, ge=1)
    """Rollouts per step, at most, to replace groups whose rewards are all alike by groups of other prompts
    (dynamic sampling, DAPO section 3.2). 1 replaces none."""

    overlong_buffer: int = Field(default=0, ge=0)
    """Tokens before `max_new_tokens` over which a penalty for length grows from 0 (DAPO, equation 13)."""

    overlong_penalty: float = Field(default=1.0, ge=0)
    """That penalty at `max_new_tokens`."""

    kl: GRPOKLConfig = GRPOKLConfig()
    """Distance to the reference."""

    @model_validator(mode="after")
    def _a_group_has_others(self) -> GRPOConfig:
        if self.group_size < 2:
            raise ValueError(
                f"`group_size` = {self.group_size} leaves nothing to compare with: take at least 2"
            )
        if self.advantage == "group_std" and self.loss == "dr_grpo":
            raise ValueError("`loss: dr_grpo` divides by no standard deviation: leave `advantage` out")
        return self

    @property
    def advantage_kind(self) -> Advantage:
        """`advantage`, or what goes with the loss."""
        return self.advantage or ("group_mean" if self.loss == "dr_grpo" else "group_std")


class GRPORunConfig(RunConfig):
    """Everything a GRPO run is made from."""

    generation: GenerationConfig = GenerationConfig()
    eval_generation: EvalGenerationConfig = EvalGenerationConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    shaping: ShapingConfig = ShapingConfig()
    grpo: GRPOConfig = GRPOConfig()

    @model_validator(mode="after")
    def _settings_fit_each_other(self) -> GRPORunConfig:
        generation, grpo = self.generation, self.grpo
        if grpo.sampler_correction is not None and generation.cuts:
            raise ValueError(
                "`grpo.sampler_correction` compares whole distributions, but `generation.top_k` or `top_p` "
                "cuts the sampler's: leave one of them out"
            )
        if grpo.overlong_buffer > generation.max_new_tokens:
            raise ValueError(
                f"`grpo.overlong_buffer` = {grpo.overlong_buffer} is longer than "
                f"`generation.max_new_tokens` = {generation.max_new_tokens}"
            )
        return self

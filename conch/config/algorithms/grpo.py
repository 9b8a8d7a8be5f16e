"""Settings of GRPO: `trainers/grpo.py` has its formulas."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from conch.config.algorithms.correction import CorrectionConfig
from conch.config.algorithms.kl import GRPOKLConfig
from conch.config.algorithms.shaping import ShapingConfig
from conch.config.base import Section
from conch.config.run import OnlineRunConfig

LossForm = Literal["grpo", "dr_grpo", "dapo", "gspo"]
Advantage = Literal["group_std", "group_mean", "leave_one_out"]


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

    correction: CorrectionConfig = CorrectionConfig()
    """Weights that make up for a sampler with older weights or other kernels than the trainer's."""

    max_resamples: int = Field(default=0, ge=0)
    """Further rollouts per step, at most, that replace groups whose rewards are all alike by groups of other
    prompts (dynamic sampling, DAPO section 3.2). 0 replaces none."""

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
        if self.loss == "gspo" and self.correction.is_on and self.correction.level == "token":
            raise ValueError(
                "`correction.level: token` weighs each token, `loss: gspo` knows whole responses only: take "
                "`correction.level: geometric`, the ratio of gspo itself, or `sequence`"
            )
        self.kl.check_horizon(self.samples_per_step, "`prompts_per_step` * `group_size`")
        return self

    @property
    def samples_per_step(self) -> int:
        """Completions per step, over all processes."""
        return self.prompts_per_step * self.group_size

    @property
    def advantage_kind(self) -> Advantage:
        """`advantage`, or what goes with the loss."""
        return self.advantage or ("group_mean" if self.loss == "dr_grpo" else "group_std")


class GRPORunConfig(OnlineRunConfig):
    """Everything a GRPO run is made from."""

    shaping: ShapingConfig = ShapingConfig()
    grpo: GRPOConfig = GRPOConfig()

    @model_validator(mode="after")
    def _settings_fit_each_other(self) -> GRPORunConfig:
        generation, grpo = self.generation, self.grpo
        grpo.kl.check_target(generation, "grpo")
        if grpo.correction.is_on and generation.cuts:
            raise ValueError(
                "`grpo.correction` compares whole distributions, but `generation.top_k` or "
                "`top_p` cuts the sampler's: leave one of them out"
            )
        if grpo.overlong_buffer > generation.max_new_tokens:
            raise ValueError(
                f"`grpo.overlong_buffer` = {grpo.overlong_buffer} is longer than "
                f"`generation.max_new_tokens` = {generation.max_new_tokens}"
            )
        return self


RUN_CONFIG = GRPORunConfig

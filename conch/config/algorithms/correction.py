"""Weights for samples of another distribution than the trainer's."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from conch.config.base import Section

CorrectionLevel = Literal["token", "sequence", "geometric"]
"""What an importance weight is of: one token, the whole response (the product over its tokens), or the
response's token on average (the geometric mean)."""


class CorrectionConfig(Section):
    """Importance weights of the policy before the update against the sampler."""

    kind: Literal["none", "truncate", "mask"] = "none"
    """`none` weighs nothing; `truncate` weighs by at most `cap` (truncated importance sampling); `mask`
    weighs within [`low`, `high`] and drops what stands outside (IcePop)."""

    level: CorrectionLevel = "token"
    """What is weighed: each `token` by its own ratio; a whole response by the product of its tokens' ratios
    (`sequence`: unbiased, and the longer the response the wilder), or by their geometric mean (`geometric`,
    the ratio of GSPO). TRL's `vllm_importance_sampling_mode` calls the first two `token_` and `sequence_`."""

    cap: float | None = Field(default=None, gt=0)
    """Greatest weight, with `truncate`; None takes 2."""

    low: float | None = Field(default=None, ge=0)
    """Lowest weight that counts, with `mask`; None takes 0.5."""

    high: float | None = Field(default=None, gt=0)
    """Greatest weight that counts, with `mask`; None takes 5."""

    @model_validator(mode="after")
    def _bounds_belong_to_the_kind(self) -> CorrectionConfig:
        for name, kind in (("cap", "truncate"), ("low", "mask"), ("high", "mask")):
            if getattr(self, name) is not None and self.kind != kind:
                raise ValueError(
                    f"`{name}` is a bound of `kind: {kind}`, but `kind` is {self.kind}: set `kind: {kind}`, "
                    f"or leave `{name}` out"
                )
        least, most = self.bounds
        if least >= most:
            raise ValueError(f"no weight lies between `low` = {least:g} and `high` = {most:g}")
        return self

    @property
    def is_on(self) -> bool:
        """Whether anything is weighed."""
        return self.kind != "none"

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and greatest weight that is left as it is."""
        if self.kind == "truncate":
            return 0.0, 2.0 if self.cap is None else self.cap
        if self.kind == "mask":
            return 0.5 if self.low is None else self.low, 5.0 if self.high is None else self.high
        return 0.0, float("inf")

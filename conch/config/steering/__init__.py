"""Settings of rewards with many goals: servers that measure them, and rewards for reaching targets."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator, model_validator

from conch.config.base import Section

ERRORS = "_error"
"""What stands behind a goal's name in the name of its own error: `formality_error`."""

STEERABILITY, MISCALIBRATION, ORTHOGONALITY = "steerability_error", "miscalibration", "orthogonality"
THINK_FORMAT, ENGLISH_ONLY = "think_format", "english_only"
STEERING_REWARDS = (STEERABILITY, MISCALIBRATION, ORTHOGONALITY, THINK_FORMAT, ENGLISH_ONLY)


class GoldenText(Section):
    """A text with the values that a server must measure on it."""

    text: str
    """What is sent."""

    goals: dict[str, float]
    """Goal -> value."""

    tolerance: float = Field(default=1e-3, ge=0)
    """Greatest difference between a value and the one expected."""

    @field_validator("goals")
    @classmethod
    def _some_goals(cls, goals: dict[str, float]) -> dict[str, float]:
        wrong = next((name for name, value in goals.items() if not math.isfinite(value)), None)
        if not goals or wrong is not None:
            raise ValueError(f"a golden text needs finite values of goals, not {wrong or 'none'}")
        return goals


class GoalServerConfig(Section):
    """What is asked of an HTTP endpoint that measures goals (`reward.dialect=goals`)."""

    names: tuple[str, ...] = ()
    """Goals to take of what the server measures; a server without one of them is refused before the run, and
    a sample that one of them has no value for is invalid. None named takes all, and a null then says that a
    goal does not apply to the sample."""

    form: Literal["auto", "texts", "list"] = "auto"
    """What is sent: `texts` an object, {"texts": [...], "normalize": true}; `list` the list of texts alone;
    `auto` tries the first and then the second when the server is checked."""

    send: Literal["output", "sample"] = "output"
    """Which text is measured: the `output` alone, or the `sample`, prompt and output as one string."""

    normalize: bool = True
    """Ask for values that are brought between 0 and 1 by the server's own ranges; the form `list` cannot
    say it."""

    golden: tuple[GoldenText, ...] = ()
    """Texts that a server must measure right before it is asked for anything, each time that it is
    reached."""

    golden_of_conch: bool = False
    """Expect the values of Conch's own goals, of those that are named, on texts of Conch's."""

    @field_validator("names")
    @classmethod
    def _named_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError(f"names a goal twice: {', '.join(names)}")
        return names

    @model_validator(mode="after")
    def _list_is_normalised(self) -> GoalServerConfig:
        if self.form == "list" and not self.normalize:
            raise ValueError(
                "`normalize` = false cannot be said in `form` = list, whose values are by the server's "
                "ranges: leave one of them out"
            )
        return self


class SteeringConfig(Section):
    """Rewards for moving a text from where it is to targets of its row; on where `rewards` names any.

    Each row has `target_<goal>` for its steering goals, `source_<goal>` for rewards that ask where a text
    came from, and may have `steering_goals`. docs/steerability.md has the formulas.
    """

    rewards: tuple[str, ...] = ()
    """What is learned from, summed with `reward.weights`: `steerability_error`, `miscalibration`,
    `orthogonality`, `<goal>_error`, `think_format`, `english_only`. None named leaves rewards as they are."""

    eval_rewards: tuple[str, ...] = ()
    """What is measured only: none of it is in the reward. Names as in `rewards`."""

    goals: tuple[str, ...] = ()
    """Goals that rows are steered in which have no column `steering_goals`."""

    space: Literal["steering", "measured"] = "steering"
    """Goals in which `miscalibration` and `orthogonality` look: a row's `steering` goals, or all `measured`
    ones that the row has a `source_<goal>` of, so that goals nobody wanted changed show."""

    square_rewards: bool = False
    """`steerability_error` is the squared distance."""

    rescale_norm: bool = False
    """`steerability_error` is 1 less the root of the mean square (or, squared, the mean square) over a row's
    steering goals: between 0 and 1 where goals are."""

    good_enough_threshold: float | None = Field(default=None, ge=0)
    """Errors of a goal below this count as this much, in `steerability_error`."""

    too_bad_threshold: float | None = Field(default=None, gt=0)
    """Errors of a goal above this count as this much, in `steerability_error`."""

    decile: bool = False
    """Errors of a goal are rounded up to tenths and counted as 1 at most, in `steerability_error`."""

    normalize_miscal: bool = False
    """`miscalibration` is divided by the length of the move that was asked for."""

    normalize_ortho: bool = False
    """`orthogonality` is divided by the length of the move that was made, and is -1 at least."""

    strip_thinking: bool = False
    """Measure what stands behind a completion's `</think>` alone."""

    @property
    def is_on(self) -> bool:
        """Whether rewards are made of targets."""
        return bool(self.rewards)

    @property
    def all_rewards(self) -> tuple[str, ...]:
        """Those learned from and those measured, each once."""
        return tuple(dict.fromkeys([*self.rewards, *self.eval_rewards]))

    @model_validator(mode="after")
    def _rewards_are_known(self) -> SteeringConfig:
        for name in self.all_rewards:
            if name not in STEERING_REWARDS and not name.removesuffix(ERRORS):
                raise ValueError(f"`{name}` names no goal: write <goal>{ERRORS}")
            if name not in STEERING_REWARDS and not name.endswith(ERRORS):
                raise ValueError(
                    f"`{name}` is no reward of steering: they are {', '.join(STEERING_REWARDS)} and "
                    f"<goal>{ERRORS}"
                )
        alone = [
            name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default
        ]
        if not self.rewards and alone:
            raise ValueError(
                f"`{alone[0]}` without `rewards`: name what is learned from, for example "
                f"rewards=[{STEERABILITY}]"
            )
        if both := set(self.rewards) & set(self.eval_rewards):
            raise ValueError(f"`{min(both)}` is in `rewards` and in `eval_rewards`: take it out of one")
        for names in (self.rewards, self.eval_rewards, self.goals):
            if len(set(names)) < len(names):
                raise ValueError(f"a name stands twice in {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _thresholds_in_order(self) -> SteeringConfig:
        low, high = self.good_enough_threshold, self.too_bad_threshold
        if low is not None and high is not None and not low < high:
            raise ValueError(
                f"`good_enough_threshold` = {low:g} is not below `too_bad_threshold` = {high:g}: all errors "
                "would count alike"
            )
        return self

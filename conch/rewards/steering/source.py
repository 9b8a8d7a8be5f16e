"""The reward source that turns measured goals into rewards for reaching a row's targets."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from conch.config import SteeringConfig
from conch.config.steering import (
    ENGLISH_ONLY,
    ERRORS,
    MISCALIBRATION,
    ORTHOGONALITY,
    STEERABILITY,
    STEERING_REWARDS,
    THINK_FORMAT,
)
from conch.errors import ConfigError, DataError, RewardInvalidError
from conch.rewards.base import RewardSource
from conch.rewards.combined import CompositeReward, when_all_done
from conch.rewards.results import name_row
from conch.rewards.steering import formulas
from conch.rewards.steering.rows import Target, Targets, read_targets
from conch.types import RewardResult, RewardStatus, Rollout

FACTS = "steering/"
"""Stands before the names of what is measured: `steering/orthogonality`."""

_OPEN, _CLOSE = "<think>", "</think>"
_OF_TEXTS = (THINK_FORMAT, ENGLISH_ONLY)


class _MissingError(Exception):
    """A goal without a value, which a reward needs."""

    def __init__(self, goal: str) -> None:
        super().__init__(goal)
        self.goal = goal


class SteeringReward(CompositeReward):
    """Rewards a text for being where its row wants it to be; see `conch.rewards.steering.formulas`.

    Scores are those of `config.rewards`; facts are these and `config.eval_rewards`, below `steering/`, with
    `steering/error`, the distance to the target without any option, `steering/error/<goal>` and
    `steering/value/<goal>`. A sample without a value for a goal that a reward needs is INVALID, whatever else
    was measured: no reward stands for what nobody measured.

    source: measures goals, one objective each.
    """

    def __init__(self, source: RewardSource, config: SteeringConfig) -> None:
        super().__init__(f"steering by {source.name}", [source])
        self.measures_facts = True
        self._source = source
        self._config = config

    @property
    def objectives(self) -> tuple[str, ...]:
        return self._config.rewards

    def check(self) -> None:
        """Check the source, and that it measures the goals that settings name.

        Raises:
            ConfigError: a goal that nobody measures.
        """
        super().check()
        measured = self._source.objectives
        named = {
            **{name: goal for name in self._config.all_rewards if (goal := _goal_of(name))},
            **{goal: goal for goal in self._config.goals},
        }
        for setting, goal in named.items():
            if measured and goal not in measured:
                raise ConfigError(
                    f"`reward.steering` names `{setting}`, but {self._source.name} does not measure "
                    f"`{goal}`: it has {', '.join(measured)}"
                )

    def check_row(self, row: Mapping[str, Any]) -> None:
        super().check_row(row)
        measured = self._source.objectives
        targets = read_targets(row, self._config, measured)
        unknown = [goal for goal in targets.steering if measured and goal not in measured]
        if unknown and any(name not in _OF_TEXTS for name in self._config.rewards):
            raise DataError(
                f"is steered in `{unknown[0]}`, which {self._source.name} does not measure (it has "
                f"{', '.join(measured)})"
            )
        # As if nothing had been moved: what applies to a row does not depend on the output.
        still = {
            goal: target.low if target.source is None else target.source
            for goal, target in targets.goals.items()
        }
        if all(self._value(name, targets, still, "") is None for name in self._config.rewards):
            rewards = ", ".join(self._config.rewards)
            raise DataError(f"asks for no move, so that none of reward.steering.rewards ({rewards}) applies")

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        rollouts = list(rollouts)
        stripped = [self._to_measure(each) for each in rollouts] if self._config.strip_thinking else rollouts
        measured = self._source.submit(stripped)

        def results() -> list[RewardResult]:
            found = measured.result()
            if len(found) != len(rollouts):
                wrong = f"{len(found)} results for {len(rollouts)} samples"
                raise RewardInvalidError(f"{self._source.name} gave {wrong}")
            numbered = enumerate(zip(rollouts, found, strict=True))
            return [self._result(position, *each) for position, each in numbered]

        return when_all_done([measured], results)

    def _to_measure(self, rollout: Rollout) -> Rollout:
        """Without what a completion thinks; a prompt may have opened the thought."""
        _, closed, rest = rollout.completion.text.rpartition(_CLOSE)
        if not closed:
            return rollout
        return replace(rollout, completion=replace(rollout.completion, text=rest.lstrip()))

    def _result(self, position: int, rollout: Rollout, measured: RewardResult) -> RewardResult:
        if not measured.ok:
            return measured
        if measured.token_scores is not None:
            wrong = f"{self._source.name} scores each token: steering needs one value per goal"
            return self._invalid(measured, wrong)
        try:
            targets = read_targets(rollout.prompt.metadata, self._config, self._source.objectives)
        except DataError as error:
            return self._invalid(measured, f"the prompt's row {error}")
        text, values = rollout.completion.text, measured.scores
        try:
            scores = {name: self._value(name, targets, values, text) for name in self._config.rewards}
        except _MissingError as error:
            has = ", ".join([*values, *measured.absent]) or "none"
            where = name_row(position, rollout.sample)
            what = "no value" if error.goal in measured.absent else f"nothing (it measures {has})"
            return self._invalid(
                measured, f"{self._source.name} gave {what} for the goal `{error.goal}` of {where}"
            )
        applying = {name: score for name, score in scores.items() if score is not None}
        absent = tuple(name for name in scores if name not in applying)
        if not applying:
            return replace(
                self._invalid(measured, "the prompt's row asks for no move, so no reward applies"),
                absent=absent,
            )
        return replace(
            measured, scores=applying, absent=absent, facts=self._facts(targets, values, text, scores)
        )

    def _facts(
        self,
        targets: Targets,
        values: Mapping[str, float],
        text: str,
        scores: Mapping[str, float | None],
    ) -> dict[str, float]:
        """NaN for what does not apply, or lacks a value."""
        facts: dict[str, float] = {}
        for name in self._config.all_rewards:
            try:
                value = scores[name] if name in scores else self._value(name, targets, values, text)
            except _MissingError:
                value = None
            facts[FACTS + name] = math.nan if value is None else value
        errors = {
            goal: abs(_left(target, values[goal])) for goal, target in targets.goals.items() if goal in values
        }
        is_whole = all(goal in errors for goal in targets.steering)
        facts[f"{FACTS}error"] = (
            formulas.norm([errors[goal] for goal in targets.steering]) if is_whole else math.nan
        )
        facts |= {f"{FACTS}error/{goal}": error for goal, error in errors.items()}
        return facts | {f"{FACTS}value/{goal}": value for goal, value in values.items()}

    def _value(self, name: str, targets: Targets, values: Mapping[str, float], text: str) -> float | None:
        """One reward of one sample; None where it does not apply.

        Raises:
            _MissingError: a goal that it needs has no value.
        """
        if name == THINK_FORMAT:
            return float(text.startswith(_OPEN) and text.find(_CLOSE, len(_OPEN)) >= 0)
        if name == ENGLISH_ONLY:
            return float(is_in_latin_script(text))
        if name == STEERABILITY:
            return formulas.steerability(_lefts(targets, targets.steering, values), self._config)
        if goal := _goal_of(name):
            return 0.0 - abs(_lefts(targets, [goal], values)[0]) if goal in targets.goals else None
        goals = self._space(targets, values)
        left = _lefts(targets, goals, values)
        sources = {goal: source for goal in goals if (source := targets.goals[goal].source) is not None}
        asked = [_left(targets.goals[goal], sources[goal]) for goal in goals]
        if name == MISCALIBRATION:
            return formulas.miscalibration(left, asked, normalize=self._config.normalize_miscal)
        assert name == ORTHOGONALITY, name
        moved = [values[goal] - sources[goal] for goal in goals]
        return formulas.orthogonality(left, asked, moved, normalize=self._config.normalize_ortho)

    def _space(self, targets: Targets, values: Mapping[str, float]) -> list[str]:
        """Goals in which side effects are looked for."""
        if self._config.space == "steering":
            return list(targets.steering)
        known = self._source.objectives or values
        return [
            goal
            for goal, target in targets.goals.items()
            if goal in targets.steering or (target.source is not None and goal in known)
        ]

    def _invalid(self, measured: RewardResult, detail: str) -> RewardResult:
        return RewardResult(
            RewardStatus.INVALID,
            model=measured.model,
            version=measured.version,
            latency_s=measured.latency_s,
            detail=detail,
        )


def _goal_of(reward: str) -> str:
    """The goal whose own error a reward is; "" for the others."""
    return "" if reward in STEERING_REWARDS else reward.removesuffix(ERRORS)


def _left(target: Target, value: float) -> float:
    """From a value to the target."""
    return target.nearest(value) - value


def _lefts(targets: Targets, goals: Sequence[str], values: Mapping[str, float]) -> list[float]:
    for goal in goals:
        if goal not in values:
            raise _MissingError(goal)
    return [_left(targets.goals[goal], values[goal]) for goal in goals]


def is_in_latin_script(text: str) -> bool:
    """Whether a text's letters are Latin ones; a word may have one Greek letter, as in formulas and units."""
    word = ""
    for character in [*text, " "]:
        if character.isalpha():
            word += character
            continue
        foreign = [] if word.isascii() else [letter for letter in word if _script(letter) != "LATIN"]
        if len(foreign) > 1 or any(_script(letter) != "GREEK" for letter in foreign):
            return False
        word = ""
    return True


def _script(letter: str) -> str:
    """The first word of a letter's name; of a ligature or the micro sign, of the plain letter's."""
    return unicodedata.name(unicodedata.normalize("NFKC", letter)[:1], "").partition(" ")[0]

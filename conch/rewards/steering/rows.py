"""What a row says about where its text is in goal space, and where it shall go.

source_formality: 0.4          z_0, where the source text is
target_formality: 0.9          z*, where the output shall be
target_formality: [0.8, 1.0]   z* is the nearest point between these
target_formality: null         stays where it is: z* = z_0
steering_goals: [formality]    goals that the text is steered in; also "formality,joy", or the JSON of a list
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conch.config import SteeringConfig
from conch.config.steering import MISCALIBRATION, ORTHOGONALITY
from conch.errors import DataError

SOURCE, TARGET, GOALS = "source_", "target_", "steering_goals"
_NEED_SOURCES = (MISCALIBRATION, ORTHOGONALITY)


@dataclass(frozen=True, slots=True)
class Target:
    """One goal of a row.

    low, high: between which the output shall be; the same number where the target is one.
    source: where the source text is; None where the row does not say.
    """

    low: float
    high: float
    source: float | None

    def nearest(self, value: float) -> float:
        """The target's point that is nearest to a value."""
        return min(max(value, self.low), self.high)


@dataclass(frozen=True, slots=True)
class Targets:
    """All goals of a row.

    goals: each with its target: of goals without one, where they are.
    steering: those that the text is steered in.
    """

    goals: Mapping[str, Target]
    steering: tuple[str, ...]


def read_targets(row: Mapping[str, Any], config: SteeringConfig, measured: Sequence[str] = ()) -> Targets:
    """Read a row's goals.

    measured: all goals that are: of others, as in a column `target_language`, nothing is read. Empty where
        they are not known.

    Raises:
        DataError: a phrase about the row: "has no `target_formality`".
    """
    steering = steering_goals(row, config.goals)
    needs_source = any(name in config.all_rewards for name in _NEED_SOURCES)
    for goal in steering:
        if TARGET + goal not in row:
            raise DataError(f"has no `{TARGET}{goal}`, and is steered in `{goal}`")
        if needs_source and _is_empty(row.get(SOURCE + goal)):
            wanted = " and ".join(name for name in _NEED_SOURCES if name in config.all_rewards)
            raise DataError(f"has no `{SOURCE}{goal}`, which {wanted} start from")
    named = [key.removeprefix(TARGET).removeprefix(SOURCE) for key in row if key.startswith((TARGET, SOURCE))]
    named = [goal for goal in named if not measured or goal in measured]
    goals: dict[str, Target] = {}
    for goal in dict.fromkeys([*steering, *named]):
        target = _target(row, goal)
        if target is not None:
            goals[goal] = target
        elif goal in steering:
            raise DataError(f"has neither `{TARGET}{goal}` nor a `{SOURCE}{goal}` to stay at")
    return Targets(goals, steering)


def steering_goals(row: Mapping[str, Any], default: tuple[str, ...]) -> tuple[str, ...]:
    """Return the goals that a row is steered in.

    default: of rows that do not say, `reward.steering.goals`.

    Raises:
        DataError: a phrase about the row.
    """
    names = row.get(GOALS)
    if _is_empty(names):
        if not default:
            raise DataError(f"has no `{GOALS}`, and `reward.steering.goals` names none for such rows")
        return default
    if isinstance(names, str):
        names = _listed(names)
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"has `{GOALS}` = {names!r:.80}, which is no list of goals")
    if len(set(names)) < len(names) or not names:
        raise DataError(f"has `{GOALS}` = {names!r:.80}: name each goal once, and one at least")
    return tuple(names)


def _listed(text: str) -> Any:
    if not text.lstrip().startswith("["):
        return [name.strip() for name in text.split(",")]
    try:
        return json.loads(text)
    except ValueError:
        return text


def _target(row: Mapping[str, Any], goal: str) -> Target | None:
    """None where the row says nothing about the goal."""
    source = None if _is_empty(row.get(SOURCE + goal)) else _number(row, SOURCE + goal)
    value = row.get(TARGET + goal)
    if _is_empty(value):
        return None if source is None else Target(source, source, source)
    if not isinstance(value, (list, tuple)):
        number = _number(row, TARGET + goal)
        return Target(number, number, source)
    if len(value) != 2:
        raise DataError(f"has `{TARGET}{goal}` = {value!r:.80}: a range is [lowest, highest]")
    low, high = (_as_number(each, TARGET + goal) for each in value)
    if low > high:
        raise DataError(f"has `{TARGET}{goal}` = [{low:g}, {high:g}], which is upside down")
    return Target(low, high, source)


def _is_empty(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _number(row: Mapping[str, Any], key: str) -> float:
    return _as_number(row[key], key)


def _as_number(value: Any, key: str) -> float:
    # A bool is an int to Python, and a text that looks like a number has come from the wrong column.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        number = float(value) if is_number else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise DataError(f"has `{key}` = {value!r:.80}, which is no number")
    return number

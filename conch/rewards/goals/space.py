"""The space of several goals, in which a text is a point."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from conch.config import RewardConfig
from conch.errors import ConfigError, RewardUnavailableError
from conch.log import get_logger
from conch.rewards.goals.base import Failure, Goal, Value
from conch.rewards.goals.named import named_goal, split_goals
from conch.rewards.goals.ranges import DEFAULT_RANGES, Range, as_ranges, normalized, ranges_for, read_ranges

_log = get_logger(__name__)


@runtime_checkable
class ValueStore(Protocol):
    """Values that were measured before."""

    def get(self, goal: str, texts: Sequence[str]) -> list[float | None]:
        """Values of a goal; None where none is kept."""
        ...

    def put(self, goal: str, values: Mapping[str, float]) -> None:
        """Keep values of a goal by text."""
        ...


class GoalSpace:
    """Measures texts by several goals. Threads may share one.

    goals: names as in settings (see `named.py`), in one string with commas between or in a list, which may
        hold `Goal`s too.
    normalization: the range of each goal: a file, or goal -> (min, max), {"min", "max"} or None for one that
        is taken as it is. Without it, `DEFAULT_RANGES`.
    config: how the clients of goals that are served models ask.
    store: of values, before they are normalised, that are not measured again.
    setting: where `goals` come from, for messages.

    Raises:
        ConfigError: no such goal, one named twice, a package that is not installed, or a range that is none.
    """

    def __init__(
        self,
        goals: str | Sequence[str | Goal],
        normalization: Path | str | Mapping[str, Any] | None = None,
        *,
        config: RewardConfig | None = None,
        store: ValueStore | None = None,
        setting: str = "goals",
    ) -> None:
        listed = split_goals(goals) if isinstance(goals, str) else list(goals)
        if not listed:
            raise ConfigError(f"{setting}: name at least one goal")
        self._ranges, self._where = _read_normalization(normalization)
        options = config or RewardConfig()
        self._goals = [
            each if isinstance(each, Goal) else named_goal(each, options, setting) for each in listed
        ]
        self.names: tuple[str, ...] = tuple(goal.name for goal in self._goals)
        if twice := [name for name, count in Counter(self.names).items() if count > 1]:
            raise ConfigError(
                f"{setting}: goal `{twice[0]}` is named twice: give one of them a name of its own"
            )
        self._store = store
        self._told: set[str] = set()

    def check(self, *, normalize: bool = True) -> None:
        """Find out before long work starts whether every goal can be measured, and has a range.

        Raises:
            ConfigError: a goal has no range, which `normalize` needs.
            RewardError: a goal cannot be measured, or its model is away.
        """
        if normalize:
            self.ranges()
        for goal in self._goals:
            goal.check()

    def ranges(self) -> dict[str, Range]:
        """Return the range of each goal.

        Raises:
            ConfigError: a goal has none.
        """
        return ranges_for(self.names, self._ranges, self._where)

    def measure(self, texts: Sequence[str], *, normalize: bool = True) -> dict[str, list[float]]:
        """Return goal -> one value per text; NaN where a goal has no value for a text.

        normalize: values between 0 and 1, by each goal's range.

        Raises:
            ConfigError: a goal has no range to normalise by.
            RewardUnavailableError: the server of a goal that is a model is away, so that asking again may
                help.
        """
        columns: dict[str, list[float]] = {}
        for name, values in self.outcomes(texts, normalize=normalize).items():
            for value in values:
                if isinstance(value, Failure) and value.status.is_infrastructure:
                    raise RewardUnavailableError(value.detail)
            columns[name] = [math.nan if isinstance(value, Failure) else value for value in values]
        return columns

    def outcomes(self, texts: Sequence[str], *, normalize: bool = True) -> dict[str, list[Value]]:
        """As `measure`, with the reason in place of a value that is missing. Raises ConfigError alone."""
        ranges = self.ranges() if normalize else dict.fromkeys(self.names)
        waiting = [(goal, *self._start(goal, texts)) for goal in self._goals]
        return {
            goal.name: [
                value if isinstance(value, Failure) else normalized(value, ranges[goal.name])
                for value in self._finish(goal, texts, known, values())
            ]
            for goal, known, values in waiting
        }

    def close(self) -> None:
        """Close connections to served models."""
        for goal in self._goals:
            goal.close()

    def _start(self, goal: Goal, texts: Sequence[str]) -> tuple[list[float | None], Any]:
        """What is kept of a goal's values, and what waits for the others."""
        known: list[float | None] = [None] * len(texts)
        if self._store is not None and goal.version is not None:
            known = self._store.get(_key(goal), texts)
        missing = [text for text, value in zip(texts, known, strict=True) if value is None]
        return known, goal.start(missing)

    def _finish(
        self, goal: Goal, texts: Sequence[str], known: list[float | None], measured: list[Value]
    ) -> list[Value]:
        waiting = iter(measured)
        values: list[Value] = [next(waiting) if value is None else value for value in known]
        news = {
            text: value
            for text, before, value in zip(texts, known, values, strict=True)
            if before is None and not isinstance(value, Failure)
        }
        if news and self._store is not None and goal.version is not None:
            self._store.put(_key(goal), news)
        self._tell(goal, values)
        return values

    def _tell(self, goal: Goal, values: Sequence[Value]) -> None:
        """Log the first text that a goal has no value for."""
        if goal.name in self._told:
            return
        failure = next((value for value in values if isinstance(value, Failure)), None)
        if failure is not None:
            self._told.add(goal.name)
            _log.warning("%s (told once for this goal)", failure.detail)


def _key(goal: Goal) -> str:
    return f"{goal.name}@{goal.version}"


def _read_normalization(
    normalization: Path | str | Mapping[str, Any] | None,
) -> tuple[Mapping[str, Range], str]:
    if normalization is None:
        return DEFAULT_RANGES, "the default ranges"
    if isinstance(normalization, Mapping):
        return as_ranges(normalization, "normalization"), "normalization"
    return read_ranges(Path(normalization)), str(normalization)

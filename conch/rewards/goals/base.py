"""What a goal is, and what it says of a text."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from conch.errors import RewardError, first_line
from conch.types import RewardStatus

Measure: TypeAlias = Callable[[Sequence[str]], Sequence[float | None]]
"""Texts -> one number per text; NaN or None where there is none."""


class Failure(NamedTuple):
    """Why a goal has no value for a text.

    detail: repeats nothing of the text.
    """

    status: RewardStatus
    detail: str


Value: TypeAlias = float | Failure
"""A finite number, or why there is none."""


class Goal(ABC):
    """A figure of a text.

    name: in settings, replies and rewards.
    version: another one may give other values; None where values are not to be kept, since they may change.
    """

    name: str
    version: str | None = None

    @abstractmethod
    def start(self, texts: Sequence[str]) -> Callable[[], list[Value]]:
        """Begin to measure, and return what waits for the values: one per text, in order.

        Neither raises, whatever a user's function does.
        """

    def check(self) -> None:
        """Find out before long work starts whether the goal can be measured at all.

        Raises:
            ConfigError, RewardError: one sentence: what is wrong, and what to do.
        """
        return

    def close(self) -> None:
        """Release threads and connections."""
        return


class MeasuredGoal(Goal):
    """A goal that a function of texts computes here. A text that it raises for has no value; others do."""

    def __init__(self, name: str, measure: Measure, version: str | None = None) -> None:
        self.name = name
        self.version = version
        self._measure = measure

    def start(self, texts: Sequence[str]) -> Callable[[], list[Value]]:
        return lambda: self._values(texts)

    def check(self) -> None:
        """Measure two short texts.

        Raises:
            RewardError: it has a value for neither.
        """
        values = self._values(["A word.", "Two more words, and a comma."])
        if all(isinstance(each, Failure) for each in values):
            assert isinstance(values[0], Failure)
            raise RewardError(f"{values[0].detail}: it has no value for two plain English texts")

    def _values(self, texts: Sequence[str]) -> list[Value]:
        if not texts:
            return []
        try:
            return self._read(self._measure(list(texts)), len(texts))
        except BaseException as error:
            # SystemExit too: it would end the thread that measures.
            if len(texts) == 1:
                reason = f"goal `{self.name}` raised {type(error).__name__}"
                return [Failure(RewardStatus.INVALID, reason)]
        return [value for text in texts for value in self._values([text])]

    def _read(self, reply: Any, count: int) -> list[Value]:
        values = reply.tolist() if hasattr(reply, "tolist") else reply
        if not isinstance(values, Sequence) or isinstance(values, (str, bytes)) or len(values) != count:
            size = f"{len(values)} values" if hasattr(values, "__len__") else f"a {type(values).__name__}"
            wrong = f"goal `{self.name}` returned {size} for {count} texts: return one number for each"
            return [Failure(RewardStatus.INVALID, wrong)] * count
        return [number_or_failure(self.name, value) for value in values]


def number_or_failure(name: str, value: Any) -> Value:
    """Read what a goal gave for a text: a finite number, or no value."""
    try:
        number = math.nan if value is None or isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isfinite(number):
        return number
    return Failure(RewardStatus.INVALID, f"goal `{name}` has no value for the text")


def reason_of(error: BaseException) -> str:
    """First line of an error of ours, which holds nothing of a text; only the type of another."""
    return first_line(error) if isinstance(error, RewardError) else type(error).__name__

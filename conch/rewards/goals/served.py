"""A goal that a served model measures: the score of the text alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

from conch.config import RewardConfig
from conch.rewards.base import RewardSource
from conch.rewards.goals.base import Failure, Goal, Value, number_or_failure, reason_of
from conch.rewards.served import TritonReward
from conch.types import Completion, Prompt, RewardResult, RewardStatus, Rollout


class ServedGoal(Goal):
    """The score that a model gives a text. The client keeps its own scores, and forgets them when the model
    changes."""

    def __init__(self, name: str, address: str, config: RewardConfig) -> None:
        self.name = name
        self._source: RewardSource = TritonReward(address, config)

    def check(self) -> None:
        self._source.check()

    def start(self, texts: Sequence[str]) -> Callable[[], list[Value]]:
        future = self._source.submit([_rollout(text) for text in texts])
        return lambda: self._values(future, len(texts))

    def close(self) -> None:
        self._source.close()

    def _values(self, future: Future[list[RewardResult]], count: int) -> list[Value]:
        try:
            return [self._value(result) for result in future.result()]
        except Exception as error:
            broken = f"goal `{self.name}`: {reason_of(error)}"
            return [Failure(RewardStatus.UNAVAILABLE, broken)] * count

    def _value(self, result: RewardResult) -> Value:
        if not result.ok:
            return Failure(result.status, f"goal `{self.name}`: {result.detail}")
        if len(result.scores) != 1:
            gives = ", ".join(result.scores) or "a score for each token"
            wrong = f"goal `{self.name}` is a model that gives {gives}: a goal needs one score for a text"
            return Failure(RewardStatus.INVALID, wrong)
        return number_or_failure(self.name, next(iter(result.scores.values())))


def _rollout(text: str) -> Rollout:
    return Rollout(Prompt("", ()), Completion(text, (), (), "eos"), policy_version=0)

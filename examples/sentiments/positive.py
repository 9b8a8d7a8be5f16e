"""P(positive) as the reward: classifiers serve log-odds, or a logit of each label, and this makes a
probability of them. The served model stays as its checkpoint is, whose scores the conversion vouches for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

from conch.config import RewardConfig
from conch.errors import RewardInvalidError
from conch.rewards.base import RewardSource, UserReward
from conch.rewards.combined import CompositeReward, when_all_done
from conch.rewards.factory import from_user
from conch.types import DEFAULT_OBJECTIVE, Completion, Prompt, RewardResult, RewardStatus, Rollout
from examples.hosting import HostedConfig

_POSITIVE = ("positive", "pos", "label_1")
_NEGATIVE = ("negative", "neg", "label_0")
# One letter and one token that any vocabulary has; only whether they get a score matters.
_PROBE = Rollout(Prompt("a", (1,)), Completion("a", (1,), (0.0,), "length"), policy_version=0)


class HostedDistilBERT(HostedConfig):
    """The classifier that the programs host unless they are told otherwise."""

    name: str = "distilbert-imdb"
    """Model in the store."""

    checkpoint: str = "lvwerra/distilbert-imdb"
    """Folder or hub id of the classifier."""


class PositiveProbability(CompositeReward):
    """Wraps a served classifier: a sample's reward is P(positive), in [0, 1].

    A classifier with one score serves log-odds, P = sigmoid(score); one with two serves the logits of
    `NEGATIVE` and `POSITIVE` (or `LABEL_0` and `LABEL_1`), P = softmax. With `reward.dense` it gives log-odds
    at each token, and a token's reward is by how much it changed P; the first token's change is from 0, so
    that a sample's rewards sum up to P after its last token.
    """

    def __init__(self, source: RewardSource) -> None:
        super().__init__(f"P(positive) by {source.name}", [source])
        self._source = source

    def check(self) -> None:
        """Check the classifier, and ask it for one score.

        Raises:
            RewardInvalidError: it has other scores than those of two sentiments, or with `reward.dense` none
                for each token of the policy.
        """
        super().check()
        (result,) = self.submit([_PROBE]).result()
        if not result.ok:
            raise RewardInvalidError(f"{self._source.name} cannot tell P(positive): {result.detail}")

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        scored = self._source.submit(rollouts)
        return when_all_done([scored], lambda: [_as_probability(result) for result in scored.result()])


def _as_probability(result: RewardResult) -> RewardResult:
    if not result.ok:
        return result
    if result.token_scores is not None:
        return replace(result, token_scores=changes([sigmoid(score) for score in result.token_scores]))
    try:
        score = sigmoid(log_odds(result.scores))
    except RewardInvalidError as error:
        return replace(result, status=RewardStatus.INVALID, scores={}, detail=str(error))
    return replace(result, scores={DEFAULT_OBJECTIVE: score})


def changes(values: Sequence[float]) -> tuple[float, ...]:
    """Each value less the one before, the first less 0."""
    return tuple(value - before for value, before in zip(values, [0.0, *values], strict=False))


def log_odds(scores: Mapping[str, float]) -> float:
    """Of P(positive), from what a classifier serves.

    Raises:
        RewardInvalidError: these are not one score, or those of two sentiments.
    """
    if len(scores) == 1:
        return next(iter(scores.values()))
    by_name = {name.lower(): score for name, score in scores.items()}
    positive = [score for name, score in by_name.items() if name in _POSITIVE]
    negative = [score for name, score in by_name.items() if name in _NEGATIVE]
    if len(scores) != 2 or len(positive) != 1 or len(negative) != 1:
        raise RewardInvalidError(
            f"its scores are {', '.join(scores)}: wanted are one, log-odds, or POSITIVE and NEGATIVE"
        )
    return positive[0] - negative[0]


def sigmoid(value: float) -> float:
    """1 / (1 + exp(-value)), for values of any size."""
    return 0.5 + 0.5 * math.tanh(value / 2)


def positive_reward(endpoint: str, config: RewardConfig) -> UserReward:
    """P(positive) by the classifier at `endpoint`. What `reward.replay` has recorded is P already."""
    return endpoint if config.replay is not None else PositiveProbability(from_user(endpoint, config))


def probabilities(source: RewardSource, texts: Sequence[str]) -> list[float]:
    """What a source says of whole texts, for a classifier in the text form.

    Raises:
        RewardInvalidError: a text got no score.
    """
    rollouts = [Rollout(Prompt("", ()), Completion(text, (), (), "eos"), policy_version=0) for text in texts]
    results = source.submit(rollouts).result()
    failed = next((result for result in results if not result.ok), None)
    if failed is not None:
        raise RewardInvalidError(f"{source.name} gave no score: {failed.detail}")
    return [result.scores[DEFAULT_OBJECTIVE] for result in results]

"""The reward of a sample relative to a reference answer: score(prompt + output) - score(prompt + original).

What is left is what the policy does better than the answer it is compared with; how easy a prompt is cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from conch.errors import DataError
from conch.rewards.source import RewardSource
from conch.rewards.wrapper import Wrapper, when_all_done
from conch.types import Completion, Prompt, RewardResult, RewardStatus, Rollout

ORIGINAL = "original_output"

_Request = tuple[Future[list[RewardResult]], int]
"""A request for baselines, and a baseline's place in it."""


class DeltaReward(Wrapper):
    """Wraps a source; each prompt's `original_output` is scored once and remembered.

    encode: tokenises an original answer, for servers that read token ids.

    A baseline that failed fails the samples of its prompt with its own status, and is asked for again with
    the next of them.
    """

    def __init__(self, source: RewardSource, encode: Callable[[str], Sequence[int]]) -> None:
        super().__init__(f"{source.name} less the original's", [source])
        self._source = source
        self._encode = encode
        self._baselines: dict[tuple[str, str], _Request] = {}

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        """See `RewardSource.submit`; scores are differences."""
        scored = self._source.submit(rollouts)
        self._ask_for_missing(rollouts)
        baselines = [self._baselines[_key(rollout.prompt)] for rollout in rollouts]
        return when_all_done(
            [scored, *(request for request, _ in baselines)],
            lambda: [
                _difference(result, request.result()[place])
                for result, (request, place) in zip(scored.result(), baselines, strict=True)
            ],
        )

    def _ask_for_missing(self, rollouts: Sequence[Rollout]) -> None:
        missing = {
            _key(rollout.prompt): self._original(rollout.prompt)
            for rollout in rollouts
            if not self._is_known(_key(rollout.prompt))
        }
        if not missing:
            return
        request = self._source.submit(list(missing.values()))
        for place, key in enumerate(missing):
            self._baselines[key] = (request, place)

    def _is_known(self, key: tuple[str, str]) -> bool:
        """True where a baseline is had or under way."""
        if key not in self._baselines:
            return False
        request, place = self._baselines[key]
        if not request.done():
            return True
        return request.exception() is None and request.result()[place].ok

    def _original(self, prompt: Prompt) -> Rollout:
        text = str(prompt.metadata[ORIGINAL])
        ids = tuple(self._encode(text))
        return Rollout(prompt, Completion(text, ids, (0.0,) * len(ids), "eos"), policy_version=0)


def check_originals(prompts: Sequence[str | Mapping[str, Any]]) -> None:
    """Refuse prompts without a reference answer.

    Raises:
        DataError: names the first.
    """
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, Mapping) or not isinstance(prompt.get(ORIGINAL), str):
            raise DataError(
                f"`reward.delta` compares with a reference answer, and prompt {index} has none: give each "
                f'prompt as a dict with "prompt" and "{ORIGINAL}"'
            )


def _key(prompt: Prompt) -> tuple[str, str]:
    return prompt.text, str(prompt.metadata[ORIGINAL])


def _difference(result: RewardResult, baseline: RewardResult) -> RewardResult:
    if not result.ok:
        return result
    if not baseline.ok:
        return replace(result, status=baseline.status, scores={}, detail=f"its baseline: {baseline.detail}")
    if result.token_scores is not None or result.scores.keys() != baseline.scores.keys():
        wrong = "`reward.delta` needs one score per objective, the same for a sample and for its original"
        return replace(result, status=RewardStatus.INVALID, scores={}, token_scores=None, detail=wrong)
    scores = {name: score - baseline.scores[name] for name, score in result.scores.items()}
    members = {
        name: None if score is None or (base := baseline.members.get(name)) is None else score - base
        for name, score in result.members.items()
    }
    return replace(result, scores=scores, members=members, detail=result.detail or baseline.detail)

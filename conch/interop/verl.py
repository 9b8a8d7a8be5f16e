"""Conch's rewards as verl's custom reward function.

    # rewards.py, named by reward.custom_reward_function.path=rewards.py
    from conch.interop.verl import reward_function

    compute_score = reward_function("127.0.0.1:8001/walks", prompt="question")

verl calls it for one completion at a time, as `compute_score(data_source, solution_str, ground_truth,
extra_info)`, and tells no prompt: a reward model takes it from a key of `extra_info`. The batch reward
manager of its older trainers hands over a list of each, in the plural.

verl knows no sample without a reward: where there is none, an error stops the run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from conch.config import RewardConfig
from conch.errors import ConfigError, DataError
from conch.interop.local import LocalReward
from conch.interop.results import error_of, is_failure, reward_of
from conch.interop.samples import make_rollouts
from conch.rewards.base import UserReward
from conch.types import RewardResult, Rollout

Score = dict[str, float]


def reward_function(
    reward: UserReward | Mapping[str, UserReward] | None = None,
    config: RewardConfig | Mapping[str, Any] | None = None,
    *,
    prompt: str | None = None,
    answer: str = "answer",
    objective: str | None = None,
    batch: bool = False,
    check: bool = True,
) -> AsyncComputeScore | BatchComputeScore:
    """Return a reward of Conch's as `compute_score`.

    reward, config, objective, check: see `conch.interop.trl.reward_function`.
    prompt: key of `extra_info` that holds the prompt, a text or a list of messages; None for rewards that
        look at the completion alone.
    answer: what `ground_truth` is called among the columns that verifiers and functions read, beside the keys
        of `extra_info` and `data_source`.
    batch: for `reward_manager=batch` of verl's older trainers.

    Raises:
        ConfigError, RewardError: the reward cannot work; one sentence: what is wrong, where, what to do.
    """
    kind = BatchComputeScore if batch else AsyncComputeScore
    function = kind(LocalReward(reward, config), prompt, answer, objective)
    if check:
        function.check()
    return function


class _ComputeScore:
    """What both forms share."""

    def __init__(self, local: LocalReward, prompt: str | None, answer: str, objective: str | None) -> None:
        self._local = local
        self._prompt = prompt
        self._answer = answer
        self._objective = objective

    def check(self, rows: Iterable[Mapping[str, Any]] | None = None) -> None:
        """Ask the servers whether they can score; see `conch.interop.trl.RewardFunction.check`."""
        self._local.check(rows)

    def close(self) -> None:
        """Close the connections of this process."""
        self._local.close()

    def _rollout(self, source: Any, solution: str, truth: Any, extra: Mapping[str, Any] | None) -> Rollout:
        extra = dict(extra or {})
        if self._prompt is not None and self._prompt not in extra:
            raise DataError(
                f"`extra_info` has no `{self._prompt}`, which was to hold the prompt; it has "
                f"{', '.join(map(str, extra)) or 'no keys'}"
            )
        asked = "" if self._prompt is None else _plain(extra.pop(self._prompt))
        row = {**extra, "data_source": source, self._answer: truth}
        (rollout,) = make_rollouts([asked], [solution], None, {key: [value] for key, value in row.items()})
        return rollout

    def _scores(self, results: Sequence[RewardResult]) -> list[Score]:
        if any(not result.ok for result in results):
            if any(map(is_failure, results)):
                raise error_of(self._local.name, results)
            raise ConfigError(
                f"reward {self._local.name} does not apply to a sample, and verl needs a number for each: "
                "choose its reward by `data_source` in a function of your own"
            )
        scores: list[Score] = []
        for result in results:
            total = reward_of(result, self._local.config.weights, self._objective)
            if total is None:
                raise ConfigError(f"`objective` = {self._objective} does not apply to a sample")
            # verl keeps what stands beside `score` as metrics.
            scores.append({"score": total, **(dict(result.scores) if len(result.scores) > 1 else {})})
        return scores


class AsyncComputeScore(_ComputeScore):
    """`compute_score` of verl's reward loop, which calls many at once."""

    def __init__(self, local: LocalReward, prompt: str | None, answer: str, objective: str | None) -> None:
        super().__init__(local, prompt, answer, objective)
        self._dress()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if not key.startswith("__")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._dress()

    def _dress(self) -> None:
        # verl asks `inspect.iscoroutinefunction`, which believes what has the attributes of a function.
        call = type(self).__call__
        vars(self).update(
            __name__="compute_score",
            __code__=call.__code__,
            __defaults__=None,
            __kwdefaults__=None,
            __annotations__={},
        )

    async def __call__(
        self,
        data_source: Any,
        solution_str: str,
        ground_truth: Any,
        extra_info: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> Score:
        """Return {"score": reward}, and each of several objectives beside it.

        Raises:
            ConfigError, DataError, RewardError: there is no reward.
        """
        rollout = self._rollout(data_source, solution_str, ground_truth, extra_info)
        if self._local.is_ready:
            future = self._local.submit([rollout])
        else:  # it waits for servers, and verl's loop has others to call
            future = await asyncio.to_thread(self._local.submit, [rollout])
        return self._scores(await asyncio.wrap_future(future))[0]


class BatchComputeScore(_ComputeScore):
    """`compute_score` of the batch reward manager."""

    def __call__(
        self,
        data_sources: Sequence[Any],
        solution_strs: Sequence[str],
        ground_truths: Sequence[Any],
        extra_infos: Sequence[Mapping[str, Any] | None] | None = None,
        **_: Any,
    ) -> list[Score]:
        """Return {"score": reward} for each sample.

        Raises:
            ConfigError, DataError, RewardError: there is no reward.
        """
        extras = [None] * len(solution_strs) if extra_infos is None else extra_infos
        samples = zip(data_sources, solution_strs, ground_truths, extras, strict=True)
        return self._scores(self._local.submit([self._rollout(*sample) for sample in samples]).result())


def _plain(prompt: Any) -> Any:
    """verl's messages come as NumPy arrays."""
    return prompt.tolist() if hasattr(prompt, "tolist") else prompt

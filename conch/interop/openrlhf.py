"""Conch's rewards as OpenRLHF's reward function in a file.

    # rewards.py, named by --reward.remote_url rewards.py
    from conch.interop.openrlhf import reward_function

    reward_func = reward_function("127.0.0.1:8001/walks", end="<|im_end|>")

OpenRLHF calls it for one completion at a time, in many threads, as `reward_func(queries, prompts, labels)`. A
query is prompt and completion decoded with special tokens, the prompt as its own template rendered it.

OpenRLHF tells of an error of the function by a line of level INFO. The sample has no reward then, and there
its trainer stops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from conch.config import RewardConfig
from conch.errors import ConfigError
from conch.interop.local import LocalReward
from conch.interop.results import Tally, error_of, reward_of
from conch.interop.samples import make_rollouts
from conch.rewards.base import UserReward


def reward_function(
    reward: UserReward | Mapping[str, UserReward] | None = None,
    config: RewardConfig | Mapping[str, Any] | None = None,
    *,
    end: str | Sequence[str] = (),
    label: str = "answer",
    objective: str | None = None,
    check: bool = True,
) -> RewardFunc:
    """Return a reward of Conch's as `reward_func`.

    reward, config, objective, check: see `conch.interop.trl.reward_function`.
    end: the policy's closing tokens, which are taken off the end of a completion.
    label: what a sample's label is called among the columns that verifiers and functions read.

    Raises:
        ConfigError, RewardError: the reward cannot work; one sentence: what is wrong, where, what to do.
    """
    ends = (end,) if isinstance(end, str) else tuple(end)
    function = RewardFunc(LocalReward(reward, config), ends, label, objective)
    if check:
        function.check()
    return function


class RewardFunc:
    """`reward_func` of OpenRLHF."""

    __name__ = "reward_func"

    def __init__(self, local: LocalReward, ends: tuple[str, ...], label: str, objective: str | None) -> None:
        self._local = local
        self._ends = ends
        self._label = label
        self._objective = objective
        self._tally = Tally(local.name)

    def __reduce__(self) -> tuple[type[RewardFunc], tuple[Any, ...]]:
        return RewardFunc, (self._local, self._ends, self._label, self._objective)

    def check(self) -> None:
        """Ask the servers whether they can score."""
        self._local.check()

    def close(self) -> None:
        """Close the connections of this process."""
        self._local.close()

    def __call__(
        self, queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any]
    ) -> dict[str, Any]:
        """Return `rewards`, `scores` and `extra_logs`: a number for a single sample, as OpenRLHF asks, else a
        list of them.

        Raises:
            ConfigError, DataError, RewardError: there is no reward.
        """
        completions = [self._completion(*each) for each in zip(queries, prompts, strict=True)]
        columns = {self._label: list(labels)}
        results = self._local.submit(make_rollouts(prompts, completions, None, columns)).result()
        self._tally.count(results)
        weights = self._local.config.weights
        rewards = [reward_of(result, weights, self._objective) for result in results]
        if None in rewards:
            raise (
                error_of(self._local.name, results)
                if not all(result.ok or result.absent for result in results)
                else ConfigError(f"reward {self._local.name} does not apply to a sample")
            )
        single = rewards[0] if len(rewards) == 1 else rewards
        logs = dict(results[0].scores) if len(results) == 1 and len(results[0].scores) > 1 else {}
        return {"rewards": single, "scores": single, "extra_logs": logs}

    def _completion(self, query: str, prompt: str) -> str:
        if not query.startswith(prompt):
            raise ConfigError(
                "a query of OpenRLHF does not begin with its prompt, so nobody knows what the policy wrote: "
                "its prompts must be shorter than --data.max_len leaves room for, and decode to themselves"
            )
        completion = query[len(prompt) :]
        for end in sorted(self._ends, key=len, reverse=True):
            completion = completion.removesuffix(end)
        return completion

"""Conch's rewards in TRL's trainers.

    from conch.interop.trl import reward_function
    from trl import GRPOTrainer

    trainer = GRPOTrainer(model, reward_funcs=reward_function("127.0.0.1:8001/walks"), train_dataset=dataset)

What is returned is called as TRL calls its reward functions: keyword lists `prompts`, `completions`,
`completion_ids` and the dataset's other columns, one entry a sample, beside TRL's own `trainer_state`,
`log_extra`, `log_metric` and `environments`. Prompts and completions are texts or lists of messages.

docs/trl.md has recipes, and what each trainer of TRL makes of a sample without a reward.
"""

from __future__ import annotations

import asyncio
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from conch.config import RewardConfig
from conch.errors import ConfigError
from conch.interop.local import LocalReward, version_of
from conch.interop.results import Tally, error_of, is_failure, reward_of
from conch.interop.samples import make_rollouts
from conch.log import get_logger
from conch.rewards.base import UserReward
from conch.types import RewardResult

_log = get_logger(__name__)

ON_FAILURE = ("none", "raise")
Rewards = list[float | None]

_OF_TRL = ("trainer_state", "log_extra", "log_metric", "environments")
"""Arguments of TRL's own beside the dataset's columns."""

_EXCLUDES_NONE = (1, 6)
"""First release of TRL in which a sample without any reward is left out, and not taken for one of 0.0."""


def reward_function(
    reward: UserReward | Mapping[str, UserReward] | None = None,
    config: RewardConfig | Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    objective: str | None = None,
    on_failure: str = "none",
    sync: bool = False,
    tools: Sequence[Any] | None = None,
    check: bool = True,
) -> RewardFunction:
    """Return a reward of Conch's as a reward function of TRL's. It can be pickled where `reward` can.

    reward: what a reward of a run may be: `"host:8001/model"`, several servers, `"http://host:port/path"`,
        `"verifier:gsm8k"`, `"file.py:function"`, a function, or several of these by name.
    config: keys of a trainer's section `reward`: `{"client": {"deadline_s": 600}}`.
    name: in TRL's metrics, `rewards/<name>/mean`; None takes the model's, verifier's or function's.
    objective: the one to take of several; None takes their sum, weighted by `config`'s `weights`.
    on_failure: of samples without a reward: `none` gives TRL None and warns, `raise` stops the trainer. With
        `none`, `failure.max_fraction` in `config` bounds their share of one call.
    sync: a function that blocks, for trainers that call no async ones; docs/trl.md lists them.
    tools: JSON schemas for the chat template of a reward model, where the dataset has no column `tools`.
    check: ask the servers now whether they can score at all.

    Raises:
        ConfigError, RewardError: the reward cannot work; one sentence: what is wrong, where, what to do.
    """
    local = LocalReward(reward, config)
    function = _make(sync)(local, name or local.name, objective, on_failure, tools)
    if check:
        function.check()
    return function


def reward_functions(
    objectives: Sequence[str],
    reward: UserReward | Mapping[str, UserReward] | None = None,
    config: RewardConfig | Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    on_failure: str = "none",
    sync: bool = False,
    tools: Sequence[Any] | None = None,
    check: bool = True,
) -> list[RewardFunction]:
    """Return a function for each objective of one reward, which samples are scored by only once.

    TRL weighs them by `reward_weights`, and its metrics are `rewards/<name>/<objective>/mean`.

    objectives: of the reward; of several rewards by name, these names.

    Raises:
        ConfigError, RewardError: as `reward_function`.
    """
    if isinstance(objectives, str) or not objectives or len(set(objectives)) < len(objectives):
        raise ConfigError(f"`objectives` = {objectives!r}: give a list of different names")
    local = LocalReward(reward, config)
    latest = _Latest()
    functions: list[RewardFunction] = [
        _make(sync)(local, f"{name or local.name}/{objective}", objective, on_failure, tools, latest)
        for objective in objectives
    ]
    if check:
        functions[0].check()
    return functions


class _Latest:
    """The last batch and its scores, which the functions of one reward's objectives share."""

    def __init__(self) -> None:
        self._batch: tuple[Any, Any] = (None, None)
        self._future: Future[list[RewardResult]] | None = None
        self._taken: set[str] = set()

    def __reduce__(self) -> tuple[type[_Latest], tuple[()]]:
        return _Latest, ()

    def take(self, prompts: Any, completions: Any, taker: str) -> Future[list[RewardResult]] | None:
        """The scores of this very batch, once for each of the functions; None where there are none."""
        same = self._batch[0] is prompts and self._batch[1] is completions
        if not same or taker in self._taken:
            return None
        self._taken.add(taker)
        return self._future

    def put(
        self, prompts: Any, completions: Any, taker: str, future: Future[list[RewardResult]]
    ) -> Future[list[RewardResult]]:
        self._batch, self._future, self._taken = (prompts, completions), future, {taker}
        return future


class RewardFunction(ABC):
    """A reward in the form that TRL calls, with what both kinds of it share.

    local: the reward.
    name: what TRL's metrics call it.
    """

    def __init__(
        self,
        local: LocalReward,
        name: str,
        objective: str | None,
        on_failure: str,
        tools: Sequence[Any] | None,
        latest: _Latest | None = None,
    ) -> None:
        if on_failure not in ON_FAILURE:
            raise ConfigError(f"`on_failure` = {on_failure!r}: give {' or '.join(ON_FAILURE)}")
        if objective is not None and local.config.weights:
            raise ConfigError("`weights` weigh the objectives of a sum, and `objective` takes one of them")
        if tools is not None and not all(isinstance(tool, Mapping) for tool in tools):
            raise ConfigError(
                "`tools` are JSON schemas here: [transformers.utils.get_json_schema(tool) for tool in tools]"
            )
        self._local = local
        self._name = name
        self._objective = objective
        self._on_failure = on_failure
        self._tools = tools
        self._latest = latest
        self._dress()

    @abstractmethod
    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> Any:
        """Return a reward for each sample, None for one without; or a coroutine of that."""

    def __getstate__(self) -> dict[str, Any]:
        keys = ("_local", "_name", "_objective", "_on_failure", "_tools", "_latest")
        return {key: self.__dict__[key] for key in keys}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._dress()

    def _dress(self) -> None:
        self.__name__ = self.__qualname__ = self._name
        self._tally = Tally(self._name)

    def check(self, rows: Iterable[Mapping[str, Any]] | None = None) -> None:
        """Ask the servers whether they can score, and leave nothing open.

        rows: of the dataset, all of which are looked at: can their prompts and columns be scored?

        Raises:
            ConfigError, DataError, RewardError: one sentence: what is wrong, where, and what to do.
        """
        self._local.check(rows)
        trl = version_of("trl")
        if trl is not None and trl < _EXCLUDES_NONE and self._on_failure == "none":
            _log.warning(
                "TRL %s takes a sample without a reward for one of 0.0: give on_failure='raise', or install "
                "TRL %s or later",
                *(".".join(map(str, trl)), ".".join(map(str, _EXCLUDES_NONE))),
            )

    @property
    def samples(self) -> int:
        """Samples that were scored or failed, in this process."""
        return self._tally.samples

    @property
    def failed(self) -> int:
        """Samples that should have had a reward and got none, in this process."""
        return self._tally.failed

    def close(self) -> None:
        """Close the connections of this process, which its end does as well; the next call opens new ones."""
        self._local.close()

    def _submit(
        self, prompts: Sequence[Any], completions: Sequence[Any], ids: Any, columns: Mapping[str, Any]
    ) -> Future[list[RewardResult]]:
        own = {key: value for key, value in columns.items() if _is_column(key, value, len(prompts))}
        if self._latest is None:
            return self._local.submit(make_rollouts(prompts, completions, ids, own, self._tools))
        # Of functions that are called at once, before the reward is open, each is in a thread.
        with self._local.batch_lock:
            future = self._latest.take(prompts, completions, self._name)
            if future is not None:
                return future
            future = self._local.submit(make_rollouts(prompts, completions, ids, own, self._tools))
            return self._latest.put(prompts, completions, self._name, future)

    def _rewards(self, results: Sequence[RewardResult], columns: Mapping[str, Any]) -> Rewards:
        self._tally.count(results)
        failed = sum(map(is_failure, results)) / max(1, len(results))
        log_metric = columns.get("log_metric")
        if callable(log_metric):
            # Always, or a mean over steps would be one over those with failures.
            log_metric(f"rewards/{self._name}/failed", failed)
        failure = self._local.config.failure
        bounded = "max_fraction" in failure.model_fields_set
        if failed and self._on_failure == "raise":
            raise error_of(self._name, results, "; on_failure='none' goes on without such samples")
        if bounded and failed > failure.max_fraction:
            limit = f", more than failure.max_fraction={failure.max_fraction:g} allows"
            raise error_of(self._name, results, limit)
        weights = self._local.config.weights
        return [reward_of(result, weights, self._objective) for result in results]


class AsyncRewardFunction(RewardFunction):
    """An async reward function: TRL calls it beside others of its kind, and all wait for their servers at
    once."""

    def _dress(self) -> None:
        super()._dress()
        # TRL before 1.14 asks `inspect.iscoroutinefunction` of the object, which believes what has the
        # attributes of a function; `__signature__` is what it then shows.
        keywords = inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)
        vars(self).update(
            __code__=type(self).__call__.__code__,
            __defaults__=None,
            __kwdefaults__=None,
            __annotations__={},
            __signature__=inspect.Signature([keywords]),
        )

    async def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> Rewards:
        """Return a reward for each sample, None for one without.

        Raises:
            ConfigError, DataError: the reward cannot score such samples at all.
            RewardError: samples without a reward, where `on_failure` or `failure.max_fraction` says so.
        """
        if self._local.is_ready:
            future = self._submit(prompts, completions, completion_ids, columns)
        else:  # it waits for servers, and TRL's loop has others to call
            future = await asyncio.to_thread(self._submit, prompts, completions, completion_ids, columns)
        # Other functions may wait for the same future, which a cancelled one must not cancel.
        return self._rewards(await asyncio.shield(asyncio.wrap_future(future)), columns)


class SyncRewardFunction(RewardFunction):
    """A reward function that blocks until all samples are scored."""

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> Rewards:
        """Return a reward for each sample, None for one without.

        Raises:
            ConfigError, DataError, RewardError: see `AsyncRewardFunction`.
        """
        return self._rewards(self._submit(prompts, completions, completion_ids, columns).result(), columns)


def _make(sync: bool) -> type[AsyncRewardFunction] | type[SyncRewardFunction]:
    return SyncRewardFunction if sync else AsyncRewardFunction


def _is_column(key: str, value: Any, rows: int) -> bool:
    """Whether a keyword argument is one of the dataset's columns."""
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return key not in _OF_TRL and is_list and len(value) == rows

"""A reward that travels as its address and settings, and is opened in each process where it is used."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from conch.addresses import SCHEMES
from conch.config import RewardConfig, load
from conch.errors import ConfigError, DataError, RewardUnavailableError
from conch.log import get_logger
from conch.rewards.base import RewardSource, UserReward, sources_closed_on_failure
from conch.rewards.combined import refuse_groups
from conch.rewards.factory import from_user, is_function_name, named_function
from conch.rewards.function import needed_columns
from conch.types import Prompt, RewardResult, RewardStatus, Rollout

_log = get_logger(__name__)

_OF_TRAINERS = {
    "record": "only a run of Conch's keeps a record of rewards",
    "replay": "only a run of Conch's takes rewards from a record",
    "delta": "only Conch's trainers subtract a reference answer's score",
    "dense": "other trainers take one reward for a completion",
}
"""Keys of a section `reward` that mean nothing without a trainer of ours -> why."""

_rewards: weakref.WeakSet[LocalReward] = weakref.WeakSet()
_left_behind: list[RewardSource] = []


class _Grpc:
    """is_used: this process has asked a server over gRPC. is_dead: one that it was forked from had."""

    is_used = False
    is_dead = False


_grpc = _Grpc()


class LocalReward:
    """A reward that each process opens for itself, at its first use there. Can be pickled.

    reward: what a reward of a run may be, see docs/rewards.md; None takes what `config` names, else
        TRITON_HOST.
    config: keys of a trainer's section `reward`, or the section itself.

    Raises:
        ConfigError: a key is unknown, or means nothing here.
    """

    def __init__(
        self,
        reward: UserReward | Mapping[str, UserReward] | None,
        config: RewardConfig | Mapping[str, Any] | None,
    ) -> None:
        values = config if isinstance(config, RewardConfig) else load(RewardConfig, dict(config or {}))
        for key, why in _OF_TRAINERS.items():
            if getattr(values, key):
                raise ConfigError(f"`reward.{key}` has no effect here: {why}")
        if isinstance(reward, str) and is_function_name(reward):
            values, reward = values.model_copy(update={"function": reward}), None
        self.reward = reward
        self.config = values
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"reward": self.reward, "config": self.config}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def _forget(self) -> None:
        _rewards.add(self)
        self._lock = threading.Lock()
        self.batch_lock = threading.Lock()
        """For functions that share the scores of a batch; a fork makes another one."""
        self._source: RewardSource | None = None
        self._closer: weakref.finalize[[int, RewardSource], LocalReward] | None = None
        self._ready = False
        self._reads: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What metrics call the reward: its model, verifier or function; "reward" where it has no name."""
        reward, config = self.reward, self.config
        if reward is None:
            named = config.function or config.verifier or config.url or ""
            word = named if config.named_by else os.environ.get("TRITON_HOST", "")
        else:
            word = reward if isinstance(reward, str) else getattr(reward, "__name__", None)
            word = word or getattr(reward, "name", None) or "reward"
        if "://" in word or not word:
            return "reward"
        # host:8001/model, verifier:gsm8k, file.py:function
        return word.rpartition("/")[2].rpartition(":")[2] or "reward"

    def check(self, rows: Iterable[Mapping[str, Any]] | None = None) -> None:
        """Find out whether scoring can work: ask servers for one score, look at a function's signature.

        rows: of the dataset, whose prompts and columns are looked at as well.

        Raises:
            ConfigError, DataError, RewardError: one sentence: what is wrong, where, and what to do.
        """
        prompts = [_prompt_of(index, row) for index, row in enumerate(() if rows is None else rows)]
        columns = {name for prompt in prompts for name in prompt.metadata}
        source = self._new_source((self._needed_columns() or None) if rows is None else sorted(columns))
        try:
            source.check()
            _refuse_tokens(source)
            if rows is not None:
                _check_form(source, prompts)
            for index, prompt in enumerate(prompts):
                try:
                    source.check_row(prompt.metadata)
                except DataError as error:
                    raise DataError(f"row {index} of the dataset {error}, for {source.name}") from None
        finally:
            # Nothing stays open: trainers fork and spawn processes once they are made.
            source.close()

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        """Start scoring and return at once, but for a process's first call, which waits for the servers.

        Raises:
            ConfigError, DataError, RewardInvalidError: no sample can be scored this way.
        """
        source = self._open(sorted({name for rollout in rollouts for name in rollout.prompt.metadata}))
        try:
            self._make_ready(source, rollouts)
        except RewardUnavailableError as error:
            away: Future[list[RewardResult]] = Future()
            away.set_result([RewardResult(RewardStatus.UNAVAILABLE, detail=str(error))] * len(rollouts))
            return away
        _check_form(source, [rollout.prompt for rollout in rollouts])
        return source.submit(rollouts)

    @property
    def is_ready(self) -> bool:
        """Whether `submit` returns at once: this process has asked the servers what they have."""
        return self._ready

    def close(self) -> None:
        """Close what this process has opened; a later use opens it again."""
        with self._lock:
            closer, self._closer, self._source, self._ready = self._closer, None, None, False
        if closer is not None:
            closer()

    @sources_closed_on_failure()
    def _new_source(self, columns: Sequence[str] | None) -> RewardSource:
        source = from_user(self.reward, self.config, metadata_keys=columns)
        # A group may lie on several processes of another trainer.
        refuse_groups(source, "a reward function of another trainer")
        if any(map(_speaks_grpc, _parts(source))):
            if _grpc.is_dead:
                raise ConfigError(
                    f"{source.name} cannot be asked here: this process was forked from one that had asked a "
                    "Triton server, and gRPC does not start again in it. Start processes with the method "
                    "spawn, or make the reward function in the new process"
                )
            _grpc.is_used = True
        return source

    def _needed_columns(self) -> list[str]:
        """Columns that functions ask for, which a dataset may well have."""
        rewards = self.reward.values() if isinstance(self.reward, Mapping) else [self.reward]
        functions = [each for each in rewards if callable(each)]
        if self.reward is None and self.config.function is not None:
            functions = [named_function(self.config.function)]
        return sorted({name for function in functions for name in needed_columns(function)})

    def _open(self, columns: Sequence[str]) -> RewardSource:
        with self._lock:
            if self._source is None:
                self._source = self._new_source(columns)
                # With its reward, or at the end of the process.
                self._closer = weakref.finalize(self, _close_in, os.getpid(), self._source)
            return self._source

    def _make_ready(self, source: RewardSource, rollouts: Sequence[Rollout]) -> None:
        """Check the source, as long as it has not passed in this process."""
        with self._lock:
            if self._ready:
                return
            source.check()
            _refuse_tokens(source)
            _check_rows(source, rollouts)
            self._ready = True


def _prompt_of(index: int, row: Mapping[str, Any]) -> Prompt:
    from conch.interop.samples import make_prompt

    if "prompt" not in row:
        raise DataError(
            f"row {index} of the dataset has no `prompt`; it has {', '.join(row) or 'no columns'}"
        )
    try:
        return make_prompt(row["prompt"], {name: value for name, value in row.items() if name != "prompt"})
    except DataError as error:
        raise DataError(f"row {index} of the dataset {error}") from None


def _parts(source: RewardSource) -> Iterator[RewardSource]:
    """A source and those that it stands on."""
    yield source
    for inner in getattr(source, "sources", ()):
        yield from _parts(inner)


def _speaks_grpc(source: RewardSource) -> bool:
    served = sys.modules.get("conch.rewards.served")  # without it there is no client of a server
    return served is not None and isinstance(source, served.TritonReward)


def _refuse_tokens(source: RewardSource) -> None:
    for part in _parts(source):
        if getattr(part, "reads", None) == "tokens":
            raise ConfigError(
                f"{part.name} takes token ids, and reward functions are given texts or messages: convert the "
                "model again with --form text"
            )


def _check_form(source: RewardSource, prompts: Sequence[Prompt]) -> None:
    """Find out whether the models read these prompts, texts or dialogues.

    Raises:
        ConfigError: one does not.
    """
    if any(prompt.dialogue is not None for prompt in prompts):
        for part in _parts(source):
            if getattr(part, "reads", None) == "texts":
                remedy = (
                    "set `dialect` to messages, if it reads them"
                    if part.name.startswith(SCHEMES)
                    else "convert the model again with --template chat, so that it renders them by its own"
                )
                raise ConfigError(
                    f"{part.name} reads texts, and the prompts are messages: {remedy}, or give the dataset's "
                    "prompts as texts"
                )
    source.check_prompts(prompts)


def _check_rows(source: RewardSource, rollouts: Sequence[Rollout]) -> None:
    """Refuse rows that all lack what the source needs; a single bad one is a sample without a reward."""
    problem = ""
    for rollout in rollouts:
        try:
            source.check_row(rollout.prompt.metadata)
            return
        except DataError as error:
            problem = str(error)
    if problem:
        columns = ", ".join(rollouts[0].prompt.metadata) or "none"
        raise ConfigError(f"{source.name}: each row {problem}; the dataset's other columns are: {columns}")


def _start_anew_after_fork() -> None:
    """Forget in a child what belongs to its parent: the threads of its clients were not forked."""
    _grpc.is_dead = _grpc.is_dead or _grpc.is_used
    for each in list(_rewards):
        if each._source is not None:
            _left_behind.append(each._source)  # alive: to destroy it would be to close the parent's channels
        each._forget()


def _close_in(process: int, source: RewardSource) -> None:
    if os.getpid() == process:
        source.close()


def version_of(package: str) -> tuple[int, ...] | None:
    """Return an installed package's release, (1, 16, 0); None where it is not installed."""
    try:
        text = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    numbers = [part for part in text.split(".")[:3] if part.isdigit()]
    return tuple(map(int, numbers)) or None


os.register_at_fork(after_in_child=_start_anew_after_fork)

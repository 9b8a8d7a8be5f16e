"""What every source of rewards can do, and how what a user passes becomes one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from conch.config import RewardConfig
from conch.errors import ConfigError
from conch.rewards.callable_reward import CallableReward
from conch.rewards.dense import Decode
from conch.rewards.http_url import SCHEMES
from conch.types import RewardResult, Rollout

_THREE_WAYS = (
    "no reward given: pass a Python function `reward(samples, prompts, outputs, **metadata)`, "
    "set `reward.url=host:port/model`, or set the environment variable TRITON_HOST=host:port/model"
)


@runtime_checkable
class RewardSource(Protocol):
    """Something that scores rollouts in the background.

    name: how messages call it, for example "walks at 127.0.0.1:8001".
    """

    name: str

    def check(self) -> None:
        """Find out before long work starts whether scoring can work at all.

        Raises:
            RewardError, ConfigError: one sentence: what is wrong, where, and what to do.
        """
        ...

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        """Start scoring and return at once: one result per rollout, in order.

        A failed reward is a status in its result, never an exception of the future.
        """
        ...

    def close(self) -> None:
        """Cancel what is under way and release threads and connections. A second call does nothing."""
        ...

    def __enter__(self) -> RewardSource: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class CountsTraffic(Protocol):
    """A source that counts what it sent since it was made.

    requests: calls of the function, or requests sent, retries among them.
    retries: requests that repeated an earlier one.
    """

    @property
    def requests(self) -> int: ...

    @property
    def retries(self) -> int: ...


@runtime_checkable
class WantsChunks(Protocol):
    """A source that may ask for the whole of a chunk at once instead of completions as they end.

    wants_chunks: True where what is scored together matters, in cost or in the scores.
    """

    wants_chunks: bool


UserReward = Callable[..., Any] | str | RewardSource
"""What a user may pass as a reward."""


def from_user(
    reward: UserReward | Mapping[str, UserReward] | None,
    config: RewardConfig,
    *,
    metadata_keys: Iterable[str] = (),
    decode: Decode | None = None,
) -> RewardSource:
    """Make a source of what a user gave; None stands for `config.members` or `config.url`, then for
    TRITON_HOST.

    reward: a Python function, `"host:port/model"`, `"http://host:port/path"`, or a source, which is returned
        as it is; or several of these by name, which `config.combine` makes one of.
    metadata_keys: the extra keys of the prompts in use; `check` sees whether a function takes them.
    decode: the policy's ids -> text, which `config.dense` needs.

    Raises:
        ConfigError: nothing was given, or it is not something that gives rewards.
    """
    if reward is None:
        reward = config.members or config.url or os.environ.get("TRITON_HOST")
    if not reward:
        raise ConfigError(_THREE_WAYS)
    if isinstance(reward, Mapping):
        if config.dense:
            raise ConfigError("reward.dense takes the scores of one served model, here are several rewards")
        members = {name: _from_one(each, config, metadata_keys, decode) for name, each in reward.items()}
        return _combined(members, config)
    return _from_one(reward, config, metadata_keys, decode)


def _from_one(
    reward: object, config: RewardConfig, metadata_keys: Iterable[str], decode: Decode | None
) -> RewardSource:
    if isinstance(reward, str) and reward.startswith(SCHEMES):
        from conch.rewards.http_reward import HttpReward

        return HttpReward(reward, config)
    if isinstance(reward, str):
        # Only a run with a served model needs tritonclient installed and loaded.
        from conch.rewards.triton_reward import TritonReward

        return TritonReward(reward, config, decode=decode)
    if isinstance(reward, RewardSource):
        return reward
    if callable(reward):
        return CallableReward(reward, metadata_keys=metadata_keys)
    raise ConfigError(
        "a reward must be a function, `host:port/model`, `http://host:port/path` or a RewardSource, not "
        f"{type(reward).__name__}"
    )


def _combined(members: Mapping[str, RewardSource], config: RewardConfig) -> RewardSource:
    from conch.rewards.ensemble_reward import EnsembleReward, JointReward  # they stand on sources

    if config.combine == "sum":
        return JointReward(members)
    return EnsembleReward(
        members,
        config.combine,
        uwo_weight=config.uwo_weight,
        on_member_failure=config.on_member_failure,
    )

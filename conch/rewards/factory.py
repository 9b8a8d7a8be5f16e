"""What every source of rewards can do, and how what a user passes becomes one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from conch.addresses import SCHEMES
from conch.config import RewardConfig
from conch.errors import ConfigError
from conch.rewards.base import RewardSource, UserReward
from conch.rewards.function import FunctionReward
from conch.rewards.replay import ReplayReward
from conch.rewards.token_rewards import Decode

_THREE_WAYS = (
    "no reward given: pass a Python function `reward(samples, prompts, outputs, **metadata)`, "
    "set `reward.url=host:port/model`, or set the environment variable TRITON_HOST=host:port/model"
)


def from_user(
    reward: UserReward | Mapping[str, UserReward] | None,
    config: RewardConfig,
    *,
    metadata_keys: Iterable[str] = (),
    rank: int = 0,
    decode: Decode | None = None,
) -> RewardSource:
    """Make a source of what a user gave; None stands for `config.members` or `config.url`, then for
    TRITON_HOST. `config.replay` stands before all of them.

    reward: a Python function, `"host:port/model"`, `"http://host:port/path"`, or a source, which is returned
        as it is; or several of these by name, which `config.combine` makes one of.
    metadata_keys: the extra keys of the prompts in use; `check` sees whether a function takes them.
    rank: this process's number, whose recorded rewards are replayed.
    decode: the policy's ids -> text, which `config.dense` needs.

    Raises:
        ConfigError: nothing was given, or it is not something that gives rewards.
    """
    if config.replay is not None:
        return ReplayReward(config.replay, rank)
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
        from conch.rewards.served import HttpReward

        if config.dense:
            raise ConfigError(f"reward.dense takes the scores of a model served by Triton, not of {reward}")
        return HttpReward(reward, config)
    if isinstance(reward, str):
        # Only a run with a served model needs tritonclient installed and loaded.
        from conch.rewards.served import TritonReward

        return TritonReward(reward, config, decode=decode)
    if isinstance(reward, RewardSource):
        return reward
    if callable(reward):
        return FunctionReward(reward, metadata_keys=metadata_keys)
    raise ConfigError(
        "a reward must be a function, `host:port/model`, `http://host:port/path` or a RewardSource, not "
        f"{type(reward).__name__}"
    )


def _combined(members: Mapping[str, RewardSource], config: RewardConfig) -> RewardSource:
    from conch.rewards.combined import EnsembleReward, SumReward  # they stand on sources

    if config.combine == "sum":
        return SumReward(members)
    return EnsembleReward(
        members,
        config.combine,
        uwo_weight=config.uwo_weight,
        on_member_failure=config.on_member_failure,
    )

"""From what a user passes as a reward to a source."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from conch.addresses import SCHEMES
from conch.config import RewardConfig
from conch.errors import ConfigError
from conch.rewards.base import RewardSource, UserReward
from conch.rewards.combined import EnsembleReward, SumReward
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
    """Make the source that `config.replay`, else `reward`, else `config` or TRITON_HOST names.

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
    if not isinstance(reward, Mapping):
        return _single_source(reward, config, metadata_keys, decode)
    if config.dense:
        raise ConfigError("reward.dense takes the scores of one served model, here are several rewards")
    members = {name: _single_source(each, config, metadata_keys, decode) for name, each in reward.items()}
    if config.combine == "sum":
        return SumReward(members)
    return EnsembleReward(
        members,
        config.combine,
        uwo_weight=config.uwo_weight,
        on_member_failure=config.on_member_failure,
    )


def _single_source(
    reward: object, config: RewardConfig, metadata_keys: Iterable[str], decode: Decode | None
) -> RewardSource:
    if isinstance(reward, str):
        # Only a run with a served model needs its client's libraries installed and loaded.
        from conch.rewards.served import HttpReward, TritonReward

        if not reward.startswith(SCHEMES):
            return TritonReward(reward, config, decode=decode)
        if config.dense:
            raise ConfigError(f"reward.dense takes the scores of a model served by Triton, not of {reward}")
        return HttpReward(reward, config)
    if isinstance(reward, RewardSource):
        return reward
    kind = type(reward).__name__
    if hasattr(reward, "submit"):
        raise ConfigError(
            f"{kind} has the methods of a reward source, but is none: derive it from "
            "`conch.rewards.RewardSource`, which needs `check` and `submit` and has the other methods"
        )
    if callable(reward):
        return FunctionReward(reward, metadata_keys=metadata_keys)
    raise ConfigError(
        "a reward must be a function, `host:port/model`, `http://host:port/path` or a RewardSource, not "
        f"{kind}"
    )

"""From what a user passes as a reward to a source."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from conch.addresses import SCHEMES
from conch.config import RewardConfig
from conch.errors import ConfigError, missing_path
from conch.rewards.base import RewardSource, UserReward
from conch.rewards.combined import EnsembleReward, SumReward
from conch.rewards.function import FunctionReward
from conch.rewards.replay import ReplayReward
from conch.rewards.token_rewards import Decode
from conch.rewards.verifiers.base import Verifier
from conch.rewards.verifiers.named import PREFIX, named_verifier
from conch.rewards.verifiers.source import VerifierReward

_THREE_WAYS = (
    "no reward given: pass a Python function `reward(samples, prompts, outputs, **metadata)` (on a command "
    "line `reward.function=file.py:name`), set `reward.url=host:port/model` or `reward.verifier=gsm8k`, or "
    "set the environment variable TRITON_HOST=host:port/model"
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

    Of the configuration, `function`, `verifier`, `members` or `url`.

    reward: a Python function, `"host:port/model"`, `"http://host:port/path"`, `"verifier:gsm8k"`, a verifier,
        or a source, which is returned as it is; or several of these by name, which `config.combine` makes one
        of.
    metadata_keys: the extra keys of the prompts in use; `check` sees whether a function takes them.
    rank: this process's number, whose recorded rewards are replayed.
    decode: the policy's ids -> text, which `config.dense` needs.

    Raises:
        ConfigError: nothing was given, or it is not something that gives rewards.
    """
    if config.replay is not None:
        return ReplayReward(config.replay, rank)
    if reward is None and config.function is not None:
        reward = named_function(config.function)
    if reward is None and config.verifier is not None:
        reward = PREFIX + config.verifier
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
        variance=config.variance,
        on_member_failure=config.on_member_failure,
    )


def named_function(name: str) -> Callable[..., Any]:
    """Load a function from `file.py:name` or `module:name`; modules of the current folder are found.

    Raises:
        ConfigError: no such file, module or function.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ConfigError(f"`reward.function` = {name}: write file.py:name or module:name")
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module(place)
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(attribute, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(names)) or 'none'}"
        raise ConfigError(f"`reward.function` = {name}: {place} has no function {attribute}; {hint}")
    return function


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(
            f"`reward.function`: {path} cannot be read: there is no such file{missing_path(path)}"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As for a script: what lies beside it can be imported, and what it defines can be pickled.
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _module(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        raise ConfigError(
            f"`reward.function`: there is no module {error.name}; give a file as file.py:name"
        ) from None


def _single_source(
    reward: object, config: RewardConfig, metadata_keys: Iterable[str], decode: Decode | None
) -> RewardSource:
    if isinstance(reward, str) and reward.startswith(PREFIX):
        reward = named_verifier(reward.removeprefix(PREFIX), config.gsm8k, config.ifeval)
    if isinstance(reward, Verifier):
        if config.dense:
            raise ConfigError(
                f"reward.dense takes the scores of a model served by Triton, not of {reward.name}"
            )
        return VerifierReward(reward)
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
    if isinstance(reward, type) and issubclass(reward, Verifier | RewardSource):
        raise ConfigError(f"the reward is the class {reward.__name__}: give one of it, {reward.__name__}()")
    if hasattr(reward, "submit"):
        raise ConfigError(
            f"{kind} has the methods of a reward source, but is none: derive it from "
            "`conch.rewards.RewardSource`, which needs `check` and `submit` and has the other methods"
        )
    if callable(reward):
        return FunctionReward(reward, metadata_keys=metadata_keys)
    raise ConfigError(
        "a reward must be a function, `host:port/model`, `http://host:port/path`, a Verifier or a "
        f"RewardSource, not {kind}"
    )

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
from typing import Any, get_args
from urllib.parse import urlsplit

from conch.addresses import SCHEMES, Endpoint, is_loopback, parse_urls
from conch.config import JudgeConfig, RewardConfig, VerifierName
from conch.config.reward import GOALS as GOALS
from conch.config.reward import JUDGE, VERIFIER
from conch.config.reward import is_function_name as is_function_name
from conch.errors import ConfigError, missing_path
from conch.rewards.base import RewardSource, UserReward, note_opened
from conch.rewards.combined import EnsembleReward, SumReward
from conch.rewards.function import FunctionReward
from conch.rewards.replay import ReplayReward
from conch.rewards.steering import SteeringReward
from conch.rewards.token_rewards import Decode
from conch.rewards.verifiers.base import Verifier
from conch.rewards.verifiers.named import named_verifier
from conch.rewards.verifiers.source import VerifierReward

_THREE_WAYS = (
    "no reward given: pass a Python function `reward(samples, prompts, outputs, **metadata)` (on a command "
    "line `reward.function=file.py:name`), set `reward.url=host:port/model`, `reward.verifier=gsm8k` or "
    "`reward.judge.file=FILE.yaml`, or set the environment variable TRITON_HOST=host:port/model"
)
_SHORT_FORMS = (
    "`file.py:function` or `module:function` is a Python function, `host:port/model` a model served by "
    "Triton, `http://host:port/path` an endpoint, `verifier:gsm8k` a check, `judge:FILE.yaml` a language "
    "model that is asked, `goals:text_length` a measure of texts"
)


def from_user(
    reward: UserReward | Mapping[str, UserReward] | None,
    config: RewardConfig,
    *,
    metadata_keys: Iterable[str] | None = None,
    rank: int = 0,
    decode: Decode | None = None,
) -> RewardSource:
    """Make the source that `config.replay`, else `reward`, else `config` or TRITON_HOST names.

    Of the configuration, `function`, `verifier`, `judge`, `members` or `url`.

    reward: a Python function, `"host:port/model"`, `"http://host:port/path"`, `"verifier:gsm8k"`,
        `"goals:text_length"`, `"judge:FILE.yaml"`, a judge's section, a verifier, or a source, which is
        returned as it is; or several of these by name, which `config.combine` makes one of.
    metadata_keys: the extra keys of the prompts in use; `check` sees whether a function takes them, and
        whether a judge finds those that its template names. None where they are not known yet.
    rank: this process's number, whose recorded rewards are replayed.
    decode: the policy's ids -> text, which `config.dense` needs.

    Raises:
        ConfigError: nothing was given, or it is not something that gives rewards.
    """
    if config.replay is not None:
        return ReplayReward(config.replay, rank)
    source = _source(_named(reward, config), config, metadata_keys, decode)
    return SteeringReward(source, config.steering) if config.steering.is_on else source


def _source(
    reward: UserReward | Mapping[str, UserReward] | None,
    config: RewardConfig,
    metadata_keys: Iterable[str] | None,
    decode: Decode | None,
) -> RewardSource:
    """What gives the scores; of several, what makes one of them."""
    if isinstance(reward, str) and reward == config.function:
        reward = named_function(reward)
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


def _named(
    reward: UserReward | Mapping[str, UserReward] | None, config: RewardConfig
) -> UserReward | Mapping[str, UserReward] | None:
    """What is given, else what the configuration or TRITON_HOST names; a function by its name."""
    if reward is not None:
        return reward
    if config.function is not None:
        return config.function
    if config.verifier is not None:
        return VERIFIER + config.verifier
    if config.judge.is_set:
        return config.judge
    return config.members or config.url or os.environ.get("TRITON_HOST")


def check_reward_named(config: RewardConfig, *, required: bool) -> None:
    """See, without opening or running anything, that what the configuration names may be a reward.

    required: it must name one, or TRITON_HOST must.

    Raises:
        ConfigError: nothing is named, or what is has no form of a reward, or its file is not there.
    """
    if config.replay is not None or not (required or config.named_by):
        return
    named = _named(None, config)
    if not named:
        raise ConfigError(_THREE_WAYS)
    for each in named.values() if isinstance(named, Mapping) else [named]:
        if isinstance(each, JudgeConfig):
            _check_judge(each)
        elif each == config.function:
            _place_of_function(str(each), "reward.function")
        else:
            _check_name(str(each))


def check_gold_named(gold: str) -> None:
    """The same for `evaluation.gold`, which may be any name of a reward.

    Raises:
        ConfigError: see `check_reward_named`.
    """
    if is_function_name(gold):
        _place_of_function(gold, "evaluation.gold")
        return
    try:
        _check_name(gold)
    except ConfigError as error:
        raise ConfigError(f"gold: {error}") from None


def _check_name(name: str) -> None:
    if name.startswith(JUDGE):
        _check_judge(JudgeConfig(file=Path(name.removeprefix(JUDGE))))
    elif name.startswith(SCHEMES):
        parse_urls(name)
    elif not name.startswith((VERIFIER, GOALS)):
        _parse_served(name)


def _check_judge(judge: JudgeConfig) -> None:
    from conch.rewards.judge.source import read_judge

    read_judge(judge)


def _parse_served(name: str) -> None:
    """Read `host:port/model`; a word that is no address gets all the short forms."""
    if any(sign in name for sign in ":/"):
        Endpoint.parse_all(name)
        return
    module, dot, attribute = name.rpartition(".")
    if name.endswith(".py"):
        hint = f"for a function of this file write `{name}:NAME`"
    elif name.endswith((".yaml", ".yml")):
        hint = f"did you mean `{JUDGE}{name}`?"
    elif name in get_args(VerifierName):
        hint = f"did you mean `{VERIFIER}{name}`?"
    elif dot:
        hint = f"for a function of a module write `{module}:{attribute}`"
    else:
        hint = _SHORT_FORMS
    raise ConfigError(f"reward `{name}` names nothing that gives rewards: {hint}")


def shared_reward(
    gold: UserReward,
    gold_config: RewardConfig,
    reward: UserReward | Mapping[str, UserReward] | None,
    config: RewardConfig,
) -> str | None:
    """Whether `gold` is what `from_user` makes the reward of, or a member of it: the same model on a server
    that both name, the same verifier with the same settings, the same function or object.

    Returns the member's name, "" for the reward as a whole, None where `gold` is something else.
    """
    if config.replay is not None:
        return None
    named = _named(reward, config)
    members = named if isinstance(named, Mapping) else {"": named}
    own = _identities(gold, gold_config)
    return next((name for name, each in members.items() if own & _identities(each, config)), None)


def _identities(reward: object, config: RewardConfig) -> set[object]:
    """What a single reward is, in forms that can be compared: one for each server of a model."""
    if isinstance(reward, str):
        return _identities_of_name(reward.strip(), config)
    if isinstance(reward, JudgeConfig):
        return _identities_of_judge(reward)
    code = getattr(reward, "__code__", None)
    if code is None:
        bound = getattr(reward, "__self__", None), getattr(reward, "__func__", None)
        return {id(reward)} if None in bound else {(id(bound[0]), id(bound[1]))}
    # The same function, however its file was loaded; what is made within another one may differ by a closure.
    name = getattr(reward, "__qualname__", "")
    own = {("function", Path(code.co_filename).resolve(), name)} if name.isidentifier() else set()
    return {id(reward), *own}


def _identities_of_name(name: str, config: RewardConfig) -> set[object]:
    if name.startswith(GOALS):
        return {name}
    if name.startswith(VERIFIER):
        kind = name.removeprefix(VERIFIER)
        return {(name, getattr(config, kind, None) and getattr(config, kind).model_dump_json())}
    if name.startswith(JUDGE):
        return _identities_of_judge(JudgeConfig(file=Path(name.removeprefix(JUDGE))))
    if name == config.function or is_function_name(name):
        place, _, attribute = name.rpartition(":")
        return {("function", Path(place).resolve(), attribute)}
    try:
        if name.startswith(SCHEMES):
            return {
                (_host(url.hostname or ""), url.port, url.path) for url in map(urlsplit, parse_urls(name))
            }
        return {(_host(each.host), each.port, each.model) for each in Endpoint.parse_all(name)}
    except ConfigError:  # whoever opens it tells what is wrong with it
        return set()


def _identities_of_judge(judge: JudgeConfig) -> set[object]:
    """The same questions to the same model; it may sit elsewhere."""
    from conch.rewards.judge.source import read_judge

    try:
        read = read_judge(judge)
    except ConfigError:  # whoever opens it tells what is wrong with it
        return set()
    template = (read.parser, read.system, read.template, tuple(item.question for item in read.rubric))
    return {("judge", read.model, template)}


def _host(host: str) -> str:
    return "127.0.0.1" if is_loopback(host) else host.lower()


def named_function(name: str, setting: str = "reward.function") -> Callable[..., Any]:
    """Load a function from `file.py:name` or `module:name`; modules of the current folder are found.

    setting: full name of the key that `name` comes from, for messages.

    Raises:
        ConfigError: no such file, module or function.
    """
    place, attribute = _place_of_function(name, setting)
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module(place, setting)
    function = getattr(module, attribute, None)
    if function is not None and not callable(function):
        kind = type(function).__name__
        raise ConfigError(f"`{setting}` = {name}: {attribute} of {place} is of type {kind} and no function")
    if function is None:
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(attribute, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(names)) or 'none'}"
        raise ConfigError(f"`{setting}` = {name}: {place} has no function {attribute}; {hint}")
    return function


def _place_of_function(name: str, setting: str) -> tuple[str, str]:
    """The file or module of `file.py:name` or `module:name`, and the name in it.

    Raises:
        ConfigError: it is neither, or there is no such file.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ConfigError(f"`{setting}` = {name}: write file.py:name or module:name")
    path = Path(place)
    if place.endswith(".py") and not path.is_file():
        raise ConfigError(f"`{setting}`: {path} cannot be read: there is no such file{missing_path(path)}")
    return place, attribute


_FILES_RUN: dict[tuple[Path, int, int], ModuleType] = {}
"""Path, time of change in nanoseconds and size in bytes of files that were run -> what they define."""


def _module_of_file(path: Path) -> ModuleType:
    # A command looks before it loads a model, and loads the function again for the run: the file runs once.
    stat = path.stat()
    key = (path.resolve(), stat.st_mtime_ns, stat.st_size)
    if key in _FILES_RUN:
        return _FILES_RUN[key]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As for a script: what lies beside it can be imported, and what it defines can be pickled.
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    _FILES_RUN[key] = module
    return module


def _module(name: str, setting: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        raise ConfigError(
            f"`{setting}`: there is no module {error.name} in {Path.cwd()} or installed; a file is given "
            "as file.py:name, a served model as host:port/model"
        ) from None


def _single_source(
    reward: object, config: RewardConfig, metadata_keys: Iterable[str] | None, decode: Decode | None
) -> RewardSource:
    if isinstance(reward, RewardSource):
        return reward
    return note_opened(_new_source(reward, config, metadata_keys, decode))


def _new_source(
    reward: object, config: RewardConfig, metadata_keys: Iterable[str] | None, decode: Decode | None
) -> RewardSource:
    if isinstance(reward, str):
        return _source_of_name(reward, config, metadata_keys, decode)
    if isinstance(reward, Verifier):
        return _verifier_reward(reward, config)
    if isinstance(reward, JudgeConfig):
        return _judge(reward, config, metadata_keys)
    kind = type(reward).__name__
    if isinstance(reward, type) and issubclass(reward, Verifier | RewardSource):
        raise ConfigError(f"the reward is the class {reward.__name__}: give one of it, {reward.__name__}()")
    if hasattr(reward, "submit"):
        raise ConfigError(
            f"{kind} has the methods of a reward source, but is none: derive it from "
            "`conch.rewards.RewardSource`, which needs `check` and `submit` and has the other methods"
        )
    if callable(reward):
        return FunctionReward(reward, metadata_keys=metadata_keys or ())
    raise ConfigError(
        "a reward must be a function, `host:port/model`, `http://host:port/path`, `judge:FILE.yaml`, a "
        f"Verifier or a RewardSource, not {kind}"
    )


def _source_of_name(
    name: str, config: RewardConfig, metadata_keys: Iterable[str] | None, decode: Decode | None
) -> RewardSource:
    """What a string stands for. Only a run that asks for it needs its libraries installed and loaded."""
    if name.startswith(VERIFIER):
        verifier = named_verifier(name.removeprefix(VERIFIER), config.gsm8k, config.ifeval)
        return _verifier_reward(verifier, config)
    if name.startswith(GOALS):
        return _goals_reward(name, config)
    if name.startswith(JUDGE):
        return _judge(JudgeConfig(file=Path(name.removeprefix(JUDGE))), config, metadata_keys)
    from conch.rewards.served import HttpReward, TritonReward

    if not name.startswith(SCHEMES):
        _parse_served(name)
        return TritonReward(name, config, decode=decode)
    _refuse_dense(config, name)
    return HttpReward(name, config)


def _refuse_dense(config: RewardConfig, name: str) -> None:
    if config.dense:
        raise ConfigError(f"reward.dense takes the scores of a model served by Triton, not of {name}")


def _verifier_reward(verifier: Verifier[Any], config: RewardConfig) -> RewardSource:
    _refuse_dense(config, verifier.name)
    return VerifierReward(verifier)


def _goals_reward(name: str, config: RewardConfig) -> RewardSource:
    _refuse_dense(config, name)
    from conch.rewards.goals.source import GoalsReward
    from conch.rewards.goals.space import GoalSpace

    own = config.goals
    space = GoalSpace(name.removeprefix(GOALS), own.normalization, config=config, setting=f"`{name}`")
    return GoalsReward(space, normalize=own.normalize, partial=config.steering.is_on)


def _judge(judge: JudgeConfig, config: RewardConfig, metadata_keys: Iterable[str] | None) -> RewardSource:
    _refuse_dense(config, "a judge")
    from conch.rewards.judge.source import JudgeReward, read_judge

    policy = config.failure.on_model_change
    return JudgeReward(read_judge(judge), metadata_keys=metadata_keys, on_model_change=policy)

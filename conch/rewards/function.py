"""A reward that is a Python function of the user."""

from __future__ import annotations

import inspect
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from conch.errors import ConfigError
from conch.rewards.base import ClientStats, RewardSource
from conch.rewards.client.event_loop import LoopThread
from conch.rewards.results import ReplyParser
from conch.types import RewardResult, RewardStatus, Rollout

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

_ARGUMENTS = ("samples", "prompts", "outputs")
_MORE_ARGUMENTS = ("messages", "output_ids")
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def groupwise(function: FunctionT) -> FunctionT:
    """Have a reward function called once per group, with all completions of one prompt that a step has
    sampled:

        @conch.rewards.groupwise
        def novelty(samples, prompts, outputs):
            return [1.0 / outputs.count(output) for output in outputs]
    """
    function.needs_groups = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


class FunctionReward(RewardSource):
    """Calls `function(samples, prompts, outputs, **metadata)`, sync or async, in one background thread.

    The function gets lists with one entry per sample: `samples[i] == prompts[i] + outputs[i]`, and for each
    extra key of the prompts a list with None where a prompt lacks it. If it names them or takes `**metadata`,
    it gets `messages` and `output_ids` as well, see `arguments_of`. It returns a list of numbers, a list of
    per-token lists (each as long as its completion's `token_ids`), or a dict of objective -> list of numbers.
    A sync function is called for one whole chunk at a time; an async one as completions end, and its calls
    overlap. Neither has a deadline. One that is `groupwise` is called for one group at a time.

    metadata_keys: the extra keys that `check` makes sure the function takes.
    """

    def __init__(self, function: Callable[..., Any], *, metadata_keys: Iterable[str] = ()) -> None:
        self.name = _name_of(function)
        self.batched = not _is_async(function)
        self.needs_groups = _wants_groups(function)
        self._who = f"reward function `{self.name}`"
        self._function = function
        self._metadata_keys = tuple(metadata_keys)
        self._calls = 0
        self._thread = LoopThread(f"reward-{self.name}")

    def check(self) -> None:
        """Look at the function's signature; it is not called.

        Raises:
            ConfigError: it does not take `samples`, `prompts`, `outputs` and the metadata keys by name.
        """
        problem = self._signature_problem(self._metadata_keys)
        if problem:
            raise ConfigError(problem)

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        return self._thread.submit(self._score(list(rollouts)))

    def takes(self, key: str) -> bool:
        """Whether the function can be given this extra key of a prompt."""
        return key not in (*_ARGUMENTS, *_MORE_ARGUMENTS) and _takes(self._function, key)

    def stats(self) -> ClientStats:
        return ClientStats(requests=self._calls)

    def close(self) -> None:
        """Cancel async calls and join the thread; a sync call that does not return is left behind."""
        self._thread.close()

    async def _score(self, rollouts: list[Rollout]) -> list[RewardResult]:
        if not rollouts:
            return []
        samples = tuple(rollout.sample for rollout in rollouts)  # the function may change its list
        problem = self._signature_problem(metadata_of(rollouts))
        if self.needs_groups and (misfit := group_problem(rollouts)):
            problem = f"{self._who} {misfit}"
        if problem:
            return ReplyParser(self._who, samples, self.name).failures(RewardStatus.INVALID, problem)
        arguments = arguments_of(self._function, rollouts)
        token_counts = [len(rollout.completion.token_ids) for rollout in rollouts]
        self._calls += 1
        started = time.monotonic()
        try:
            reply = self._function(**arguments)
            if inspect.isawaitable(reply):
                reply = await reply
        except (Exception, SystemExit) as error:
            # SystemExit too: it would end the thread and leave the caller waiting for ever.
            parser = ReplyParser(self._who, samples, self.name, latency_s=time.monotonic() - started)
            detail = f"{self._who} raised {type(error).__name__}: {error}{_user_line(error)}"
            return parser.failures(RewardStatus.INVALID, detail)
        parser = ReplyParser(self._who, samples, self.name, latency_s=time.monotonic() - started)
        if reply is None:
            lacks = (
                f"{self._who} returned None, as one without `return` does: return a list of a score for each"
            )
            return parser.failures(RewardStatus.INVALID, f"{lacks} of the {len(samples)} samples")
        return parser.parse(reply, token_counts)

    def _signature_problem(self, metadata_keys: Iterable[str]) -> str:
        """Why the function cannot be called with these keys; "" if it can."""
        clashes = [key for key in metadata_keys if key in (*_ARGUMENTS, *_MORE_ARGUMENTS)]
        if clashes:
            return (
                f"prompts have the extra key `{clashes[0]}`, which is an argument of every reward; rename it"
            )
        try:
            signature = inspect.signature(self._function)
        except ValueError:  # some functions written in C have no signature
            return ""
        try:
            named = [name for name in _MORE_ARGUMENTS if _takes(self._function, name)]
            signature.bind(**dict.fromkeys([*_ARGUMENTS, *named, *metadata_keys]))
        except TypeError as error:
            arguments = ", ".join([*_ARGUMENTS, *metadata_keys, "**metadata"])
            return f"{self._who} has the wrong signature ({error}): define it as `{self.name}({arguments})`"
        return ""


def group_problem(rollouts: Sequence[Rollout]) -> str:
    """Why rollouts are not the completions of one prompt, two or more; "" if they are."""
    prompts = {(each.prompt.text, each.prompt.token_ids) for each in rollouts}
    if len(prompts) == 1 and len(rollouts) > 1:
        return ""
    return (
        f"needs the completions of one prompt together, two or more, and was handed {len(rollouts)} of "
        f"{len(prompts)} prompts"
    )


def arguments_of(function: Callable[..., Any], rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
    """Return what a function of samples is called with, each a list with one entry per rollout.

    samples, prompts, outputs: texts.
    messages: prompt and output as a list of messages, None where the prompt was given as a text; only for a
        function that names it or takes `**metadata`.
    output_ids: the sampled ids, the end-of-sequence token included; likewise.
    and the prompts' extra keys.
    """
    more = {
        "messages": [_messages(rollout) for rollout in rollouts],
        "output_ids": [list(rollout.completion.token_ids) for rollout in rollouts],
    }
    return {
        "samples": [rollout.sample for rollout in rollouts],
        "prompts": [rollout.prompt.text for rollout in rollouts],
        "outputs": [rollout.completion.text for rollout in rollouts],
        **{name: values for name, values in more.items() if _takes(function, name)},
        **metadata_of(rollouts),
    }


def needed_columns(function: Callable[..., Any]) -> list[str]:
    """Return the extra keys of prompts that a function of samples cannot be called without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions written in C have no signature
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        each.name
        for each in parameters
        if each.kind in named
        and each.default is each.empty
        and each.name not in (*_ARGUMENTS, *_MORE_ARGUMENTS)
    ]


def _messages(rollout: Rollout) -> list[dict[str, Any]] | None:
    dialogue = rollout.dialogue
    return None if dialogue is None else [dict(message) for message in dialogue.messages]


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether the function can be called with this keyword."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some functions written in C have no signature
        return False
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return any(
        each.kind is inspect.Parameter.VAR_KEYWORD or (each.name == name and each.kind in by_name)
        for each in parameters
    )


def metadata_of(rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
    """Return the prompts' extra keys, each with a list with None where a prompt lacks it."""
    keys = dict.fromkeys(key for rollout in rollouts for key in rollout.prompt.metadata)
    return {key: [rollout.prompt.metadata.get(key) for rollout in rollouts] for key in keys}


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _wants_groups(function: Callable[..., Any]) -> bool:
    """Whether the function, what it is a part of, or its class's `__call__` is `groupwise`."""
    named = getattr(function, "func", function)
    return any(getattr(each, "needs_groups", False) for each in (named, type(named).__call__))


def _name_of(function: Callable[..., Any]) -> str:
    named = inspect.unwrap(getattr(function, "func", function))
    return getattr(named, "__name__", type(named).__name__)


def _user_line(error: BaseException) -> str:
    """` (file:line)` of the user's innermost frame: below ours, above any installed library."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    own = [frame for frame in frames if not frame.filename.startswith(_INSTALLED)] or frames[:1]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""

"""From the names of goals in settings to the goals.

    reading_difficulty                      one of the four, or an entry point of the group `conch.goals`
    file.py:function, module:function       a Python function, texts -> one number for each
    exclamations=count:!                    a rule: how often a regular expression matches
    questions=rate:\\?                       the same for each 100 words
    polite=host:8001/model                  a model that Triton serves; several servers have a | between

A name and = may stand before any of them.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast

from conch.config import RewardConfig
from conch.errors import ConfigError
from conch.rewards.factory import named_function
from conch.rewards.goals.base import Goal, Measure, MeasuredGoal
from conch.rewards.goals.diversity import textual_diversity
from conch.rewards.goals.formality import formality, formality_1999
from conch.rewards.goals.readability import reading_difficulty
from conch.rewards.goals.words import text_length

ENTRY_POINTS = "conch.goals"
"""Group of entry points: name -> function of texts, or a `Goal`."""

DEFAULT_GOALS = ("reading_difficulty", "formality", "textual_diversity", "text_length")

_OF_ONE_TEXT: Mapping[str, Callable[[str], float]] = {
    "reading_difficulty": reading_difficulty,
    "formality": formality,
    "formality_1999": formality_1999,
    "textual_diversity": textual_diversity,
    "text_length": text_length,
}
_VERSION = "1"
"""Of the measures here: another one where they give other values."""

_NAME = re.compile(r"[A-Za-z_][\w-]*")
_SERVED = re.compile(r"[^/\s]+:\d+/\S+")


def split_goals(text: str) -> list[str]:
    """Split what an environment variable or a reward names: goals with a comma between.

    Raises:
        ConfigError: it names none.
    """
    names = [each.strip() for each in text.split(",")]
    if not all(names):
        raise ConfigError(
            f"goals `{text}`: write names with a comma between, for example {','.join(DEFAULT_GOALS)}"
        )
    return names


def named_goal(text: str, config: RewardConfig, setting: str) -> Goal:
    """Make the goal that `text` names, see above.

    config: how the client of a served model asks it.
    setting: where `text` comes from, for messages.

    Raises:
        ConfigError: there is no such goal, or a package that it needs is not installed.
    """
    name, sign, what = text.partition("=")
    if not sign or not _NAME.fullmatch(name):
        name, what = "", text
    for rule in ("count:", "rate:"):
        if what.startswith(rule):
            return _rule_goal(name, rule, what.removeprefix(rule), setting)
    if _SERVED.fullmatch(what):
        return _served_goal(name, what, config)
    if ":" in what:
        function = named_function(what, setting)
        return MeasuredGoal(name or what.rpartition(":")[2], function, _version_of(function))
    return _built_in_or_installed(name or what, what, setting)


def _built_in_or_installed(name: str, what: str, setting: str) -> Goal:
    if what in _OF_ONE_TEXT:
        _OF_ONE_TEXT[what]("One short sentence.")  # says what is not installed
        return MeasuredGoal(name, _of_texts(_OF_ONE_TEXT[what]), _VERSION)
    installed = {each.name: each for each in entry_points(group=ENTRY_POINTS)}
    if what not in installed:
        known = [*_OF_ONE_TEXT, *installed]
        near = difflib.get_close_matches(what, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ConfigError(
            f"{setting}: there is no goal `{what}`; {hint} A function of yours is file.py:function, a "
            "served model name=host:8001/model"
        )
    try:
        loaded: Any = installed[what].load()
    except Exception as error:
        raise ConfigError(
            f"{setting}: goal `{what}` of the installed package cannot be loaded: {type(error).__name__}: "
            f"{error}"
        ) from error
    if isinstance(loaded, Goal):
        return loaded
    if not callable(loaded):
        raise ConfigError(f"{setting}: the entry point `{what}` is neither a function of texts nor a goal")
    package = installed[what].dist
    return MeasuredGoal(name, cast(Measure, loaded), package.version if package else None)


def _of_texts(measure: Callable[[str], float]) -> Measure:
    return lambda texts: [measure(text) for text in texts]


def _rule_goal(name: str, rule: str, pattern: str, setting: str) -> Goal:
    if not name:
        raise ConfigError(f"{setting}: the rule `{rule}{pattern}` needs a name: my_goal={rule}{pattern}")
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{setting}: `{pattern}` of goal `{name}` is no regular expression: {error}"
        ) from None

    def measure(texts: Sequence[str]) -> list[float | None]:
        counts = [sum(1 for _ in expression.finditer(text)) for text in texts]
        if rule == "count:":
            return [float(count) for count in counts]
        lengths = [len(text.split()) for text in texts]
        return [100 * count / words if words else None for count, words in zip(counts, lengths, strict=True)]

    return MeasuredGoal(name, measure, f"{rule}{pattern}")


def _served_goal(name: str, address: str, config: RewardConfig) -> Goal:
    # Only goals that are models need its client's libraries.
    from conch.rewards.goals.served import ServedGoal

    return ServedGoal(name or address.rpartition("/")[2], address.replace("|", ","), config)


def _version_of(function: Callable[..., Any]) -> str | None:
    """Of a user's function: its file's content, as far as that can be read."""
    try:
        source = inspect.getsourcefile(function)
        content = Path(source).read_bytes() if source else b""
    except (TypeError, OSError):
        return None
    return hashlib.sha256(content).hexdigest()[:16]

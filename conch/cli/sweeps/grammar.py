"""Hydra's grammar of sweeps: from `key=a,b`, `range()`, `choice()`, `glob()` and `interval()` to jobs.

Words are parsed by Hydra's own parser. A product is in the order in which the words stand, the last key
changing fastest, as Hydra's basic sweeper has it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conch.cli.sweeps.settings import SweepConfig
from conch.config import Section, load
from conch.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

_HYDRA_NAMES = {
    "hydra.sweep.dir": "sweep.dir",
    "hydra.sweeper.n_trials": "sweep.trials",
    "hydra.sweeper.n_jobs": "sweep.jobs",
    "hydra.launcher.n_jobs": "sweep.jobs",
    "hydra.sweeper.direction": "sweep.direction",
    "hydra.sweeper.sampler.seed": "sweep.seed",
}
"""Keys of Hydra and of its plugins that have a counterpart here."""

_TEXTS = ("sweep.dir", "sweep.launcher", "sweep.metric")
"""Settings that are text: taken as it stands where Hydra's grammar cannot read it, `eval/reward@top_k=1`."""

_SET_BY_THE_SWEEP = ("train.run_dir", "train.resume")


@dataclass(frozen=True)
class Interval:
    """Numbers between two bounds, both included.

    low, high: bounds.
    is_log: search the logarithm of the number.
    is_int: whole numbers only.
    """

    low: int | float
    high: int | float
    is_log: bool
    is_int: bool

    def __str__(self) -> str:
        """The interval as it stands on a command line."""
        text = f"interval({self.low},{self.high})"
        text = f"int({text})" if self.is_int else text
        return f"tag(log,{text})" if self.is_log else text


@dataclass(frozen=True)
class Axis:
    """One word of the command line, with every value that it may take.

    key: as written, with `+`, `~` and `@package`.
    words: one override for each value, `key=value`; a single one for a key that is not swept, none for an
        interval.
    interval: of a key that takes numbers between two bounds.
    is_ordered: the values are an arithmetic sequence.
    """

    key: str
    words: tuple[str, ...]
    interval: Interval | None = None
    is_ordered: bool = False

    @property
    def name(self) -> str:
        """Key without what says how it is laid over the file."""
        return self.key.lstrip("+~").partition("@")[0]

    @property
    def is_swept(self) -> bool:
        """True where the word stands for more than one value, or for an interval."""
        return self.interval is not None or len(self.words) > 1

    def word(self, number: int | float) -> str:
        """Override that gives an interval's key this number."""
        return f"{self.key}={number!r}"


def split_settings(overrides: Sequence[str]) -> tuple[SweepConfig, list[str]]:
    """Take the sweep's own keys off a command line; returns them validated, and the other words.

    Raises:
        ConfigError: a setting that is not valid, a key that the sweep itself sets, or a setting of Hydra's
            sweeps that has no counterpart here.
    """
    settings: dict[str, Any] = {}
    rest: list[str] = []
    for text in overrides:
        name, _, raw = text.lstrip("+").partition("=")
        name = _HYDRA_NAMES.get(name, name)
        if name in _TEXTS:
            settings[name.removeprefix("sweep.")] = _text(text, raw)
            continue
        override = parse(text)
        key = _HYDRA_NAMES.get(override.key_or_group, override.key_or_group)
        if key.startswith("sweep."):
            if override.is_sweep_override():
                raise ConfigError(
                    f"`{text}`: a sweep's own settings take one value; write {key}=[...] for a list"
                )
            settings[key.removeprefix("sweep.")] = override.value()
        elif override.is_hydra_override():
            raise ConfigError(
                f"`{text}`: sweeps here are no plugins of Hydra; leave it out, and say how to sweep with "
                "sweep.jobs, sweep.trials, sweep.sampler, sweep.launcher (--help lists all)"
            )
        elif key in _SET_BY_THE_SWEEP:
            raise ConfigError(
                f"`{text}`: a sweep sets {key} of each job itself; its folder is sweep.dir, and it goes on "
                "by the same command with sweep.dir=FOLDER"
            )
        else:
            rest.append(text)
    return load(_Named, _resolved({"sweep": settings})).sweep, rest


def _text(text: str, raw: str) -> str | None:
    """Return the value of an override that is text, `raw` where Hydra reads something else in it."""
    try:
        value = parse(text).value()
    except ConfigError:
        return raw
    return value if isinstance(value, str) or value is None else raw


def _resolved(settings: dict[str, Any]) -> dict[str, Any]:
    """Resolve interpolations in a sweep's settings, such as Hydra's `${now:%Y-%m-%d}` in its folder."""
    from hydra.core.utils import setup_globals
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    setup_globals()
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(settings), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"cannot resolve a setting of the sweep: {error}") from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


class _Named(Section):
    """Lets messages name keys in full: `sweep.jobs`."""

    sweep: SweepConfig = SweepConfig()


def read_axes(words: Sequence[str], roots: Sequence[Path], seed: int) -> list[Axis]:
    """Return the axes of a sweep; of words with the same key, whatever signs stand before it, the last one
    counts, in the first one's place.

    roots: folders in which `glob()` looks for files of a group.
    seed: of `shuffle()`.

    Raises:
        ConfigError: a word that cannot be read, values that mix, or a glob without a match.
    """
    axes: dict[str, Axis] = {}
    for text in words:
        override = parse(text)
        key = override.get_key_element()
        axes[key.lstrip("+")] = _axis(text, key, override, roots, seed)
    return list(axes.values())


def product(axes: Sequence[Axis]) -> list[tuple[str, ...]]:
    """Return the overrides of every job.

    Raises:
        ConfigError: an interval has no end of values.
    """
    for axis in axes:
        if axis.interval is not None:
            raise ConfigError(
                f"`{axis.name}=interval(...)` has no end of values: set how many are tried, sweep.trials=N"
            )
    return list(itertools.product(*(axis.words for axis in axes)))


def parse(text: str) -> Override:
    """Parse one override.

    Raises:
        ConfigError: says how a shell and Hydra are told to read the text as a value.
    """
    from conch.cli.run_config import parse_override

    return parse_override(text)


def _axis(text: str, key: str, override: Override, roots: Sequence[Path], seed: int) -> Axis:
    from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, RangeSweep

    value: Any = override._value
    if not override.is_sweep_override():
        return Axis(key, (text,))
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        if low is None or high is None or not low < high:
            raise ConfigError(f"`{text}`: the first bound of an interval must be below the second")
        if "log" in value.tags and low <= 0:
            raise ConfigError(f"`{text}`: a logarithm needs bounds above 0")
        is_int = isinstance(low, int) and isinstance(high, int)
        return Axis(key, (), Interval(low, high, "log" in value.tags, is_int))
    if isinstance(value, Glob):
        names = _group_options(override.key_or_group, roots)
        if not names:
            raise ConfigError(f"`{text}`: glob is for groups of configuration files, and `{key}` is none")
        matching = value.filter(names)
        if not matching:
            raise ConfigError(f"`{text}` matches no file; there is: {', '.join(names)}")
        return Axis(key, tuple(f"{key}={name}" for name in matching))
    if isinstance(value, ChoiceSweep) and any(isinstance(element, IntervalSweep) for element in value.list):
        raise ConfigError(f"`{text}`: an interval cannot stand among other values")
    # Hydra shuffles by the process's random state, so that a sweep that goes on would get another order.
    is_shuffled = isinstance(value, ChoiceSweep | RangeSweep) and value.shuffle
    calm = replace(override, _value=replace(value, shuffle=False)) if is_shuffled else override
    try:
        values = list(calm.sweep_string_iterator())
    except Exception as error:  # of Hydra's and of OmegaConf's classes
        raise ConfigError(f"cannot read the values of `{text}`: {error}") from None
    if not values:
        raise ConfigError(f"`{text}` holds no value")
    if is_shuffled:
        random.Random(f"{seed} {key}").shuffle(values)
    return Axis(
        key,
        tuple(f"{key}={one}" for one in values),
        is_ordered=isinstance(value, RangeSweep) and not is_shuffled,
    )


def _group_options(group: str, roots: Sequence[Path]) -> list[str]:
    return sorted({file.stem for root in roots for file in (root / group).glob("*.yaml")})

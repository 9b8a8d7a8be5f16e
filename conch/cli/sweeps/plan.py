"""Jobs of a sweep, planned: each composed and validated before the first one starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conch.cli.sweeps import search
from conch.cli.sweeps.grammar import Axis, product, read_axes
from conch.cli.sweeps.record import Record, choose, digest_of, reset_unfinished
from conch.cli.sweeps.settings import SweepConfig
from conch.config import Section, load
from conch.errors import ConfigError

_DECIDE = (
    *("sampler", "seed", "metric", "metric_at", "direction"),
    *("prune", "n_startup_trials", "n_warmup_steps"),
)
"""Settings of a sweep that its results depend on, where it searches."""


@dataclass(frozen=True)
class Request:
    """What `--multirun` was asked for.

    section: class of the program's configuration.
    words: the whole command line of the program.
    overrides: those of `words` that are `key=value`.
    options: those of `words` that name the configuration file.
    config_name, config_dir: the file, given or not.
    print_only: show the jobs, and run none.
    check: raises a ConfigError for a configuration that `section` lets through and the program does not.
    """

    section: type[Section]
    words: Sequence[str]
    overrides: Sequence[str]
    options: Sequence[str]
    config_name: str
    config_dir: Path
    print_only: bool = False
    check: Callable[[Any], object] | None = None

    def compose(self, overrides: Sequence[str]) -> dict[str, Any]:
        """Compose and validate the configuration of a job; returns what was composed."""
        from conch.cli.run_config import compose

        values = compose(self.config_name, overrides, self.config_dir)
        config = load(self.section, values)
        if self.check is not None:
            self.check(config)
        return values

    def digest(self, values: Mapping[str, Any]) -> str:
        """Digest of a composed configuration with all its defaults."""
        return digest_of(load(self.section, values).model_dump(mode="json"))


def plan_axes(request: Request, settings: SweepConfig, words: Sequence[str]) -> list[Axis]:
    """Return the axes of the sweep."""
    from conch.cli.run_config import config_roots

    roots = config_roots(request.config_name, request.config_dir)
    return read_axes(words, roots, settings.seed)


def plan_jobs(record: Record, request: Request, settings: SweepConfig, axes: Sequence[Axis]) -> None:
    """Put the jobs of this command into the record, each composed and validated.

    Raises:
        ConfigError: the configuration of a job is not valid, or the folder holds another kind of sweep.
    """
    if settings.trials is not None:
        _plan_search(record, request, settings, axes)
        reset_unfinished(record)
        return
    if record.search is not None:
        raise ConfigError(f"{record.folder} holds a search, this command is none: choose another sweep.dir")
    wanted: list[tuple[tuple[str, ...], str]] = []
    for number, overrides in enumerate(product(axes)):
        wanted.append((overrides, checked_digest(record, request, f"job {number}", overrides)))
    choose(record, wanted)
    reset_unfinished(record)


def print_plan(request: Request, settings: SweepConfig, axes: Sequence[Axis]) -> None:
    """Validate and print the jobs of this command, one a line; of a search what it chooses from.

    Raises:
        ConfigError: see `plan_jobs`.
    """
    record = Record(Path("sweep"), request.section.__name__)
    if settings.trials is not None:
        _plan_search(record, request, settings, axes)
        space = " ".join(_space_of(axis) for axis in axes if axis.is_swept)
        print(f"{search.number_of_trials(axes, settings)} trials of {space}")
        return
    for number, overrides in enumerate(product(axes)):
        checked_digest(record, request, f"job {number}", overrides)
        print(f"{number}: {' '.join(overrides)}")


def _plan_search(record: Record, request: Request, settings: SweepConfig, axes: Sequence[Axis]) -> None:
    corners = [axis.words or tuple(axis.word(end) for end in _probes(axis)) for axis in axes]
    first = tuple(words[0] for words in corners)
    base = checked_digest(record, request, "the first trial", first)
    for place, words in enumerate(corners):
        for word in words[1:]:
            overrides = (*first[:place], word, *first[place + 1 :])
            checked_digest(record, request, f"a trial with {word}", overrides)
    space = {
        "keys": [_space_of(axis) for axis in axes if axis.is_swept],
        "configuration": base,
        **{name: getattr(settings, name) for name in _DECIDE},
    }
    if record.jobs and record.search != space:
        old = record.search or {}
        changed = [name for name in space if old.get(name) != space[name]]
        raise ConfigError(
            f"the search in {record.folder} is another one ({', '.join(changed)} changed): its results say "
            "nothing about this one; choose another sweep.dir"
        )
    record.search = space
    record.chosen = sorted(record.jobs)[: search.number_of_trials(axes, settings)]


def _probes(axis: Axis) -> tuple[int | float, ...]:
    """Both ends of an interval, and what a search may draw between: 1.0 is a whole number, 1.618 is none."""
    interval = axis.interval
    assert interval is not None
    if interval.is_int:
        return interval.low, interval.high
    return interval.low, interval.low + (interval.high - interval.low) * 0.618, interval.high


def _space_of(axis: Axis) -> str:
    if axis.interval is not None:
        return f"{axis.key}={axis.interval}"
    return f"{axis.key}={','.join(word.partition('=')[2] for word in axis.words)}"


def checked_digest(record: Record, request: Request, name: str, overrides: Sequence[str]) -> str:
    """Compose and validate a job; returns its digest.

    Raises:
        ConfigError: names the job and its values.
    """
    try:
        return request.digest(request.compose([*overrides, *own_words(record.folder / "N")]))
    except ConfigError as error:
        shown = " ".join(overrides)
        raise ConfigError(f"{name} of the sweep ({shown}): {error}") from None


def own_words(run_dir: Path) -> list[str]:
    """Words that the sweep adds to those of a job."""
    from hydra.core.override_parser.types import Quote, QuotedString

    quoted = QuotedString(str(run_dir), Quote.single).with_quotes()
    return [f"train.run_dir={quoted}", "train.resume=auto"]

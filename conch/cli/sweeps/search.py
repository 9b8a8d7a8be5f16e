"""Searches by Optuna: what the next trial tries, from the results of earlier ones.

A trial is drawn by a sampler of its own, seeded by the sweep's seed and the trial's number, from what is
known of the trials before it. So nothing of a search lives in memory alone: a sweep that was killed draws the
same trials again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from conch.cli.sweeps.grammar import Axis
from conch.cli.sweeps.results import Direction
from conch.cli.sweeps.settings import SweepConfig
from conch.errors import ConfigError, install_extra

_REDRAWS = 200


@dataclass(frozen=True)
class Trial:
    """What is known of an earlier trial.

    overrides: its words, one for each axis.
    value: its result; None for one that runs still, or failed.
    state: `running`, `done`, `pruned` or `failed`.
    """

    overrides: tuple[str, ...]
    value: float | None
    state: str
    curve: Mapping[int, float] = field(default_factory=dict)


def check_installed() -> None:
    """Refuse a search without Optuna.

    Raises:
        ConfigError: says how it is installed.
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"a search (sweep.trials) needs Optuna: {install_extra('search')}") from error


def number_of_trials(axes: Sequence[Axis], settings: SweepConfig) -> int:
    """Return `sweep.trials`, at most the number of combinations where there is no interval."""
    assert settings.trials is not None
    if any(axis.interval is not None for axis in axes):
        return settings.trials
    return min(settings.trials, prod(len(axis.words) for axis in axes))


def draw(
    axes: Sequence[Axis],
    settings: SweepConfig,
    direction: Direction,
    number: int,
    history: Sequence[Trial],
    others: Sequence[tuple[str, ...]],
) -> tuple[str, ...]:
    """Return the words of a new trial.

    number: of the trial, from 0.
    history: what the sampler may know: the same for the same number, whenever it is drawn.
    others: words of all trials so far; the same are not tried twice.
    """
    words: tuple[str, ...] = ()
    for attempt in range(_REDRAWS):
        seed = int.from_bytes(
            hashlib.sha256(f"{settings.seed}/{number}/{attempt}".encode()).digest()[:4], "big"
        )
        words = _draw_once(axes, settings, direction, history, seed, at_random=attempt > _REDRAWS // 2)
        if words not in others:
            return words
    taken = set(others)
    # All but exhausted: take what is left in the order of the product.
    from itertools import product

    return next((left for left in product(*(axis.words for axis in axes)) if left not in taken), words)


def _draw_once(
    axes: Sequence[Axis],
    settings: SweepConfig,
    direction: Direction,
    history: Sequence[Trial],
    seed: int,
    *,
    at_random: bool,
) -> tuple[str, ...]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    by_random = at_random or settings.sampler == "random"
    sampler = optuna.samplers.RandomSampler(seed) if by_random else optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(sampler=sampler, direction=direction)
    swept = [axis for axis in axes if axis.is_swept]
    distributions = {axis.key: _distribution(axis) for axis in swept}
    for trial in history:
        study.add_trial(_frozen(axes, trial, distributions))
    params = study.ask(distributions).params
    return tuple(_word(axis, params[axis.key]) if axis.is_swept else axis.words[0] for axis in axes)


def _distribution(axis: Axis) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    interval = axis.interval
    if interval is None:
        # Of a range the place in it: the numbers stay those of Hydra's range, rounding and all.
        return (
            IntDistribution(0, len(axis.words) - 1)
            if axis.is_ordered
            else CategoricalDistribution(axis.words)
        )
    if interval.is_int:
        return IntDistribution(int(interval.low), int(interval.high), log=interval.is_log)
    return FloatDistribution(interval.low, interval.high, log=interval.is_log)


def _word(axis: Axis, value: Any) -> str:
    if axis.interval is not None:
        return axis.word(value)
    return axis.words[value] if axis.is_ordered else value


def _param(axis: Axis, word: str) -> Any:
    """The value of Optuna's that `_word` made this word of."""
    if axis.interval is not None:
        text = word.partition("=")[2]
        return int(text) if axis.interval.is_int else float(text)
    return axis.words.index(word) if axis.is_ordered else word


def _frozen(axes: Sequence[Axis], trial: Trial, distributions: Mapping[str, Any]) -> Any:
    from optuna.trial import TrialState, create_trial

    states = {
        "done": TrialState.COMPLETE,
        "pruned": TrialState.PRUNED,
        "failed": TrialState.FAIL,
        "running": TrialState.RUNNING,
    }
    pairs = zip(axes, trial.overrides, strict=True)
    state = states[trial.state]
    if state is TrialState.COMPLETE and trial.value is None:
        state = TrialState.FAIL
    return create_trial(
        state=state,
        value=trial.value if state is TrialState.COMPLETE else None,
        params={axis.key: _param(axis, word) for axis, word in pairs if axis.is_swept},
        distributions=dict(distributions),
        intermediate_values=dict(trial.curve),
    )

"""How a run of the example is cut into steps, optimizer steps and parts, in numbers that come out whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from conch.errors import ConfigError
from examples.grpo.async_settings import AsyncExampleConfig, AsyncTrainSettings
from examples.grpo.settings import ExampleConfig

_MOST_IN_PART = 4
"""Completions of a micro-batch, where nobody says how an optimizer step is cut."""

_ASYNC_TURNS = 16
"""Completions of a batch of `grpo-async.py`, where nobody says how many."""


@dataclass(frozen=True)
class Batches:
    """How completions are cut, in numbers that come out whole.

    turns: completions of a step.
    prompts: of a step.
    steps: of the run.
    minibatches: optimizer steps of a pass over a step's completions.
    accumulation: parts of a process's share of an optimizer step.
    at_once: completions that a process samples at once.
    """

    turns: int
    prompts: int
    steps: int
    minibatches: int
    accumulation: int
    at_once: int


def plan_batches(config: ExampleConfig, num_processes: int) -> Batches:
    """Cut the run into steps, these into optimizer steps, these into parts.

    num_processes: that train.

    Raises:
        ConfigError: something does not come out whole; one sentence with the arithmetic.
    """
    env, train = config.env, config.train
    turns, batch = _batch(config, num_processes)
    optim = train.optim_batch_size or turns
    whole = _multiples(env.repeats, turns)
    _check(turns, whole, f"{batch} is not whole groups of `env.repeats` = {env.repeats}")
    prompts = turns // env.repeats
    _check(
        turns,
        _multiples(num_processes * env.repeats, turns),
        f"{batch} has {prompts} prompts ({turns} / {env.repeats}), which {num_processes} training processes "
        "do not share evenly",
    )
    parts = train.gradient_accumulation_steps
    fitting = [
        size
        for size in range(num_processes * (parts or 1), turns + 1)
        if _fits(size, turns, num_processes, parts)
    ]
    cut = f"{num_processes} training processes" if num_processes > 1 else ""
    if parts:
        cut += f"{' times ' if cut else ''}{parts} parts (`train.gradient_accumulation_steps`)"
    _check(
        optim,
        fitting,
        f"{batch} does not divide into optimizer steps of `train.optim_batch_size` = {optim}"
        if turns % optim or not cut
        else f"`train.optim_batch_size` = {optim} does not divide into {cut}",
    )
    share = optim // num_processes
    parts = parts or next(count for count in range(1, share + 1) if _is_small(share, count))
    at_once = math.ceil(min(env.num_envs * env.repeats, turns) / num_processes)
    steps = math.ceil(train.total_dialog_turns / turns)
    return Batches(turns, prompts, steps, turns // optim, parts, at_once)


def _batch(config: ExampleConfig, num_processes: int) -> tuple[int, str]:
    """Completions of a step, and where their number comes from."""
    env, given = config.env, config.train.dialog_turns_per_batch
    if given is not None:
        return given, f"`train.dialog_turns_per_batch` = {given}"
    if isinstance(config, AsyncExampleConfig):
        unit = num_processes * env.repeats
        turns = math.ceil(_ASYNC_TURNS / unit) * unit
        return turns, f"a batch of {turns}"
    turns = env.num_envs * env.repeats
    return turns, f"a batch of `env.num_envs` * `env.repeats` = {env.num_envs} * {env.repeats} = {turns}"


def _multiples(unit: int, size: int) -> range:
    """Multiples of `unit`, the next above `size` among them."""
    return range(unit, size + unit + 1, unit)


def _fits(optim: int, turns: int, num_processes: int, parts: int | None) -> bool:
    return turns % optim == 0 and optim % (num_processes * (parts or 1)) == 0


def _is_small(share: int, parts: int) -> bool:
    return share % parts == 0 and share // parts <= _MOST_IN_PART


def _check(size: int, fitting: Sequence[int], problem: str) -> None:
    """Refuse a size that is none of these, with the nearest that are.

    Raises:
        ConfigError: see above.
    """
    if size in fitting:
        return
    below, above = [one for one in fitting if one < size][-1:], [one for one in fitting if one > size][:1]
    nearest = " or ".join(map(str, [*below, *above]))
    raise ConfigError(f"{problem}: take {nearest or 'a larger batch'}")


@dataclass(frozen=True)
class Lead:
    """How far sampling runs ahead of training.

    max_staleness: steps that a token's weights lie behind those which learn from it, at most.
    sync_every: steps after which samplers get the weights.
    buffer: completions that are there at once, those in training among them.
    source: setting that gave `max_staleness`, with its arithmetic.
    """

    max_staleness: int
    sync_every: int
    buffer: int
    source: str


def plan_lead(train: AsyncTrainSettings, batches: Batches) -> Lead:
    """Bound staleness by what the buffer holds, or by what was asked for.

    Where nobody bounds it, it is the interval between two hand-overs of weights: the batch that is trained on
    while new weights travel was then begun before them, and nobody waits.

    Raises:
        ConfigError: `max_staleness`, `buffer_size` and `weight_update_frequency` contradict each other.
    """
    updates_per_step = batches.minibatches * train.epochs
    frequency = train.weight_update_frequency or updates_per_step
    sync_every = math.ceil(frequency / updates_per_step)
    bound, source, said = sync_every, "train.max_staleness: as `train.weight_update_frequency` needs", ""
    if train.max_staleness is not None:
        bound, source = train.max_staleness, "train.max_staleness"
        said = f"`train.max_staleness` = {bound}"
    if train.buffer_size is not None:
        held = math.ceil(train.buffer_size / batches.turns)
        said = (
            f"`train.buffer_size` = {train.buffer_size} is {held} batches of {batches.turns}, one in training"
        )
        if train.max_staleness not in (None, held - 1):
            raise ConfigError(
                f"{said}, so that completions are at most {held - 1} steps old, but `train.max_staleness` = "
                f"{bound}: give one of them"
            )
        bound = held - 1
        source = f"train.buffer_size: {train.buffer_size} / {batches.turns} batches, one in training"
    if sync_every > bound + 1:
        more = f"`train.max_staleness={sync_every}`"
        if train.buffer_size is not None:
            more = f"`train.buffer_size={(sync_every + 1) * batches.turns}`"
        raise ConfigError(
            f"with `train.weight_update_frequency` = {frequency}, samplers get weights every {sync_every} "
            f"batches ({updates_per_step} optimizer steps each), and completions are up to {sync_every - 1} "
            f"steps old, but {said}, which allows {bound}: take `train.weight_update_frequency="
            f"{(bound + 1) * updates_per_step}`, or {more}"
        )
    return Lead(bound, sync_every, (bound + 1) * batches.turns, source)

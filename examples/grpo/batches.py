"""How a run of the example is cut into steps, optimizer steps and parts, in numbers that come out whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from conch.errors import ConfigError
from examples.grpo.settings import ExampleConfig

_MOST_IN_PART = 4
"""Completions of a micro-batch, where nobody says how an optimizer step is cut."""


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
    turns, optim = train.dialog_turns_per_batch or env.num_envs * env.repeats, train.optim_batch_size
    batch = f"`train.dialog_turns_per_batch` = {turns}"
    if train.dialog_turns_per_batch is None:
        batch = f"a batch of `env.num_envs` * `env.repeats` = {env.num_envs} * {env.repeats} = {turns}"
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

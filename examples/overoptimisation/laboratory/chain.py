"""All parts of all seeds in a few worker processes, each part as soon as what it builds on is there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from conch.log import get_logger, setup_logging
from examples.overoptimisation.laboratory.parts import (
    places,
    rewards_of,
    score_best_of_n,
    train_members,
    train_policy,
    train_start,
    trainer_values,
)
from examples.overoptimisation.laboratory.results import Seconds, report
from examples.overoptimisation.laboratory.settings import LaboratoryConfig

_log = get_logger("conch.laboratory")


@dataclass(frozen=True)
class Part:
    """Something to do for a seed. do: with the config, the seed and `arguments`. then: what builds on it."""

    name: str
    seed: int
    do: Callable[..., None]
    arguments: tuple[str, ...] = ()
    then: tuple[Part, ...] = ()

    @property
    def number(self) -> int:
        """Of parts from here on."""
        return 1 + sum(part.number for part in self.then)


def chain_of(config: LaboratoryConfig, seed: int) -> Part:
    """All parts of a seed, from the first."""
    names = [name for names in rewards_of(config).values() for name in names]
    policies = [Part(f"ppo_{name}", seed, train_policy, (name,)) for name in names]
    last = (*policies, Part("best_of_n", seed, score_best_of_n))
    return Part("start", seed, train_start, then=(Part("members", seed, train_members, then=last),))


def run(config: LaboratoryConfig) -> dict[str, Any]:
    """All parts of all seeds, and the report; returns what `summary.json` holds.

    Raises:
        ConchError, OSError: of the part that failed first; those under way end, no other begins.
    """
    clock = _Clock(config.output)
    context = get_context("spawn")
    with ProcessPoolExecutor(config.workers, mp_context=context, initializer=_begin_worker) as pool:
        try:
            _perform_all(pool, config, clock)
        except BaseException:
            clock.keep()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    clock.keep()
    return report(
        {seed: places(config, seed).folder for seed in config.seed},
        rewards_of(config),
        trainer_values("ppo", config.output, 0)["reward"]["uwo_weight"],
        config.output,
        clock.seconds,
    )


class _Clock:
    """Counts this call's seconds, and writes them down beside those of the calls before."""

    def __init__(self, output: Path) -> None:
        self._output, self._started = output, time.perf_counter()
        self.seconds = Seconds.read(output)

    def done(self, part: Part, seconds: float) -> None:
        self.seconds.add(part.seed, part.name, seconds)
        self.keep()

    def keep(self) -> None:
        self._output.mkdir(parents=True, exist_ok=True)
        self.seconds.keep(self._output, round(time.perf_counter() - self._started, 1))


def _perform_all(pool: ProcessPoolExecutor, config: LaboratoryConfig, clock: _Clock) -> None:
    """Do every part as soon as the one that it builds on is done."""
    chains = [chain_of(config, seed) for seed in config.seed]
    total, done = sum(chain.number for chain in chains), 0
    under_way = {pool.submit(_perform, config, chain): chain for chain in chains}
    while under_way:
        for future in wait(under_way, return_when=FIRST_COMPLETED).done:
            part = under_way.pop(future)
            seconds, done = future.result(), done + 1
            clock.done(part, seconds)
            _log.info("[%d/%d] seed %d: %s in %.0f s", done, total, part.seed, part.name, seconds)
            under_way |= {pool.submit(_perform, config, each): each for each in part.then}


def _begin_worker() -> None:
    """Make a worker one that computes on one core, and that ends with the command that started it."""
    torch.set_num_threads(1)
    Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()


def _leave_with(parent: int) -> None:
    """End this process at once when its parent has ended: what it did not save is done again."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _perform(config: LaboratoryConfig, part: Part) -> float:
    """Do a part in a worker, what it says going to a file; returns the seconds it took."""
    start = time.perf_counter()
    with _told_to(places(config, part.seed).folder / f"{part.name}.log"):
        setup_logging()
        part.do(config, part.seed, *part.arguments)
    return time.perf_counter() - start


@contextmanager
def _told_to(path: Path) -> Iterator[None]:
    """Send what this process writes to a file, by its descriptors: libraries write there as well."""
    kept = [os.dup(number) for number in (1, 2)]
    with path.open("a") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)

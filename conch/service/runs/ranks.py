"""The processes of a service that `accelerate launch` or `torchrun` started: rank 0 listens to clients and
leads, the others do what it tells them.

    rank 0    thread `lead`      tells the others of a run, and trains it with them
    others    thread `follow`    wait to be told of a run, train it with rank 0, and wait again

While there is no run, and while clients let one wait, rank 0 says so every second: no wait for it comes near
the deadline of a collective, however long clients stay away, and a rank that has died is noticed.
"""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from conch.config import RolloutConfig, TrainConfig
from conch.distributed.train_engine import TrainEngine
from conch.errors import ConchError, DistributedError, first_line
from conch.service.protocol import TrainingSettings

HEARTBEAT_S = 1.0
"""Longest silence of rank 0."""

_JOIN_S = 0.5


@dataclass(frozen=True, slots=True)
class RunStart:
    """A run that all ranks train. train_dir: its folder, which all of them see."""

    settings: TrainingSettings
    train_dir: Path


@dataclass(frozen=True, slots=True)
class ServiceEnd:
    """There will be no more runs."""


Word = RunStart | ServiceEnd | None
"""What rank 0 says between runs; None that there is nothing to do yet."""


class Leader:
    """Rank 0's side. One thread speaks with the other ranks, whatever the run.

    on_lost: called once when the others are out of reach: the service has to end.
    """

    def __init__(self, on_lost: Callable[[], None]) -> None:
        self.lost: DistributedError | None = None
        self._on_lost = on_lost
        self._runs: queue.SimpleQueue[tuple[RunStart, Callable[[], None]] | None] = queue.SimpleQueue()
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._lead, name="lead", daemon=True)
        self._thread.start()

    def wait_for_ranks(self) -> None:
        """Wait until all ranks are there.

        Raises:
            ConchError: they cannot work together.
        """
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def start(self, run: RunStart, train: Callable[[], None]) -> None:
        """Have all ranks train a run, once they are free.

        train: does it on this one; it asks `agree` how the run has ended. A DistributedError means that the
            other ranks are lost.
        """
        self._runs.put((run, train))

    def agree(self, failure: ConchError | None) -> str:
        """Why a run failed, on whichever rank; "" where it did on none. Each rank calls it at a run's end.

        Raises:
            DistributedError: the ranks do not come together any more.
        """
        return agree(self._engine, failure)

    def close(self, timeout_s: float) -> None:
        """Let the other ranks leave."""
        self._runs.put(None)
        self._thread.join(timeout_s)

    def _lead(self) -> None:
        try:
            self._engine = TrainEngine(TrainConfig())
            self._engine.collectives.barrier()
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._ready.set()
        try:
            while True:
                try:
                    item = self._runs.get(timeout=HEARTBEAT_S)
                except queue.Empty:
                    self._say(None)
                    continue
                if item is None:
                    self._say(ServiceEnd())
                    return
                run, train = item
                self._say(run)
                train()
        except DistributedError as error:
            self.lost = error
            self._on_lost()
        finally:
            self._engine.close()

    def _say(self, word: Word) -> None:
        self._engine.collectives.broadcast(word)


def agree(engine: TrainEngine, failure: ConchError | None) -> str:
    """See `Leader.agree`. A rank's own reason comes before "another one failed"."""
    told = "" if failure is None else first_line(failure)
    is_echo = isinstance(failure, DistributedError)
    failures = [each for each in engine.collectives.all_gather([(is_echo, told)]) if each[1]]
    return min(failures)[1] if failures else ""


def follow(rollout: RolloutConfig) -> None:
    """Train what rank 0 tells this rank to, until the service ends. SIGTERM and Ctrl-C reach all ranks, and
    rank 0 alone decides what they mean.

    Raises:
        ConchError: rank 0 or another rank is gone or stuck, or this one cannot work with them.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            _follow(rollout)
        except BaseException as error:  # for the main thread, whose exit code the launcher sees
            failure.append(error)

    thread = threading.Thread(target=work, name="follow", daemon=True)
    thread.start()
    while thread.is_alive():  # in slices, between which the handlers of signals run
        thread.join(_JOIN_S)
    if failure:
        raise failure[0]


def _follow(rollout: RolloutConfig) -> None:
    engine = TrainEngine(TrainConfig())
    with closing(engine):
        engine.collectives.barrier()
        _train_all(engine, rollout)


def _train_all(engine: TrainEngine, rollout: RolloutConfig) -> None:
    """Train run after run."""
    # Loads transformers, which the process of a service without ranks does in its run.
    from conch.service.runs.trainer import train_run

    while True:
        word: Word = engine.collectives.broadcast(None)
        if isinstance(word, ServiceEnd):
            return
        if word is None:
            continue
        failure: ConchError | None = None
        try:
            train_run(word.settings, word.train_dir, rollout)
        except ConchError as error:
            failure = error
        agree(engine, failure)

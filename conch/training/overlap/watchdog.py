"""A watch over what moves in an asynchronous run: where nothing does, it ends and says who waits for whom.

Sampling, scoring and training wait for each other through queues and threads; a thread that is lost without
an error leaves all of them waiting. Each part notes its progress here; `Watchdog` looks at the notes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from conch.distributed.stuck import say, thread_stacks, ticks, within, write_report
from conch.errors import StuckError, first_line
from conch.log import get_logger

_log = get_logger(__name__)

GRACE_S = 60.0
"""Time of the main thread to leave by the error that it is told, before the process is ended."""

_ASK_WITHIN_S = 10.0
"""Longest wait for the answer of another part: it may be the one that hangs."""

_LONGEST_PERIOD_S = 1.0
_NUM_SAID = 4


class Progress:
    """Counts what has moved, by kind; may be used from every thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._pauses: Counter[str] = Counter()

    def note(self, what: str) -> None:
        """Note that something moved.

        what: its kind, a noun: `completion`, `reward`, `weights`, `step`.
        """
        with self._lock:
            self._counts[what] += 1

    @contextlib.contextmanager
    def paused(self, what: str) -> Iterator[None]:
        """Inside, nothing needs to move: this takes as long as it takes and has deadlines of its own.

        what: an evaluation, a checkpoint, an outage that is waited out.
        """
        with self._lock:
            self._pauses[what] += 1
        try:
            yield
        finally:
            with self._lock:
                self._pauses[what] -= 1
                self._counts[what] += 1

    def counts(self) -> dict[str, int]:
        """How often each kind has moved."""
        with self._lock:
            return dict(self._counts)

    def is_paused(self) -> bool:
        """True inside `paused`, of any thread."""
        with self._lock:
            return any(self._pauses.values())


class Watchdog:
    """Ends the run where nothing has moved for `deadline_s`; to be used as a context around a step.

    Its thread writes the stacks of all threads to the run's folder, adds what the other parts say of theirs,
    and calls `on_stuck`, which is to wake the main thread with the error. A main thread that has not left the
    context within `grace_s` hangs in a collective or in C code: the process ends with code 1, by which the
    other ranks learn of it.

    Time in which the process itself does not run (SIGSTOP, a suspended machine) does not count.

    progress: what the parts note.
    deadline_s: of `asynchronous.deadline_s`.
    run: folder of the run.
    rank: of this process.
    on_stuck: called from the watchdog's thread.
    describe: functions that say who waits for whom, one line each.
    stacks: functions that give stacks of other processes (samplers).
    """

    def __init__(
        self,
        progress: Progress,
        *,
        deadline_s: float,
        run: Path,
        rank: int,
        on_stuck: Callable[[StuckError], object],
        describe: Sequence[Callable[[], Sequence[str]]] = (),
        stacks: Sequence[Callable[[], str]] = (),
        grace_s: float = GRACE_S,
    ) -> None:
        self._progress = progress
        self._deadline_s = deadline_s
        self._run = run
        self._rank = rank
        self._on_stuck = on_stuck
        self._describe = describe
        self._stacks = stacks
        self._grace_s = grace_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()

    def _look(self) -> None:
        counts = self._progress.counts()
        ages = dict.fromkeys(counts, 0.0)  # kind -> seconds since it moved
        quiet_s = 0.0
        for tick_s in ticks(self._stop, min(_LONGEST_PERIOD_S, self._deadline_s / 10)):
            before, counts = counts, self._progress.counts()
            moved = {kind for kind, number in counts.items() if number != before.get(kind)}
            ages = {kind: 0.0 if kind in moved else ages[kind] + tick_s for kind in counts}
            quiet_s = 0.0 if moved or self._progress.is_paused() else quiet_s + tick_s
            if quiet_s >= self._deadline_s:
                self._end(self._reason(ages, counts))
                return

    def _reason(self, ages: dict[str, float], counts: dict[str, int]) -> str:
        seen = [f"{kind} {age:.0f} s ago ({counts[kind]} in all)" for kind, age in ages.items()]
        last = f"last seen: {', '.join(sorted(seen))}" if seen else "nothing has moved since the start"
        deadline = f"`asynchronous.deadline_s`={self._deadline_s:g} s"
        return f"nothing has moved on rank {self._rank} for {deadline}; {last}"

    def _end(self, reason: str) -> None:
        own = thread_stacks()  # before the questions below make threads of their own
        waits = [line for ask in self._describe for line in _answers(ask, _name(ask))]
        place = self._write(reason, ["\n".join(waits), own])
        for ask in self._stacks:
            self._write("stacks of other processes", _answers(lambda ask=ask: [ask()], _name(ask)))
        said = f"; {'; '.join(waits[:_NUM_SAID])}" if waits else ""
        error = StuckError(f"{reason}{said}; the stacks of all threads are {place}")
        within(lambda: _log.error("%s", error), _ASK_WITHIN_S)
        within(lambda: self._on_stuck(error), _ASK_WITHIN_S)
        left_s = self._grace_s
        for tick_s in ticks(self._stop, min(_LONGEST_PERIOD_S, self._grace_s / 10)):
            left_s -= tick_s
            if left_s <= 0:
                self._leave(error)

    def _write(self, reason: str, parts: list[str]) -> str:
        write = functools.partial(write_report, self._run, self._rank, reason, parts)
        return within(write, _ASK_WITHIN_S) or "not written: the disk does not answer"

    def _leave(self, error: StuckError) -> None:
        say(f"error: {error}; the main thread hangs, so this process ends")
        within(_flush, _ASK_WITHIN_S)
        os._exit(1)


def _answers(ask: Callable[[], Sequence[str]], name: str) -> list[str]:
    """Return what another part says, or that it says nothing."""

    def told() -> list[str]:
        try:
            return list(ask())
        except Exception as error:
            return [f"{name} fails: {type(error).__name__}: {first_line(error)}"]

    answers = within(told, _ASK_WITHIN_S)
    return [f"{name} gives no answer within {_ASK_WITHIN_S:g} s"] if answers is None else answers


def _name(ask: Callable[[], object]) -> str:
    return getattr(ask, "__qualname__", repr(ask))


def _flush() -> None:
    for handler in logging.getLogger("conch").handlers:
        with contextlib.suppress(Exception):
            handler.flush()
    sys.stdout.flush()
    sys.stderr.flush()

"""Watches how long this rank waits for the others in a collective, and has all ranks write their stacks."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conch.distributed.stuck import FOLDER, file_of, say, ticks, write_report

PERIOD_S = 1.0
_MARGIN_S = 30.0
"""Ahead of the deadline, at most a quarter of it: NCCL ends the process there, without an exception."""

_SAME_HANG_S = 300.0


class CollectiveWatch:
    """Notes what this rank waits in; from `start` on a thread looks at it.

    A rank that has waited almost `timeout_s` writes its stacks to the run's folder `stuck/`. Each other rank
    sees that file (the folder is on a file system that all of them see) and adds its own: the stacks of the
    rank that hangs are those that tell why.
    """

    def __init__(self, rank: int, timeout_s: float) -> None:
        self._rank = rank
        self._timeout_s = timeout_s
        self._run: Path | None = None
        self._numbers = itertools.count()
        self._waits: tuple[int, str] | None = None
        self._stop = threading.Event()

    @property
    def timeout_s(self) -> float:
        """Longest wait, in seconds: `train.collective_timeout_s`."""
        return self._timeout_s

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Inside, this rank's main thread waits for the others in `what`."""
        before, self._waits = self._waits, (next(self._numbers), what)
        try:
            yield
        finally:
            self._waits = before

    def start(self, run: Path) -> None:
        """Look from a daemon thread from now on, and write to this run's folder."""
        self._run = run
        known = self._reports()
        threading.Thread(target=self._look, args=(known,), name="collective-watch", daemon=True).start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()

    def timed_out(self, what: str, reason: str) -> str:
        """Write this rank's stacks after a collective's deadline; return the sentence to end with."""
        head = (
            f"rank {self._rank} waited for the other processes of this run, in {what}, until the deadline of "
            f"`train.collective_timeout_s`={self._timeout_s:g} s: one of them is stuck or dead"
        )
        place = write_report(self._run, self._rank, f"{head} ({reason})")
        return (
            f"{head}; its stacks are {place}{', those of the others beside it' * bool(self._run)} ({reason})"
        )

    def _look(self, known: dict[Path, int]) -> None:
        waits: tuple[int, str] | None = None
        waited_s, told = 0.0, False
        for tick_s in ticks(self._stop, PERIOD_S):
            now = self._waits
            waited_s = waited_s + tick_s if now is not None and now == waits else 0.0
            told = told and waited_s > 0
            waits = now
            if now is not None and not told and waited_s >= self._timeout_s - self._margin_s:
                told = True
                self._tell(now[1], waited_s)
            reports = self._reports()
            if reports != known:
                known = reports
                if not self._has_reported(max(reports.values(), default=0)):
                    self._join(now)

    @property
    def _margin_s(self) -> float:
        return min(_MARGIN_S, self._timeout_s / 4)

    def _reports(self) -> dict[Path, int]:
        """Return when each of the other ranks last wrote, in an earlier life of the run included."""
        assert self._run is not None
        own, reports = file_of(self._run, self._rank), dict[Path, int]()
        for file in (self._run / FOLDER).glob("rank_*.txt"):
            try:
                reports[file] = file.stat().st_mtime_ns
            except OSError:  # deleted meanwhile
                continue
        reports.pop(own, None)
        return reports

    def _has_reported(self, newest_ns: int) -> bool:
        """True where this rank's own report belongs to the others' newest: else each would answer the other's
        answer."""
        assert self._run is not None
        try:
            own_ns = file_of(self._run, self._rank).stat().st_mtime_ns
        except OSError:
            return False
        return own_ns > newest_ns - _SAME_HANG_S * 10**9

    def _tell(self, what: str, waited_s: float) -> None:
        reason = (
            f"rank {self._rank} has waited {waited_s:.0f} s for the other processes of this run, in {what}; "
            f"its deadline is `train.collective_timeout_s`={self._timeout_s:g} s"
        )
        place = write_report(self._run, self._rank, reason)
        say(f"warning: {reason}; its stacks are {place}")

    def _join(self, waits: tuple[int, str] | None) -> None:
        does = "computes or is stuck" if waits is None else f"waits in {waits[1]}"
        reason = f"another process of this run waits too long; rank {self._rank} {does}"
        place = write_report(self._run, self._rank, reason)
        say(f"warning: {reason}; its stacks are {place}")

"""How much of the time that rewards take passes while the trainer does something else."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import Any


class Overlap:
    """Measures from one `read` to the next. `track` may be called in one thread, futures end in any.

    Rewards are under way from a request to its answer; several at once count once, not several times.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0
        self._since = 0.0
        self._busy_s = 0.0
        self._blocked_s = 0.0

    def track(self, future: Future[Any]) -> None:
        """A request was sent just now; it is under way until `future` is done."""
        with self._lock:
            if self._under_way == 0:
                self._since = time.monotonic()
            self._under_way += 1
        future.add_done_callback(self._done)

    def block(self, seconds: float, *, idle: bool = False) -> None:
        """The trainer stood still for rewards. idle: with none under way, as between two attempts."""
        with self._lock:
            self._blocked_s += seconds
            self._busy_s += seconds if idle else 0.0

    def read(self) -> tuple[float, float]:
        """Seconds that the trainer was blocked, and the share of the rewards' time that it was not: 1 for
        rewards that took no time. What is measured next starts at 0."""
        with self._lock:
            now = time.monotonic()
            busy = self._busy_s + (now - self._since if self._under_way else 0.0)
            blocked = self._blocked_s
            self._busy_s = self._blocked_s = 0.0
            self._since = now
        return blocked, max(0.0, 1 - blocked / busy) if busy > 0 else 1.0

    def _done(self, _future: Future[Any]) -> None:
        with self._lock:
            self._under_way -= 1
            if self._under_way == 0:
                self._busy_s += time.monotonic() - self._since

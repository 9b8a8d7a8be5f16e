"""What this process holds on to: nothing must be left of a client that was closed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

SETTLED_S = 60.0
# A client that is not closed holds 2 files and 4 threads or more. gRPC's own pool, one for the whole process,
# may grow by less between two looks and keeps what it has.
_FILES_OF_THE_POOL = 1
_THREADS_OF_THE_POOL = 3


@dataclass(frozen=True, slots=True)
class Footprint:
    """Open files and sockets, and threads, those of C libraries among them."""

    files: int
    threads: int

    @classmethod
    def now(cls) -> Footprint:
        """Of this process."""
        process = psutil.Process()
        return cls(process.num_fds(), process.num_threads())

    def is_within(self, other: Footprint) -> bool:
        """Not more of anything than `other`, but for what gRPC's pool may have grown by."""
        more_files, more_threads = self.files - other.files, self.threads - other.threads
        return more_files <= _FILES_OF_THE_POOL and more_threads <= _THREADS_OF_THE_POOL


@contextmanager
def nothing_is_left() -> Iterator[None]:
    """What the block opens is closed after it; libraries may take a while to end their threads.

    Let the block's kind of work be done once before: libraries keep some things for good.
    """
    before = Footprint.now()
    yield
    gc.collect()  # exceptions keep clients in cycles
    wait_until(lambda: Footprint.now().is_within(before), lambda: f"{before} became {Footprint.now()}")


def wait_until(condition: Callable[[], bool], what: Callable[[], str], timeout_s: float = SETTLED_S) -> None:
    """Look again and again until `condition` holds; `what` tells what is wrong where it never does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.02)

"""What a program prints, and to whom."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Print to a reader that may leave before the end, as `head` does: what it does not want is left unsaid.

    A pipe that broke elsewhere is an error as before.
    """
    try:
        yield
    except BrokenPipeError:
        if not _has_lost_its_reader():
            raise
    finally:
        # What is left in the buffer, which Python would write after the last chance to catch an error.
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _has_lost_its_reader() -> bool:
    """Whether stdout is a pipe that nobody reads."""
    try:
        output = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # replaced by what is no file, or closed
        return False
    poll = select.poll()
    poll.register(output, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))

"""Let glibc reuse freed tensor memory instead of returning it to the kernel."""

from __future__ import annotations

import ctypes
import os
import sys

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""As <malloc.h> numbers the parameters of mallopt(3)."""

_USERS_OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_TEST", "LD_PRELOAD")


def keep_heap() -> None:
    """Let glibc keep the memory of large tensors that were freed, up to 2 GiB, instead of giving it back.

    By its defaults large tensors are asked from the kernel and given back to it, which zeroes each page the
    next time: up to a third of an update's time on a CPU. What the user set in the environment, another
    allocator among it, stays as it is; so does all where there is no glibc.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _USERS_OWN):
        return
    set_thresholds(2**30, 2**31 - 1)


def set_thresholds(mmap_bytes: int, trim_bytes: int) -> None:
    """Bytes from which glibc asks the kernel for a block alone, and from which it gives back what is free at
    the heap's end; without glibc nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, mmap_bytes)
        mallopt(_TRIM_THRESHOLD, trim_bytes)

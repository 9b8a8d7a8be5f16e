"""Freed memory stays with the process, unless the user said otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys
from conch.machine.malloc import keep_heap
if sys.argv[1] == "keep":
    keep_heap()
def write():
    block = bytearray(64 * 2**20)
    block[::4096] = b"1" * len(block[::4096])
write()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    write()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 3 * 64 * 2**20 // 4096


def faults(what: str, **variables: str) -> int:
    """Pages that the kernel hands out while three blocks of 64 MiB are written and freed in turn."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", _FAULTS, what]
    done = subprocess.run(command, env={**kept, **variables}, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_used_again_without_the_kernel() -> None:
    assert faults("leave") >= PAGES
    assert faults("keep") < PAGES / 10


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_the_user_set_stays() -> None:
    assert faults("keep", MALLOC_MMAP_THRESHOLD_="131072") >= PAGES

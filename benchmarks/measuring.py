"""Times, cores and spreads: what the benchmarks measure with, and what they say about the machine."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from conch.errors import ConchError

TOLERANCE = 1e-4


def check_scores(scores: Mapping[str, list[float]]) -> None:
    """Hold all ways' scores against the first way's.

    Raises:
        ConchError: some differ by more than `TOLERANCE`, or are NaN.
    """
    names = list(scores)
    for name in names[1:]:
        differences = [abs(a - b) for a, b in zip(scores[names[0]], scores[name], strict=True)]
        wrong = [each for each in differences if not each <= TOLERANCE]  # so that NaN is wrong
        if wrong:
            worst = max(wrong)
            raise ConchError(f"{name} differs by {worst:.1e} from {names[0]}: there is nothing to compare")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and both ends."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its seconds."""
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Bind this thread, and what it starts, to one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def require_cores(*cores: int) -> None:
    """Refuse cores that this process may not use.

    Raises:
        ConchError: names those that it may.
    """
    allowed = os.sched_getaffinity(0)
    if not allowed.issuperset(cores):
        raise ConchError(
            f"this process may use cores {sorted(allowed)}: choose --server-core and --client-core there"
        )


def machine() -> dict[str, Any]:
    """Processor, cores and versions, for a report."""
    return {
        "machine": {"cpu": _cpu_name(), "cores": os.cpu_count(), "platform": platform.platform()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.processor()

"""Processors that the machine really grants this process, and how OpenMP's threads wait for them.

Importing `conch` calls `let_others_work`, since OpenMP reads its variables once, when torch loads it. So
nothing here imports torch before it is there.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Protocol, runtime_checkable

SPINS = "10000"
"""Turns of GOMP_SPINCOUNT: some tenths of a millisecond. By itself libgomp spins 300,000 turns before a
thread that waits sleeps. A team whose other thread has lost its processor to another program then burns the
processor that the other thread waits for; docs/benchmarks.md has the figures, alone and beside others."""

WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""Variables by which a user says how threads wait; whatever stands in one of them stays."""

_came_late = False
"""Whether torch, and OpenMP with it, was there before the variable was set."""
_CGROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def let_others_work(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have OpenMP's threads, in this process and those that it starts, sleep soon when they wait."""
    global _came_late
    if any(name in environment for name in WAITING):
        return
    environment["GOMP_SPINCOUNT"] = SPINS
    _came_late = "torch" in sys.modules


def waiting_variables(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What tells another process how its threads wait, as it is told here."""
    return {name: environment[name] for name in WAITING if name in environment}


def granted_processors(own: Path = _OWN, cgroups: Path = _CGROUPS) -> int:
    """Processors that this process may compute on: its affinity, and the quota of its control groups.

    own, cgroups: as for `cpu_quota`.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(own, cgroups)
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def cpu_quota(own: Path = _OWN, cgroups: Path = _CGROUPS) -> float | None:
    """Processors' worth of time that control groups (`docker run --cpus`, Kubernetes' limits) grant; None
    where there is no limit. The narrowest one of a group and those above it counts.

    own: /proc/self/cgroup, which names this process's groups.
    cgroups: where they are mounted.
    """
    quotas: list[float] = []
    for version, folder in control_groups("cpu", own, cgroups):
        try:
            quota = _quota_of_version_2(folder) if version == 2 else _quota_of_version_1(folder)
        except (OSError, ValueError):
            continue
        if quota is not None:
            quotas.append(quota)
    return min(quotas, default=None)


def control_groups(controller: str, own: Path = _OWN, cgroups: Path = _CGROUPS) -> Iterator[tuple[int, Path]]:
    """Folders of this process's control groups and of the groups above them, each behind its version, 1 or 2;
    some may not be there.

    controller: `cpu` or `memory`.
    own, cgroups: as for `cpu_quota`.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux, or no /proc
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        version, mount = (1, cgroups / controllers) if controllers else (2, cgroups)
        # In a container the path may be the host's, where only the mount's top is to be seen.
        relative = Path(path.lstrip("/"))
        yield version, mount / relative
        for parent in relative.parents:
            yield version, mount / parent


def _quota_of_version_2(folder: Path) -> float | None:
    quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
    return None if quota == "max" else int(quota) / int(period)


def _quota_of_version_1(folder: Path) -> float | None:
    quota = int((folder / "cpu.cfs_quota_us").read_text(encoding="ascii"))
    return None if quota < 0 else quota / int((folder / "cpu.cfs_period_us").read_text(encoding="ascii"))


@runtime_checkable
class Threads(Protocol):
    """A library that computes with threads: `torch`, which this file must not import."""

    def get_num_threads(self) -> int: ...

    def set_num_threads(self, num: int, /) -> None: ...


def fit_threads(library: Threads, environment: Mapping[str, str] = os.environ) -> None:
    """Lower a library's threads to the processors granted, shared with the other ranks of this machine.

    torch takes the machine's cores, also in a container that is granted two of a hundred. What the user or a
    launcher set (OMP_NUM_THREADS) stays, and the number is never raised.
    """
    if "OMP_NUM_THREADS" not in environment:
        ranks = int(environment.get("LOCAL_WORLD_SIZE") or 1)
        share = max(1, granted_processors() // ranks)
        if library.get_num_threads() > share:
            library.set_num_threads(share)
    if _came_late and library.get_num_threads() > 1:
        logging.getLogger(__name__).info(
            "torch was imported before conch, so its threads spin as they wait, which beside other programs "
            "can take ten times as long: import conch first, or set GOMP_SPINCOUNT=%s in the environment",
            SPINS,
        )

"""Memory that the machine really grants this process."""

from __future__ import annotations

from pathlib import Path

from conch.machine.processors import control_groups

_MEMINFO, _CGROUPS, _OWN = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_memory(meminfo: Path = _MEMINFO, own: Path = _OWN, cgroups: Path = _CGROUPS) -> int | None:
    """Bytes that programs can still get: Linux's own estimate, or where that is less, what the limits of the
    control groups leave (`docker run --memory`, Kubernetes, Slurm); None where there is no /proc.

    own, cgroups: as for `conch.machine.processors.cpu_quota`.
    """
    try:
        lines = meminfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    sizes = {name: value for name, _, value in (line.partition(":") for line in lines)}
    if "MemAvailable" not in sizes:
        return None
    free = [int(sizes["MemAvailable"].split()[0]) * 1024]
    for version, folder in control_groups("memory", own, cgroups):
        try:
            left = _left_of_version_2(folder) if version == 2 else _left_of_version_1(folder)
        except (OSError, ValueError):
            continue
        if left is not None:
            free.append(max(0, left))
    return min(free)


def _left_of_version_2(folder: Path) -> int | None:
    limit = (folder / "memory.max").read_text(encoding="ascii").strip()
    if limit == "max":
        return None
    return int(limit) - _number(folder / "memory.current") + _file_pages(folder, "inactive_file")


def _left_of_version_1(folder: Path) -> int | None:
    limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
    return limit - used + _file_pages(folder, "total_inactive_file")


def _number(file: Path) -> int:
    return int(file.read_text(encoding="ascii"))


def _file_pages(folder: Path, name: str) -> int:
    """Bytes of files that the kernel holds in memory and drops first, which a group's use counts."""
    rows = (line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    return next((int(value) for key, value in rows if key == name), 0)

"""How much memory a process may still take."""

from __future__ import annotations

from pathlib import Path

import pytest

from conch.machine.memory import available_memory

GIB = 2**30
FREE = "MemTotal: 99 kB\nMemAvailable: 8388608 kB\n"


def machine(folder: Path, own: str, files: dict[str, str]) -> dict[str, Path]:
    """Files as Linux has them. files: of /sys/fs/cgroup."""
    for name, content in {"meminfo": FREE, "own": own, **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return {"meminfo": folder / "meminfo", "own": folder / "own", "cgroups": folder / "cg"}


def version_2(limit: str, used: int, files: int) -> dict[str, str]:
    return {
        "memory.max": limit,
        "memory.current": str(used),
        "memory.stat": f"anon 5\ninactive_file {files}\n",
    }


def test_memory_is_what_the_narrowest_limit_leaves(tmp_path: Path) -> None:
    inner, outer = version_2("max", GIB, 0), version_2(str(6 * GIB), 5 * GIB, GIB)
    files = {f"cg/a/b/{name}": text for name, text in inner.items()}
    files |= {f"cg/a/{name}": text for name, text in outer.items()}
    assert available_memory(**machine(tmp_path, "0::/a/b\n", files)) == 2 * GIB


def test_memory_of_version_1_is_read_where_the_path_is_the_hosts(tmp_path: Path) -> None:
    files = {
        "cg/memory/memory.limit_in_bytes": str(4 * GIB),
        "cg/memory/memory.usage_in_bytes": str(3 * GIB),
        "cg/memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\n",
    }
    own = "5:memory:/docker/123\n1:cpu,cpuacct:/docker/123\n"
    assert available_memory(**machine(tmp_path, own, files)) == 2 * GIB


@pytest.mark.parametrize("limit", ["max", str(100 * GIB)])
def test_without_a_limit_it_is_the_machines(tmp_path: Path, limit: str) -> None:
    files = {f"cg/{name}": text for name, text in version_2(limit, GIB, 0).items()}
    assert available_memory(**machine(tmp_path, "0::/\n", files)) == 8 * GIB


def test_it_is_unknown_without_proc(tmp_path: Path) -> None:
    assert available_memory(meminfo=tmp_path / "none") is None

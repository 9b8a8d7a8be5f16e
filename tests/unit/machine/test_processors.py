"""How OpenMP's threads wait, and how many there are: as the user set it, else as the machine can bear it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conch.machine.processors import (
    SPINS,
    WAITING,
    cpu_quota,
    fit_threads,
    granted_processors,
    let_others_work,
    waiting_variables,
)

ROOT = Path(__file__).resolve().parents[3]
LOADS_OPENMP = {"torch", "accelerate", "deepspeed", "peft"}


def seen_by_openmp(program: str, **variables: str) -> str:
    """GOMP_SPINCOUNT as the OpenMP that a program loads says it."""
    kept = {name: value for name, value in os.environ.items() if name not in WAITING}
    environment = {**kept, "OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    said = [line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    return said[0].partition("=")[2].strip(" '")


def test_threads_sleep_soon_where_conch_is_imported_before_torch() -> None:
    assert seen_by_openmp("import conch, torch") == SPINS


@pytest.mark.parametrize(
    ("variables", "spins"), [({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")]
)
def test_what_the_user_set_stays(variables: dict[str, str], spins: str) -> None:
    assert seen_by_openmp("import conch, torch", **variables) == spins


def test_other_processes_are_told_what_holds_here() -> None:
    mine: dict[str, str] = {"PATH": "/bin"}
    let_others_work(mine)
    assert waiting_variables(mine) == {"GOMP_SPINCOUNT": SPINS}
    assert waiting_variables({"OMP_WAIT_POLICY": "ACTIVE"}) == {"OMP_WAIT_POLICY": "ACTIVE"}


_LATE = """
import logging
{first}
{second}
from conch.machine.processors import fit_threads
logging.basicConfig(level=logging.INFO)
torch.set_num_threads(2)
fit_threads(torch)
"""


@pytest.mark.parametrize(
    ("first", "second", "is_told"),
    [("import torch", "import conch", True), ("import conch", "import torch", False)],
)
def test_torch_that_came_first_is_told(first: str, second: str, is_told: bool) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in WAITING}
    done = subprocess.run(
        [sys.executable, "-c", _LATE.format(first=first, second=second)],
        env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (f"GOMP_SPINCOUNT={SPINS}" in done.stderr) is is_told


def groups(folder: Path, own: str, **files: str) -> tuple[Path, Path]:
    """What /proc/self/cgroup and the mounted groups hold; `__` in a name is a folder."""
    (folder / "own").write_text(own, encoding="utf-8")
    for name, text in files.items():
        file = folder / "mount" / name.replace("__", "/").replace("max", "cpu.max").replace("cfs", "cpu.cfs")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return folder / "own", folder / "mount"


def test_quota_is_the_narrowest_of_a_group_and_those_above(tmp_path: Path) -> None:
    files = {"pod__max": "150000 100000\n", "pod__box__max": "400000 100000\n", "max": "max 100000\n"}
    assert cpu_quota(*groups(tmp_path, "0::/pod/box\n", **files)) == 1.5


def test_quota_of_version_1_is_read_where_the_path_is_the_hosts(tmp_path: Path) -> None:
    own = "3:memory:/docker/0a1b\n2:cpu,cpuacct:/docker/0a1b\n0::/\n"
    files = {"cpu,cpuacct__cfs_quota_us": "250000\n", "cpu,cpuacct__cfs_period_us": "100000\n"}
    assert cpu_quota(*groups(tmp_path, own, **files)) == 2.5


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/\n", {"max": "max 100000\n"}),
        ("0::/gone\n", {}),
        ("2:cpu:/\n", {"cpu__cfs_quota_us": "-1\n", "cpu__cfs_period_us": "100000\n"}),
    ],
)
def test_no_limit_is_none(tmp_path: Path, own: str, files: dict[str, str]) -> None:
    assert cpu_quota(*groups(tmp_path, own, **files)) is None


def test_processors_are_those_of_the_quota_rounded_up(tmp_path: Path) -> None:
    allowed = len(os.sched_getaffinity(0))
    assert granted_processors(*groups(tmp_path, "0::/\n", max="30000 100000\n")) == 1
    assert granted_processors(*groups(tmp_path, "0::/\n", max="99900000 100000\n")) == allowed
    assert granted_processors(tmp_path / "none", tmp_path / "mount") == allowed


@pytest.mark.parametrize(
    ("variables", "before", "after"),
    [
        ({}, 64, None),
        ({}, 1, 1),
        ({"LOCAL_WORLD_SIZE": "1000"}, 64, 1),
        ({"OMP_NUM_THREADS": "2"}, 64, 64),
    ],
    ids=["lowered", "never raised", "shared with ranks", "as set"],
)
def test_threads_fit_the_processors(variables: dict[str, str], before: int, after: int | None) -> None:
    had = torch.get_num_threads()
    try:
        torch.set_num_threads(before)
        fit_threads(torch, variables)
        assert torch.get_num_threads() == (granted_processors() if after is None else after)
    finally:
        torch.set_num_threads(had)


def imported_first(program: Path) -> str:
    """Which of a program's imports comes first: one that brings `conch`, or one that loads OpenMP."""
    for node in ast.parse(program.read_text(encoding="utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            package = name.partition(".")[0]
            if package in {"conch", "examples", "benchmarks"}:
                return "conch"
            if package in LOADS_OPENMP:
                return package
    return "conch"


def test_examples_that_are_run_as_files_import_conch_before_torch() -> None:
    programs = [
        path
        for path in sorted((ROOT / "examples").rglob("*.py"))
        if "__main__" in path.read_text(encoding="utf-8")
    ]
    assert len(programs) > 10
    assert {str(path.relative_to(ROOT)): imported_first(path) for path in programs} == {
        str(path.relative_to(ROOT)): "conch" for path in programs
    }

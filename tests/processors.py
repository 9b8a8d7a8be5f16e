"""Tests (unit, invariance) as other processors would run them, and a table of what ran.

    python -m tests.processors                      # all settings, one after the other
    python -m tests.processors foreign threads-4    # some of them
    python -m tests.processors aten-avx2 -- -k reference    # what follows `--` goes to pytest
    python -m tests.processors --numeric foreign    # files alone that compare what torch computed

A library's kernels depend on the instructions that it finds and on the number of threads; these settings make
it choose those of another machine. Results differ in the last bits then, which no test may depend on.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETTINGS: dict[str, dict[str, str]] = {
    "native": {},
    "aten-default": {"ATEN_CPU_CAPABILITY": "default"},
    "aten-avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "aten-avx512": {"ATEN_CPU_CAPABILITY": "avx512"},
    "mkl-compatible": {"MKL_CBWR": "COMPATIBLE"},
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "threads-1": {"OMP_NUM_THREADS": "1"},
    "threads-2": {"OMP_NUM_THREADS": "2"},
    # MKL would otherwise cap torch's threads at the number of cores.
    "threads-4": {"OMP_NUM_THREADS": "4", "MKL_DYNAMIC": "FALSE"},
    # As far from a developer's machine as one setting goes: what `make test` runs beside the native one.
    "foreign": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OMP_NUM_THREADS": "2",
    },
}
FOLDERS = ("tests/unit", "tests/invariance")
COMPUTE = ("torch", "transformers", "onnxruntime")
"""Libraries whose kernels the settings choose. NumPy's are the same under all of them."""
COMPARES = re.compile(
    r"approx\(|allclose|assert_close|assert_scores_close|array_equal|array_almost|torch\.equal|isclose|rounding"
    r"|\bcompare\(|< ?1e-"
)
"""How tests compare numbers that were computed."""
ELSEWHERE = {
    "weights are sent, saved or loaded, and come out bit for bit": (
        "tests/unit/converters/test_checkpoint_forms.py",
        "tests/unit/converters/test_kinds.py",
        "tests/unit/examples/test_grpo_outputs.py",
        "tests/unit/rollouts/test_adapter_alone.py",
        "tests/unit/rollouts/test_app.py",
        "tests/unit/rollouts/test_lease.py",
        "tests/unit/rollouts/test_remote.py",
        "tests/unit/rollouts/test_stream.py",
        "tests/unit/rollouts/test_vllm_gate.py",
    ),
    "its numbers are counts or those of functions of texts; a model makes the texts at most": (
        "tests/unit/data/test_multi_turn.py",
        "tests/unit/data/test_preferences.py",
        "tests/unit/evaluation/test_best_of_n_run.py",
        "tests/unit/evaluation/test_gold_watching.py",
        "tests/unit/rewards/verifiers/test_verifier_reward.py",
    ),
    "a run is compared with its own repetition: the same operations on the same shapes": (
        "tests/unit/training/test_groups_training.py",
        "tests/unit/training/test_run.py",
    ),
}
"""Files that compute and compare, and whose results hang on no kernel: reason -> files."""
WORKERS = ["--numprocesses", "auto", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder"]
CHOSEN = "not slow and not gpu and not int8 and not vllm"
SEEN = "import torch; print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())"


@dataclass(frozen=True)
class Outcome:
    """What a run of the tests came to.

    seen: the instruction set and the number of threads that torch reports.
    counts: tests by outcome.
    is_bad: pytest failed.
    """

    name: str
    seen: str
    counts: dict[str, int]
    seconds: float
    is_bad: bool

    def row(self) -> str:
        """A line of the table."""
        numbers = "".join(f"{self.counts[key]:>9}" for key in ("passed", "failed", "skipped"))
        return f"{self.name:<15}{self.seen:<12}{numbers}{self.seconds:>9.0f}"


def numeric_files() -> list[str]:
    """Test files whose results may hang on kernels: all of the invariance tests, and the unit tests that
    compare what torch computed."""
    elsewhere = {file for files in ELSEWHERE.values() for file in files}
    found = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("test_*.py"))]
    names = [str(file.relative_to(ROOT)) for file in found if is_numeric(file)]
    return [name for name in names if name not in elsewhere]


def is_numeric(file: Path) -> bool:
    """Whether a test file compares numbers, and computes by itself or by a helper."""
    if "invariance" in file.parts:
        return True
    return computes(file) and COMPARES.search(file.read_text(encoding="utf-8")) is not None


def computes(file: Path) -> bool:
    """Whether a file imports a library of `COMPUTE`, itself or by modules of `tests` that it imports."""
    seen, waiting = {file}, [file]
    while waiting:
        modules = imported(waiting.pop())
        if any(module.partition(".")[0] in COMPUTE for module in modules):
            return True
        ours = {ROOT / f"{name.replace('.', '/')}.py" for name in modules if name.startswith("tests.")}
        waiting += [helper for helper in ours - seen if helper.exists()]
        seen |= ours
    return False


@functools.cache
def imported(file: Path) -> frozenset[str]:
    """Modules that a file imports anywhere, and names in them."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(modules)


def run(name: str, arguments: list[str], files: Sequence[str] = ()) -> Outcome:
    """Run pytest under a setting; its output goes to the terminal.

    arguments: of pytest.
    files: that it runs where the arguments name none; all of `FOLDERS` where there are none.
    """
    # Several workers may have more threads together than there are cores: those that wait must not spin.
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    # Types and shapes are those of every processor: the run of all tests has checked them.
    environment = {**os.environ, **threads, "CONCH_TESTS_CHECK_TYPES": "0", **SETTINGS[name]}
    seen = subprocess.run(
        [sys.executable, "-c", SEEN], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        command = [sys.executable, "-m", "pytest", *WORKERS, "-m", CHOSEN, f"--junitxml={report}", *arguments]
        if not any((ROOT / argument.partition("::")[0]).exists() for argument in arguments):
            command += files or FOLDERS
        started = time.monotonic()
        ended = subprocess.run(command, env=environment, cwd=ROOT)
        seconds = time.monotonic() - started
        none: dict[str, int] = {"passed": 0, "failed": 0, "skipped": 0}
        counts = counted(report) if report.exists() else none
    # With `-k` and the like there may be nothing to run.
    is_bad = ended.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    return Outcome(name, seen.stdout.strip(), counts, seconds, is_bad)


def counted(report: Path) -> dict[str, int]:
    """How many tests of a JUnit report ended in which way."""
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    totals = [
        {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        for suite in suites
    ]
    tests, failures, errors, skipped = (
        sum(total[key] for total in totals) for key in ("tests", "failures", "errors", "skipped")
    )
    return {"passed": tests - failures - errors - skipped, "failed": failures + errors, "skipped": skipped}


def main(argv: list[str]) -> int:
    """Exit code: 0 where everything passed under every setting."""
    cut = argv.index("--") if "--" in argv else len(argv)
    names, arguments = [name for name in argv[:cut] if name != "--numeric"], argv[cut + 1 :]
    files = numeric_files() if "--numeric" in argv[:cut] else []
    names = names or [name for name in SETTINGS if name != "foreign"]
    unknown = [name for name in names if name not in SETTINGS]
    if unknown:
        print(f"no setting {', '.join(unknown)}; there are {', '.join(SETTINGS)}", file=sys.stderr)
        return 2
    outcomes = []
    for name in names:
        print(f"== {name}: {' '.join(f'{key}={value}' for key, value in SETTINGS[name].items())}", flush=True)
        outcomes.append(run(name, arguments, files))
    print(f"\n{'setting':<15}{'torch':<12}{'passed':>9}{'failed':>9}{'skipped':>9}{'seconds':>9}")
    print("\n".join(outcome.row() for outcome in outcomes))
    return int(any(outcome.is_bad for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

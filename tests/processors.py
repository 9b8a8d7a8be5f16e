"""The numeric tests (unit, invariance) as other processors would run them, and a table of what ran.

    python -m tests.processors                      # all settings, one after the other
    python -m tests.processors foreign threads-4    # some of them
    python -m tests.processors aten-avx2 -- -k reference    # what follows `--` goes to pytest

A library's kernels depend on the instructions that it finds and on the number of threads; these settings make
it choose those of another machine. Results differ in the last bits then, which no test may depend on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
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
NUMERIC = ["tests/unit", "tests/invariance"]
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


def run(name: str, arguments: list[str]) -> Outcome:
    """Run pytest under a setting; its output goes to the terminal."""
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
            command += NUMERIC
        started = time.monotonic()
        ended = subprocess.run(command, env=environment, cwd=ROOT)
        seconds = time.monotonic() - started
        counts = counted(report) if report.exists() else dict.fromkeys(("passed", "failed", "skipped"), 0)
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
    names, arguments = argv[:cut] or [name for name in SETTINGS if name != "foreign"], argv[cut + 1 :]
    unknown = [name for name in names if name not in SETTINGS]
    if unknown:
        print(f"no setting {', '.join(unknown)}; there are {', '.join(SETTINGS)}", file=sys.stderr)
        return 2
    outcomes = []
    for name in names:
        print(f"== {name}: {' '.join(f'{key}={value}' for key, value in SETTINGS[name].items())}", flush=True)
        outcomes.append(run(name, arguments))
    print(f"\n{'setting':<15}{'torch':<12}{'passed':>9}{'failed':>9}{'skipped':>9}{'seconds':>9}")
    print("\n".join(outcome.row() for outcome in outcomes))
    return int(any(outcome.is_bad for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A fork that stands in for a fresh `python` behaves as one."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.footprint import wait_until
from tests.forks import ENVIRONMENT, Forks, started_by

SHOW = "import os, sys; print([*sys.argv, os.getcwd(), os.environ.get('SHOWN'), sys.path[0], input()])"
SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks("fractions") as forks:
        yield forks


def ran(python: object, *arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    settings = {"env": ENVIRONMENT, **settings}  # whatever earlier tests left in this process's
    command = [str(python), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **settings)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", SHOW),
        ("shows.py",),
        ("-u", "shows.py"),
        ("-m", "shows"),
        ("-I", "{}/shows.py"),
        ("-X", "utf8", "-c", SHOW),
    ],
    ids=lambda words: " ".join(words)[:12],
)
def test_program_gets_what_python_would_give_it(
    forks: Forks, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "shows.py").write_text(SHOW)
    words = [word.format(tmp_path) if word.startswith("{") else word for word in arguments]
    settings = {"cwd": tmp_path, "env": {**ENVIRONMENT, "SHOWN": "yes"}, "input": "given\n"}
    words += ["a", "b c"]
    found, expected = (ran(python, *words, **settings) for python in (forks.python, sys.executable))
    assert found.stderr == expected.stderr == "" and found.returncode == expected.returncode == 0
    assert found.stdout == expected.stdout


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit('a sentence')", 1),
        ("raise ValueError('what')", 1),
        ("import os; os._exit(7)", 7),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("raise KeyboardInterrupt", -2),
    ],
)
def test_exit_code_is_the_programs(forks: Forks, code: str, expected: int) -> None:
    assert ran(forks.python, "-c", code).returncode == ran(sys.executable, "-c", code).returncode == expected


def test_libraries_are_there_and_nothing_of_another_program(forks: Forks) -> None:
    code = "import sys; print('fractions' in sys.modules, getattr(sys, 'left', None)); sys.left = 1"
    assert [ran(forks.python, "-c", code).stdout for _ in range(2)] == ["True None\n"] * 2
    assert "tests.forks" not in ran(forks.python, "-c", "import sys; print(sys.modules.keys())").stdout


@pytest.mark.parametrize("name", ["TORCHINDUCTOR_CACHE_DIR", "PYTHONBREAKPOINT", "XDG_STATE_HOME", "RANK"])
def test_other_variables_are_the_programs(forks: Forks, name: str) -> None:
    code = f"import os, sys; print(os.environ['{name}'], 'fractions' in sys.modules)"
    assert ran(forks.python, "-c", code, env={**ENVIRONMENT, name: "3"}).stdout == "3 True\n"


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "PYTHONHASHSEED", "HF_HOME"])
def test_variables_that_libraries_read_at_import_have_a_new_process(forks: Forks, name: str) -> None:
    code = f"import os, sys; print(os.environ['{name}'], 'fractions' in sys.modules)"
    assert ran(forks.python, "-c", code, env={**ENVIRONMENT, name: "3"}).stdout == "3 False\n"


@contextmanager
def started(forks: Forks, code: str) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """Who stands in for a program, and the program; neither is left behind."""
    command = [str(forks.python), "-c", code]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        program = psutil.Process(int(process.stdout.readline()))
        try:
            yield process, program
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_signals_reach_the_program(forks: Forks, number: signal.Signals) -> None:
    with started(forks, SLEEP) as (process, program):
        process.send_signal(number)
        assert process.wait(60) == -number
        wait_until(lambda: not program.is_running(), lambda: "the program goes on")


def test_program_may_answer_a_signal(forks: Forks) -> None:
    code = f"import signal, sys; signal.signal(15, lambda *_: sys.exit(5)); {SLEEP}"
    with started(forks, code) as (process, _):
        process.terminate()
        assert process.wait(60) == 5


def test_program_and_what_it_started_are_found(forks: Forks) -> None:
    code = f"import subprocess; subprocess.Popen(['sleep', '60'], stdout=-3); {SLEEP}"
    with started(forks, code) as (process, program):
        found = started_by(process.pid)
        try:
            assert program in found and "sleep" in {each.name() for each in found}
        finally:
            for each in found:
                each.kill()


def test_output_ends_where_the_program_closes_it(forks: Forks) -> None:
    code = f"import os; {SLEEP.replace('; time', '; os.close(1); time')}"
    with started(forks, code) as (process, _):
        assert process.stdout is not None and process.stdout.read() == ""
        assert process.poll() is None

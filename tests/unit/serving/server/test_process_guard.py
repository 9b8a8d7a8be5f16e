"""The guard with small programs in the server's place: what it must do does not depend on what it runs."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conch.serving.server import process_guard as guard

DEADLINE_S = 90.0

OBEDIENT = "import time; time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "print('up', flush=True); time.sleep(600)"
)
WITH_CHILD = (
    "import subprocess, sys, time;"
    # Much memory: its end takes long enough to be seen.
    "code = 'import time; full = bytes(range(256)) * 1_000_000; print(1, flush=True); time.sleep(600)';"
    "child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE);"
    "child.stdout.readline(); print(child.pid, flush=True); time.sleep(600)"
)


@contextmanager
def guarded(
    program: str,
    tmp_path: Path,
    *,
    grace_s: float = 10.0,
    cleans_up: bool = True,
    parent_pid: int | None = None,
    log_max_bytes: int = 1_000_000,
    end_command: list[str] | None = None,
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A guard over `python -c program`; yields it and the program's pid, then checks that it cleaned up."""
    (tmp_path / "scratch").mkdir()
    settings = {
        "command": [sys.executable, "-c", program],
        "end_command": end_command or [],
        "log": str(tmp_path / "log"),
        "log_max_bytes": log_max_bytes,
        "log_keep": 2,
        "shm_prefix": f"conch_test_{secrets.token_hex(4)}_",
        "scratch": str(tmp_path / "scratch"),
        "grace_s": grace_s,
        "parent_pid": parent_pid or os.getpid(),
    }
    process = subprocess.Popen(
        [sys.executable, "-I", guard.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    left_over = Path("/dev/shm") / (settings["shm_prefix"] + "region")
    left_over.write_text("left by a killed server")
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(settings) + "\n")
    process.stdin.flush()
    try:
        yield process, int(process.stdout.readline())
        process.wait(DEADLINE_S)
        assert (tmp_path / "scratch").exists() != cleans_up
        assert left_over.exists() != cleans_up
    finally:
        process.stdin.close()
        process.stdout.close()
        process.kill()
        process.wait(DEADLINE_S)
        left_over.unlink(missing_ok=True)


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_for_log(tmp_path: Path) -> str:
    deadline = time.monotonic() + DEADLINE_S
    while not (text := (tmp_path / "log").read_text()):
        assert time.monotonic() < deadline, "the program printed nothing"
        time.sleep(0.02)
    return text


def test_guard_ends_the_server_when_the_pipe_closes(tmp_path: Path) -> None:
    with guarded(OBEDIENT, tmp_path) as (process, pid):
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(DEADLINE_S) == 128 + signal.SIGTERM
        assert not is_alive(pid)


def test_guard_kills_a_server_that_ignores_sigterm(tmp_path: Path) -> None:
    with guarded(STUBBORN, tmp_path, grace_s=0.2) as (process, pid):
        wait_for_log(tmp_path)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(DEADLINE_S) == 128 + signal.SIGKILL
        assert not is_alive(pid)


def test_guard_ends_after_what_a_dead_server_leaves_in_its_group(tmp_path: Path) -> None:
    with guarded(WITH_CHILD, tmp_path) as (process, pid):
        child = int(wait_for_log(tmp_path))
        os.kill(pid, signal.SIGKILL)
        assert process.wait(DEADLINE_S) == 128 + signal.SIGKILL
        assert not Path(f"/proc/{child}").exists()


def test_guard_passes_on_the_exit_code(tmp_path: Path) -> None:
    with guarded("raise SystemExit(7)", tmp_path) as (process, _):
        assert process.wait(DEADLINE_S) == 7


def test_guard_stops_the_server_on_sigterm(tmp_path: Path) -> None:
    with guarded(OBEDIENT, tmp_path) as (process, pid):
        process.terminate()
        process.wait(DEADLINE_S)
        assert not is_alive(pid)


def test_guard_ends_the_server_when_its_parent_is_gone_though_the_pipe_is_open(tmp_path: Path) -> None:
    # As after the death of a launcher whose forked child holds the pipe: the guard has another parent.
    with guarded(OBEDIENT, tmp_path, parent_pid=1) as (process, pid):
        assert process.wait(DEADLINE_S) == 128 + signal.SIGTERM
        assert not is_alive(pid)


def test_server_ends_when_the_guard_itself_is_killed(tmp_path: Path) -> None:
    with guarded(OBEDIENT, tmp_path, cleans_up=False) as (process, pid):
        process.kill()
        wait_until_gone(pid)


def test_log_is_put_aside_when_full_and_the_oldest_goes(tmp_path: Path) -> None:
    program = "for n in range(100): print(f'line {n:02d}', flush=True)"  # 8 bytes a line
    with guarded(program, tmp_path, log_max_bytes=160) as (process, _):
        assert process.wait(DEADLINE_S) == 0
    files = [tmp_path / "log.2", tmp_path / "log.1", tmp_path / "log"]
    lines = [line for file in files for line in file.read_text().splitlines()]

    assert lines == [f"line {n:02d}" for n in range(100)][-len(lines) :] and len(lines) < 100
    assert all(file.stat().st_size <= 160 for file in files) and not (tmp_path / "log.3").exists()


def test_log_holds_the_last_words_of_a_program_that_prints_much(tmp_path: Path) -> None:
    with guarded("print('x' * 1_000_000); print('last')", tmp_path, log_max_bytes=10_000_000) as (process, _):
        assert process.wait(DEADLINE_S) == 0
    assert (tmp_path / "log").read_text().endswith("x\nlast\n")


def test_guard_runs_the_end_command_after_the_server(tmp_path: Path) -> None:
    with guarded(OBEDIENT, tmp_path, end_command=["touch", str(tmp_path / "removed")]) as (process, _):
        process.terminate()
        process.wait(DEADLINE_S)
    assert (tmp_path / "removed").exists()


def test_settings_do_not_stand_in_the_process_list(tmp_path: Path) -> None:
    with guarded(OBEDIENT, tmp_path) as (process, _):
        assert "scratch" not in Path(f"/proc/{process.pid}/cmdline").read_text()
        process.terminate()

"""A server's parent process, over real processes that stand for the server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from conch.servers import restart
from conch.servers.restart import ENGINE_DIED, run_and_restart
from tests.footprint import wait_until

_SERVER = """
import os, signal, sys, time
sys.path[:0] = [{root!r}]
from conch.servers.restart import exit_with_parent
with open({log!r}, "a") as log:
    log.write(f"{{os.getpid()}}\\n")
lives = len(open({log!r}).readlines())
exit_with_parent(lambda: os.kill(os.getpid(), signal.SIGTERM))
{body}
"""
ROOT = Path(__file__).resolve().parents[3]
ENDS_IN_S = 120


def server(log: Path, body: str) -> list[str]:
    """A command that notes its id, and then does `body`, which knows how many `lives` there were."""
    return [sys.executable, "-c", _SERVER.format(root=str(ROOT), log=str(log), body=body)]


def ids_in(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture(autouse=True)
def _pauses_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restart, "_FIRST_PAUSE_S", 0.01)


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", f"sys.exit({ENGINE_DIED})"])
def test_a_server_that_dies_is_started_again(tmp_path: Path, end: str) -> None:
    log = tmp_path / "lives"
    assert run_and_restart(server(log, f"if lives < 3: {end}")) == 0
    assert len(set(ids_in(log))) == 3


def test_a_server_that_ends_with_an_error_of_its_own_stays_down(tmp_path: Path) -> None:
    log = tmp_path / "lives"
    assert run_and_restart(server(log, "sys.exit(1)")) == 1
    assert len(ids_in(log)) == 1


def test_pauses_double_up_to_the_longest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restart, "_LONGEST_PAUSE_S", 0.03)
    with caplog.at_level("WARNING"):
        run_and_restart(server(tmp_path / "lives", f"sys.exit({ENGINE_DIED} if lives < 5 else 0)"))
    assert [message.rpartition(" in ")[2] for message in caplog.messages] == [
        *("0.01 s", "0.02 s", "0.03 s", "0.03 s"),
    ]
    assert caplog.messages[0] == "the server has lost its engine; it is started again in 0.01 s"


def parent_of(log: Path, body: str) -> subprocess.Popen[bytes]:
    """A parent in a process and a session of its own, whose server has noted its id."""
    run = f"raise SystemExit(run_and_restart({server(log, body)!r}))"
    script = f"from conch.servers.restart import run_and_restart; {run}"
    above = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    wait_until(lambda: bool(ids_in(log)), lambda: "no server was started")
    return above


def test_ctrl_c_ends_both_however_the_server_takes_it(tmp_path: Path) -> None:
    log = tmp_path / "lives"
    stands = tmp_path / "handler"
    ends = f"signal.signal(signal.SIGINT, lambda *_: sys.exit({ENGINE_DIED}))"
    handler = f"{ends}; open({str(stands)!r}, 'w').close()"
    above = parent_of(log, f"{handler}; time.sleep(600)")
    wait_until(stands.exists, lambda: "the server set no handler")
    os.killpg(above.pid, signal.SIGINT)
    assert above.wait(ENDS_IN_S) == 130
    assert len(ids_in(log)) == 1


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_ends_with_its_parent(tmp_path: Path, sent: signal.Signals) -> None:
    log = tmp_path / "lives"
    above = parent_of(log, "time.sleep(600)")
    below = psutil.Process(ids_in(log)[0])
    above.send_signal(sent)
    assert above.wait(ENDS_IN_S) == (0 if sent == signal.SIGTERM else -sent)
    assert psutil.wait_procs([below], timeout=ENDS_IN_S)[1] == []
    assert len(ids_in(log)) == 1

"""Starting, failing and ending the real server."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from conch.errors import ServerStartError
from conch.serving.server import server as launcher
from conch.serving.server.server import TritonServer
from tests.stores import LENGTH_MODEL, store_model

MODEL = "lengths"
DEADLINE_S = 120.0

PARENT = """
import sys, time
from conch.serving.server.server import TritonServer
with TritonServer(sys.argv[1], [sys.argv[2]]) as server:
    print(server.pid, server.url, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store whose only model loads in a second."""
    store_model(tmp_path / "store", MODEL)
    return tmp_path / "store"


def shared_memory_of(pid: int) -> list[Path]:
    return list(Path("/dev/shm").glob(f"conch_{pid}_*"))


def wait_until(condition, what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def port_is_free(url: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(url.rsplit(":", 1)[1]))) != 0


def test_server_serves_on_the_asked_port_and_leaves_nothing(store: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    others = set(shared_memory_of(os.getpid()))  # of servers that fixtures of this process keep up
    server = TritonServer(store, [MODEL], grpc_port=port, log_file=tmp_path / "logs" / "server.log")
    with server:
        assert server.endpoint(MODEL) == f"127.0.0.1:{port}/{MODEL}"
        assert server.is_running and set(shared_memory_of(os.getpid())) > others
        pid = server.pid
    assert not server.is_running and is_gone(pid) and port_is_free(server.url)
    assert set(shared_memory_of(os.getpid())) == others
    assert "successfully loaded" in (tmp_path / "logs" / "server.log").read_text()


def test_server_serves_where_folders_have_spaces_in_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaced = tmp_path / "some files"
    store_model(spaced / "store", MODEL)
    monkeypatch.setattr("tempfile.tempdir", str(spaced))
    with TritonServer(spaced / "store", [MODEL]) as server:
        assert server.log_file is not None and server.log_file.parent == spaced


def test_stop_ends_the_server_though_a_forked_child_holds_the_pipe(store: Path) -> None:
    server = TritonServer(store, [MODEL])
    server.start()
    assert server._guard is not None and server._guard.stdin is not None
    held = os.dup(server._guard.stdin.fileno())  # what a fork would have done
    try:
        server.stop()
    finally:
        os.close(held)
    assert server.log_file is None, "the guard was killed instead of ending the server in order"


def test_start_that_fails_shows_why_and_where_the_log_is(tmp_path: Path) -> None:
    store_model(tmp_path, MODEL, model_py="raise ImportError('no such luck')")
    log = tmp_path / "server.log"
    server = TritonServer(tmp_path, [MODEL], log_file=log)
    with pytest.raises(ServerStartError, match=r"ended with code 1 before it was ready") as caught:
        server.start()

    assert "no such luck" in str(caught.value) and str(log) in str(caught.value)
    assert not server.is_running and log.exists()


def test_start_refuses_a_model_whose_golden_samples_score_wrong(tmp_path: Path) -> None:
    store_model(tmp_path, MODEL, golden_score=2.01)
    server = TritonServer(tmp_path, [MODEL])
    with pytest.raises(ServerStartError, match=r"not ready: golden sample 0 scores .* within 0\.0001"):
        server.start()
    assert not server.is_running


def test_start_refuses_a_model_that_scores_nan(tmp_path: Path) -> None:
    store_model(tmp_path, MODEL, model_py=LENGTH_MODEL.replace("len(text)", "float('nan')"))
    with pytest.raises(ServerStartError, match="golden sample 0 scores"):
        TritonServer(tmp_path, [MODEL]).start()


def test_start_gives_up_at_its_deadline(store: Path) -> None:
    with pytest.raises(ServerStartError, match="not ready in time"):
        TritonServer(store, [MODEL], ready_timeout_s=0.1).start()


def test_start_tries_another_port_when_it_lost_the_race(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = launcher.free_port
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = [taken.getsockname()[1]]
        monkeypatch.setattr(launcher, "free_port", lambda host: ports.pop() if ports else real(host))
        with TritonServer(store, [MODEL]) as server:
            assert ports == [] and server.url != f"127.0.0.1:{taken.getsockname()[1]}"


def test_wait_returns_when_the_server_is_killed_and_its_memory_is_freed(store: Path) -> None:
    others = set(shared_memory_of(os.getpid()))
    with TritonServer(store, [MODEL]) as server:
        os.kill(server.pid, signal.SIGKILL)
        assert server.wait(DEADLINE_S) == 128 + signal.SIGKILL
        assert not server.is_running
        assert set(shared_memory_of(os.getpid())) == others


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_the_parent(store: Path, number: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(store), MODEL],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pid, url = parent.stdout.readline().split()
    stubs = _children(int(pid))
    assert stubs and shared_memory_of(parent.pid)
    while parent.poll() is None:  # Python may drop a KeyboardInterrupt that falls into a finaliser
        parent.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            parent.communicate(timeout=DEADLINE_S / 4)

    for process in (int(pid), *stubs):
        wait_until(lambda process=process: is_gone(process), f"process {process} outlived its parent")
    wait_until(lambda: not shared_memory_of(parent.pid), "shared memory was left behind")
    assert port_is_free(url)


def _children(pid: int) -> list[int]:
    # psutil copes with threads and processes that end while it looks.
    return [child.pid for child in psutil.Process(pid).children()]


def serve(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "conch.serving", "up", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_command_serves_until_it_is_told_to_stop(store: Path, number: signal.Signals) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    store_model(store, "more-lengths")
    both = ("--model", MODEL, "--model", "more-lengths")
    command = serve("--model-store", str(store), *both, "--grpc-port", str(port))
    assert command.stdout is not None
    lines = [command.stdout.readline(), command.stdout.readline()]
    command.send_signal(number)
    _, errors = command.communicate(timeout=DEADLINE_S)

    assert lines == [f"export TRITON_HOST=127.0.0.1:{port}/{name}\n" for name in (MODEL, "more-lengths")]
    assert command.returncode == 0, errors
    assert port_is_free(f"127.0.0.1:{port}")


def test_command_explains_an_error_in_a_sentence_and_leaves_with_1(tmp_path: Path) -> None:
    command = serve("--model-store", str(tmp_path / "nowhere"), "--model", "walks")
    _, errors = command.communicate(timeout=DEADLINE_S)

    assert command.returncode == 1
    assert errors.splitlines()[-1].startswith("error: model store") and "Traceback" not in errors


def test_command_leaves_with_1_when_the_server_dies(store: Path) -> None:
    command = serve("--model-store", str(store), "--model", MODEL, "--grpc-port", "0", "--max-restarts", "0")
    assert command.stdout is not None
    command.stdout.readline()
    (guard,) = _children(command.pid)
    (server,) = _children(guard)
    os.kill(server, signal.SIGKILL)
    _, errors = command.communicate(timeout=DEADLINE_S)

    assert command.returncode == 1
    assert "tritonserver ended with code 137" in errors

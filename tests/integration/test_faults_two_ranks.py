"""The server is killed when one of two ranks is about to ask it and the other still computes: none is left
hanging, whatever `reward.failure.policy` says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.chaos import Outcome
from conch.serving.server.server import TritonServer
from tests.faults import MODEL, hash_store
from tests.footprint import wait_until

ROOT = Path(__file__).resolve().parents[2]
LONGEST_S = 120.0
# Longer than the deadline of the rank that waits: it has given up, and waits for the other in a collective.
COMPUTES_ON_S = 6.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hash_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def server(store: Path) -> Iterator[TritonServer]:
    """A server of this test's own, which it may kill."""
    with TritonServer(store, [MODEL]) as running:
        yield running


def start(folder: Path, url: str, policy: str) -> subprocess.Popen[str]:
    folder.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    run = ["-m", "tests.integration.uneven_ranks_run", str(folder), url, policy]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [*launcher, *run],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Everything that both ranks said; a run that hangs is ended and fails the test."""
    try:
        return process.communicate(timeout=LONGEST_S)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"the ranks hang:\n{process.communicate()[0]}")


def both_there(folder: Path, process: subprocess.Popen[str]) -> None:
    def there() -> bool:
        assert process.poll() is None, f"the run ended early:\n{process.communicate()[0]}"
        return all((folder / f"rank_{rank}.there").exists() for rank in range(2))

    wait_until(there, lambda: "the ranks did not come to the pause", LONGEST_S)


def let_go(folder: Path, *ranks: int) -> None:
    for rank in ranks:
        (folder / f"rank_{rank}.go").touch()


def kill(server: TritonServer) -> int:
    port = int(server.url.rsplit(":", 1)[1])
    os.kill(server.pid, signal.SIGKILL)
    server.wait(LONGEST_S)
    server.stop()
    return port


def test_with_raise_both_ranks_leave_with_the_reason(server: TritonServer, tmp_path: Path) -> None:
    folder = tmp_path / "raise"
    process = start(folder, server.endpoint(MODEL), "raise")
    both_there(folder, process)
    kill(server)
    let_go(folder, 0)  # asks the dead server, and waits
    time.sleep(COMPUTES_ON_S)
    let_go(folder, 1)
    output = finish(process)
    assert process.returncode != 0
    assert "rank 0 of 2" in output and "rank 1 of 2" in output
    assert output.count("error: ") >= 2 and output.count("8 of 8 samples got no reward") >= 2, output


@pytest.mark.slow
def test_with_wait_both_ranks_go_on_to_the_same_end(
    server: TritonServer, store: Path, tmp_path: Path
) -> None:
    calm, storm = tmp_path / "calm", tmp_path / "storm"
    undisturbed = start(calm, server.endpoint(MODEL), "wait")
    let_go(calm, 0, 1)
    output = finish(undisturbed)
    assert undisturbed.returncode == 0, output
    disturbed = start(storm, server.endpoint(MODEL), "wait")
    both_there(storm, disturbed)
    port = kill(server)
    let_go(storm, 0)
    time.sleep(COMPUTES_ON_S)
    let_go(storm, 1)
    with TritonServer(store, [MODEL], grpc_port=port):
        output = finish(disturbed)
    assert disturbed.returncode == 0, output
    assert Outcome.of(storm / "run").difference(Outcome.of(calm / "run")) == ""
    lines = (storm / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]

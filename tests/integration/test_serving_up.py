"""Deployments: detached servers that are looked at, swapped, killed in every way, and stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from conch.serving.deployment import state as deployment
from conch.triton.channel import Access, open_client
from tests.deployments import (
    DEADLINE_S,
    conch,
    detach,
    family,
    is_gone,
    port_is_free,
    score,
    shared_memory,
    status,
    stubs,
    wait_until,
)
from tests.stores import LENGTH_MODEL, store_model

MODEL = "lengths"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    """A store whose only model loads in a second; what a test deployed from it is stopped."""
    store_model(tmp_path / "store", MODEL)
    yield tmp_path / "store"
    conch("down", "--all")


def test_a_detached_deployment_is_found_by_its_name_until_it_is_stopped(store: Path) -> None:
    running = detach(store, "mine", "--replicas", "2", "--metrics-port", "0")
    processes = family(running.pid)
    assert running.is_ready and len({replica.url for replica in running.replicas}) == 2
    assert running.replicas[0].versions == {MODEL: 1}

    for server in status("mine"):
        (model,) = server["models"]
        assert server["phase"] == "ready" and model["model"] == MODEL and model["ready"]
        # Warm-up of 1 and 8, and at least one golden sample.
        assert model["requests"] >= 10 and 1 < model["mean_batch"] <= 8 and model["pending"] == 0
    table = conch("status", "mine", "--interval", "0.1").stdout
    assert "compute ms" in table and running.replicas[1].url in table
    log = conch("logs", "mine", "--replica", "1", "-n", "1000").stdout
    assert f"Started GRPCInferenceService at {running.replicas[1].url}" in log

    assert conch("down", "mine").stdout == "stopped mine\n"
    assert all(is_gone(process) for process in processes) and not shared_memory(running.pid)
    assert all(port_is_free(replica.url) for replica in running.replicas)
    gone = conch("status", "mine")
    assert gone.returncode == 1 and "no deployment called mine runs" in gone.stderr


def test_a_deployment_prints_one_address_a_replica(store: Path) -> None:
    done = conch(
        "up", "--model-store", str(store), "--model", MODEL, "--grpc-port", "0", "--detach", "--replicas", "2"
    )
    urls = [replica.url for replica in deployment.read(MODEL).replicas]
    assert done.stdout.splitlines() == [f"export TRITON_HOST={url}/{MODEL}" for url in urls]


def test_a_detached_supervisor_gets_the_options_of_its_command_line(store: Path, tmp_path: Path) -> None:
    log = tmp_path / "log of mine.txt"
    flag = "--server-flag=--log-verbose=1"
    running = detach(store, "mine", flag, "--log-file", str(log), "--ready-timeout", "inf")

    assert running.replicas[0].log == log and "Started GRPCInferenceService" in log.read_text()
    assert "--log-verbose=1" in psutil.Process(running.replicas[0].pid).cmdline()
    assert psutil.Process(running.pid).cmdline()[-1] == "mine"


def test_a_name_in_use_is_refused_and_one_that_leaves_the_run_folder_too(store: Path) -> None:
    detach(store, "mine")
    again = conch("up", "--model-store", str(store), "--model", MODEL, "--detach", "--name", "mine")
    assert again.returncode == 1 and "a deployment called mine runs already" in again.stderr
    outside = conch("up", "--model-store", str(store), "--model", MODEL, "--detach", "--name", "../mine")
    assert outside.returncode == 1 and "is no name for a deployment" in outside.stderr


def test_a_model_name_that_leaves_the_store_is_refused(store: Path) -> None:
    done = conch("up", "--model-store", str(store / MODEL), "--model", f"../{MODEL}", "--detach")
    assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr


def test_a_detached_start_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    store_model(tmp_path, MODEL, model_py="raise ImportError('no such luck')")
    done = conch("up", "--model-store", str(tmp_path), "--model", MODEL, "--grpc-port", "0", "--detach")
    assert done.returncode == 1 and "no such luck" in done.stderr and "Traceback" not in done.stderr
    assert MODEL not in deployment.names()


def test_a_killed_stub_is_healed_without_a_restart(store: Path) -> None:
    running = detach(store, "mine", "--watch-interval", "0.2")
    server = running.replicas[0].pid
    (stub,) = stubs(server)
    stub.kill()
    wait_until(lambda: deployment.read("mine").replicas[0].heals >= 1, "the stub was not healed")

    now = deployment.read("mine").replicas[0]
    assert now.restarts == 0 and now.pid == server and now.phase == "ready"
    with open_client(now.url, Access()) as client:
        assert score(client, "abcd")[0] == 4.0


BREAKS_IN_ONE_SERVER = """
        import os, pathlib
        broken = pathlib.Path(__file__).resolve().parents[3] / "broken-server"
        if broken.exists() and broken.read_text() == str(os.getppid()):
            raise RuntimeError("broken")
"""


def test_a_model_that_loading_does_not_heal_gets_a_new_server(store: Path) -> None:
    begin = "    def execute(self, requests):"
    store_model(store, MODEL, model_py=LENGTH_MODEL.replace(begin, begin + BREAKS_IN_ONE_SERVER))
    running = detach(store, "mine", "--watch-interval", "0.2")
    (store.parent / "broken-server").write_text(str(running.replicas[0].pid))
    wait_until(lambda: deployment.read("mine").replicas[0].restarts == 1, "it was not restarted")
    wait_until(lambda: deployment.read("mine").is_ready, "it did not become ready again")

    now = deployment.read("mine").replicas[0]
    assert now.heals == 0 and now.pid != running.replicas[0].pid
    assert "golden sample 0 got no score" in conch("logs", "mine", "--supervisor").stdout


def test_a_killed_server_is_started_again(store: Path) -> None:
    running = detach(store, "mine")
    stubs_before = stubs(running.replicas[0].pid)
    os.kill(running.replicas[0].pid, signal.SIGKILL)
    wait_until(lambda: deployment.read("mine").replicas[0].restarts == 1, "it was not restarted")
    wait_until(lambda: deployment.read("mine").is_ready, "it did not become ready again")

    now = deployment.read("mine").replicas[0]
    assert now.pid != running.replicas[0].pid and all(is_gone(stub) for stub in stubs_before)
    assert len(shared_memory(running.pid)) == len(stubs(now.pid))
    with open_client(now.url, Access()) as client:
        assert score(client, "abcd")[0] == 4.0


def test_a_server_that_keeps_dying_is_given_up_after_the_limit(store: Path) -> None:
    running = detach(store, "mine", "--max-restarts", "1")
    supervisor = psutil.Process(running.pid)
    os.kill(running.replicas[0].pid, signal.SIGKILL)
    wait_until(lambda: deployment.read("mine").replicas[0].restarts == 1, "it was not restarted")
    wait_until(lambda: deployment.read("mine").is_ready, "it did not become ready again")
    os.kill(deployment.read("mine").replicas[0].pid, signal.SIGKILL)

    wait_until(lambda: is_gone(supervisor), "it did not give up")
    log = (deployment.folder_of("mine") / "supervisor.log").read_text()
    assert "error: tritonserver ended with code 137" in log and "restart 1 of 1" in log


def test_nothing_outlives_a_killed_supervisor(store: Path) -> None:
    running = detach(store, "mine", "--replicas", "2")
    processes = family(running.pid)
    assert len(processes) >= 7 and shared_memory(running.pid)
    os.kill(running.pid, signal.SIGKILL)

    for process in processes:
        wait_until(lambda process=process: is_gone(process), f"{process} outlived the supervisor")
    wait_until(lambda: not shared_memory(running.pid), "shared memory was left behind")
    assert all(port_is_free(replica.url) for replica in running.replicas)
    assert deployment.names() == [] and detach(store, "mine").is_ready


def test_an_address_that_is_up_already_is_checked_against_the_store(store: Path) -> None:
    url = detach(store, "mine").replicas[0].url
    ask = ("up", "--model-store", str(store), "--model", MODEL, "--url", url)
    done = conch(*ask)
    assert done.returncode == 0 and done.stdout == f"export TRITON_HOST={url}/{MODEL}\n"

    store_model(store, MODEL)
    behind = conch(*ask)
    assert behind.returncode == 1 and "version 1 answers, the store's latest is 2" in behind.stderr
    assert conch("status", "--url", url, "--interval", "0.1").returncode == 0


def test_others_on_this_machine_may_score_but_not_load(store: Path) -> None:
    with open_client(detach(store, "mine").replicas[0].url, Access()) as client:
        assert score(client, "abcd")[0] == 4.0
        with pytest.raises(Exception, match="This protocol is restricted"):
            client.unload_model(MODEL, client_timeout=DEADLINE_S)


def test_a_deployment_of_another_release_is_named(store: Path) -> None:
    detach(store, "mine")
    state = deployment.folder_of("mine") / "deployment.json"
    original = state.read_text()
    state.write_text(original.replace('"format": 1', '"format": 2'))
    try:
        done = conch("status", "mine")
        assert done.returncode == 1 and "was written by another release of Conch" in done.stderr
    finally:
        state.write_text(original)


def test_logs_follow_until_the_deployment_ends(store: Path) -> None:
    detach(store, "mine")
    command = [sys.executable, "-m", "conch.serving", "logs", "mine", "-f", "-n", "1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        first = following.stdout.readline()
        assert conch("down", "mine").returncode == 0
        rest, _ = following.communicate(timeout=DEADLINE_S)
    assert first and "Waiting for in-flight requests to complete" in rest and following.returncode == 0

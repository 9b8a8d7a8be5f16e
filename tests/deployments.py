"""Deployments of the real server for tests: `python -m conch.serving` run as a person would."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tritonclient.grpc as triton

from conch.serving.deployment import state as deployment
from conch.serving.deployment.state import Deployment
from conch.triton.channel import Access, open_client

DEADLINE_S = 120.0


def conch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a subcommand to its end."""
    return subprocess.run(
        [sys.executable, "-m", "conch.serving", *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def detach(store: Path, name: str, *arguments: str, model: str = "lengths") -> Deployment:
    """Start a deployment in the background on free ports."""
    common = ("--model-store", str(store), "--model", model, "--grpc-port", "0", "--detach", "--name", name)
    done = conch("up", *common, *arguments)
    assert done.returncode == 0, done.stderr
    return deployment.read(name)


def status(name: str) -> list[dict]:
    """What `status --json` says about the servers."""
    done = conch("status", name, "--json", "--interval", "0.1")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)[name]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Fail with `what` unless the condition holds within the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it has started."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def stubs(pid: int) -> list[psutil.Process]:
    """The model processes of a tritonserver."""
    return [child for child in psutil.Process(pid).children() if "stub" in child.name()]


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def shared_memory(pid: int) -> list[Path]:
    """Files in shared memory of the servers that process `pid` supervises."""
    return list(Path("/dev/shm").glob(f"conch_{pid}_*"))


def port_is_free(url: str) -> bool:
    """Whether nobody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(url.rsplit(":", 1)[1]))) != 0


def score(client: triton.InferenceServerClient, text: str, model: str = "lengths") -> tuple[float, str]:
    """Score and version of the model that gave it."""
    tensor = triton.InferInput("text", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[text.encode()]], dtype=np.object_))
    reply = client.infer(model, [tensor], client_timeout=DEADLINE_S)
    assert reply is not None
    scores = reply.as_numpy("rewards")
    assert scores is not None
    return float(scores[0, 0]), reply.get_response().model_version


@contextlib.contextmanager
def callers(url: str, model: str = "lengths", *, threads: int = 4) -> Iterator[list[list[Any]]]:
    """Ask for the score of `abcd` again and again while the context lasts, and once more after it.

    Yields one list a thread: (score, version) of each reply, or the exception.
    """
    stop = threading.Event()
    outcomes: list[list[Any]] = [[] for _ in range(threads)]

    def work(mine: list[Any]) -> None:
        with open_client(url, Access()) as client:
            while not stop.is_set():
                try:
                    mine.append(score(client, "abcd", model))
                except Exception as error:
                    mine.append(error)

    workers = [threading.Thread(target=work, args=(mine,)) for mine in outcomes]
    for worker in workers:
        worker.start()
    try:
        wait_until(lambda: all(outcomes), "the callers got no reply")
        yield outcomes
        before = [len(mine) for mine in outcomes]  # one reply may be on its way, the next is of now
        wait_until(
            lambda: all(len(mine) > count + 1 for mine, count in zip(outcomes, before, strict=True)),
            "the callers got no more replies",
        )
    finally:
        stop.set()
        for worker in workers:
            worker.join(DEADLINE_S)

"""The service as its container starts it, and the task's beside it: entry points, variables and health check
are read from the Dockerfiles. `singularity/prove_service_image.py` takes their other steps too, as root."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from conch.service.protocol import KEY_VARIABLE
from examples.remote.alphabetical import make_start
from singularity.prove_service_image import Image, read_stage
from tests.footprint import wait_until
from tests.launches import LONGEST_S, ROOT, free_port

_STEPS = 2


def stage(name: str) -> Image:
    file = ROOT / ("singularity" if name == "service" else "examples/remote/task") / "Dockerfile"
    return read_stage(file.read_text(encoding="utf-8"), name)


class Containers:
    """Both, with the variables of their images, and what `docker run -e` would say. data: the volume."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.port = free_port()
        self.key = secrets.token_hex(16)
        self.log = data / "service.log"
        data.mkdir()

    def environment(self, image: Image, **told: str) -> dict[str, str]:
        """Nothing of this machine's but what the image's files and its limit of threads stand for."""
        here = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        return {**image.environment, **here, "OMP_NUM_THREADS": "1", KEY_VARIABLE: self.key, **told}

    def service(self, *words: str, **told: str) -> tuple[list[str], dict[str, str]]:
        """Command and environment; /data and its port are of this test, and nobody else reaches it."""
        own = {
            "CONCH_SERVICE_OUTPUT_DIR": str(self.data / "runs"),
            "CONCH_SERVICE_PORT": str(self.port),
            "CONCH_SERVICE_HOST": "127.0.0.1",
        }
        image = stage("service")
        return [*image.entrypoint, *words], self.environment(image, **own, **told)

    def health(self) -> subprocess.CompletedProcess[str]:
        """What the image's health check says."""
        _, environment = self.service()
        return call(stage("service").healthcheck, environment, self.data)


def call(
    command: Sequence[str], environment: Mapping[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )


@pytest.fixture
def containers(tmp_path: Path) -> Containers:
    return Containers(tmp_path / "data")


def test_container_serves_a_task_in_another_and_is_healthy_meanwhile(
    containers: Containers, tmp_path: Path
) -> None:
    start, result = make_start(tmp_path / "start", steps=3), tmp_path / "model.zip"
    assert containers.health().returncode == 1
    command, environment = containers.service(CONCH_SERVICE_MODELS=f'["{start}"]')
    with containers.log.open("w") as log:
        server = subprocess.Popen(command, env=environment, cwd=containers.data, stdout=log, stderr=log)
    try:
        wait_until(lambda: containers.health().returncode == 0, containers.log.read_text, LONGEST_S)
        assert containers.health().stdout == "none\n"
        task = stage("task")
        told = {"SERVICE_URL": f"http://127.0.0.1:{containers.port}", "MODEL": str(start)}
        told |= {"STEPS": str(_STEPS), "RESULT": str(result)}
        done = call(task.entrypoint, containers.environment(task, **told), tmp_path)
        assert done.returncode == 0, done.stderr + containers.log.read_text()
        assert f"is finished; the model of version {_STEPS} is in {result}" in done.stdout
        with zipfile.ZipFile(result) as archive:
            assert "model.safetensors" in archive.namelist()
        assert containers.health().stdout == "finished\n"
        server.send_signal(signal.SIGTERM)  # as `docker stop` does
        assert server.wait(LONGEST_S) == 0
    finally:
        server.kill()
        server.wait(LONGEST_S)
    assert containers.health().returncode == 1


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({KEY_VARIABLE: ""}, f"environment variable {KEY_VARIABLE}, which is to hold the server's secret"),
        ({"CONCH_SERVICE_MODLES": "x"}, "environment variable CONCH_SERVICE_MODLES is no setting: there are"),
        ({"CONCH_SERVICE_MAX_WAITING": "many"}, "max_waiting"),
    ],
)
def test_container_that_cannot_start_says_why_in_a_sentence(
    containers: Containers, told: dict[str, str], words: str
) -> None:
    command, environment = containers.service(**told)
    done = call(command, environment, containers.data)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and words in done.stderr
    assert "Traceback" not in done.stderr

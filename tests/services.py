"""Training services in a process of their own, and a client that speaks plain HTTP to them."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import torch
from safetensors.torch import load as load_tensors

from conch.service.protocol import KEY_HEADER, KEY_VARIABLE, TrainingSettings
from tests.footprint import wait_until
from tests.forks import quick_python
from tests.launches import ROOT, free_port, kill_all
from tests.runs import TOKENIZER, policy

KEY = "key-of-a-test"
START_S = 120.0
_CPU = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}


def tiny_model(folder: Path) -> Path:
    """A folder with the random policy of `tests.runs` and its tokenizer of eight letters."""
    policy().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def tiny_settings(model: Path, **changes: Any) -> TrainingSettings:
    """A run of four updates on two groups of four completions of up to five tokens each."""
    values: dict[str, Any] = {
        "model_id": str(model),
        "max_completion_length": 5,
        "num_completions_per_prompt": 4,
        "training_batch_size": 2,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "overrides": {"model": {"dtype": "float64"}, "grpo": {"kl": {"coef": 0.0}}},
    }
    return TrainingSettings(**{**values, **changes})


class Service:
    """A running service. url: without a slash at the end.

    launcher: command line of what starts several processes, up to the program; none for a service of one.
    forks: whether forks of `tests.forks` stand in for the launcher and what it starts.
    """

    def __init__(
        self, output_dir: Path, *, launcher: Sequence[str] = (), forks: bool = True, **settings: Any
    ) -> None:
        self.launcher = [quick_python() if forks and word == sys.executable else word for word in launcher]
        self.environment = {"PYTHON_EXEC": quick_python()} if launcher and forks else {}
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.output_dir = output_dir
        self.settings = settings if launcher else {"restart": "false", **settings}
        self.log = output_dir.with_name(f"{output_dir.name}.log")
        self.start()

    def start(self) -> None:
        """Start it, on what is there."""
        given = {"output_dir": self.output_dir, "port": self.port, **self.settings}
        words = [f"--{key}={value}" for key, value in given.items()]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*(self.launcher or [sys.executable]), "-m", "conch.service", *words],
                cwd=ROOT,
                env={**os.environ, KEY_VARIABLE: KEY, **_CPU, **self.environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        wait_until(self._answers, lambda: self.log.read_text()[-3000:], START_S)

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        try:
            return self.ask("GET", "/status").status_code == httpx2.codes.OK
        except httpx2.TransportError:
            return False

    def ask(self, method: str, path: str, **settings: Any) -> httpx2.Response:
        """The answer to a request with the key, sent once."""
        headers = {KEY_HEADER: KEY, **settings.pop("headers", {})}
        with httpx2.Client(trust_env=False, timeout=60) as client:
            return client.request(method, self.url + path, headers=headers, **settings)

    def post(self, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON of the answer to a POST."""
        reply = self.ask("POST", path, json=body)
        return reply.status_code, reply.json()

    def status(self) -> dict[str, Any]:
        """The answer of `/status`."""
        return self.ask("GET", "/status").json()

    def wait_for(self, state: str) -> dict[str, Any]:
        """The status once the run is in this state."""
        wait_until(lambda: self.status()["state"] == state, lambda: f"{self.status()}", START_S)
        return self.status()

    def kill(self) -> None:
        """End it as a lack of memory would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    def terminate(self) -> int:
        """Ask it to end; returns its exit code."""
        self.process.terminate()
        return self.process.wait(START_S)


@contextmanager
def service(output_dir: Path, **settings: Any) -> Iterator[Service]:
    """A service that is gone afterwards, with all of its processes."""
    running = Service(output_dir, **settings)
    try:
        yield running
    finally:
        kill_all(running.process)  # pyright: ignore[reportArgumentType]


def vowel_rewards(outputs: list[str]) -> list[float]:
    """How many of `a` and `e` each output has."""
    return [float(sum(letter in "ae" for letter in output)) for output in outputs]


def weights_in(archive: bytes) -> dict[str, torch.Tensor]:
    """The weights of a downloaded model."""
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        return load_tensors(files.read("model.safetensors"))

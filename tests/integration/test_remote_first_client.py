"""The two terminals of the first service of this kind: its command line, and a client written for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from conch.service.protocol import KEY_VARIABLE
from examples.remote.alphabetical import make_start
from tests.footprint import wait_until
from tests.launches import LONGEST_S, ROOT, free_port
from tests.services import tiny_model

EXAMPLE = ROOT / "examples" / "remote"
_STEPS = 5


@dataclass(frozen=True)
class FirstTerminal:
    """A service as its command line was typed, on a port of its own. log: file of what it says."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def client(self, *command: str | Path, folder: Path) -> str:
        """What the second terminal prints. folder: where it is typed."""
        done = subprocess.run(
            [sys.executable, *command],
            cwd=folder,
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr + self.log.read_text()
        return done.stdout


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[FirstTerminal]:
    port, log = free_port(), tmp_path / "service.log"
    typed = ["-m", "grpo_server.uvicorn_main", "--api_key=default_key", "--output_dir"]
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, *typed, str(tmp_path / "output1")],
            cwd=EXAMPLE,
            # The command line says no port; the one that it stands for may be in use here.
            env={**_environment(), "CONCH_SERVICE_PORT": str(port)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: server.poll() is not None or _listens(url), log.read_text, LONGEST_S)
        yield FirstTerminal(url, server, log)
        server.terminate()
        assert server.wait(LONGEST_S) == 0
    finally:
        server.kill()
        server.wait(LONGEST_S)


def test_both_terminals_work_as_they_were_typed(terminal: FirstTerminal, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    client = ["-m", "tests.integration.first_client", terminal.url, "default_key", model, str(_STEPS)]
    said = json.loads(terminal.client(*client, folder=ROOT))
    assert said["before"]["training_settings"] is None
    assert said["started"]["status"] == "started"
    run_ids, numbers = zip(*said["versions"], strict=True)
    assert len({*run_ids}) == 1 and max(numbers) == _STEPS
    # Replies to rewards count the updates, and completions are of younger and younger models.
    assert {*numbers[1::2]} == {1, 2, 3, 4, 5} and len({*numbers[::2]}) > 2
    assert said["status"]["training_settings"]["max_steps"] == _STEPS
    assert _STEPS <= said["status"]["reward_requests_served"] <= said["status"]["completion_requests_served"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {*said["files"]}


@pytest.mark.slow
def test_example_trains_in_its_second_terminal(terminal: FirstTerminal, tmp_path: Path) -> None:
    start = make_start(tmp_path / "start", steps=3)
    # As typed, but for what would be trained for minutes, and written into the checkout.
    less = ["--url", terminal.url, "--model", start, "--steps", "2"]
    told = terminal.client("examples/alphabetical.py", *less, folder=EXAMPLE).splitlines()
    assert [line.partition(":")[0] for line in told] == ["exact at the start", "exact at the end"]
    [run] = (tmp_path / "output1" / "runs").iterdir()
    said = json.loads((run / "run.json").read_text())
    assert (said["state"], said["version"]) == ("finished", 2)


def _environment() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    return {**own, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _listens(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/status", headers={"api-key": "default_key"}, trust_env=False).is_success
    except httpx2.TransportError:
        return False

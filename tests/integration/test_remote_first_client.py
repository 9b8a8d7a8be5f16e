"""The two terminals of the first service of this kind: its command line, and a client written for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx2

from conch.service.protocol import KEY_VARIABLE
from tests.footprint import wait_until
from tests.launches import LONGEST_S, ROOT, free_port
from tests.services import tiny_model

_STEPS = 5


def test_both_terminals_work_as_they_were_typed(tmp_path: Path) -> None:
    model, port, log = tiny_model(tmp_path / "model"), free_port(), tmp_path / "service.log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop(KEY_VARIABLE, None)
    typed = ["-m", "grpo_server.uvicorn_main", "--api_key=default_key", "--output_dir"]
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, *typed, str(tmp_path / "output1")],
            cwd=ROOT / "examples" / "remote",
            # The command line says no port; the one that it stands for may be in use here.
            env={**environment, "CONCH_SERVICE_PORT": str(port)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: server.poll() is not None or _listens(url), log.read_text, LONGEST_S)
        client = [sys.executable, "-m", "tests.integration.first_client", url, "default_key", str(model)]
        done = subprocess.run(
            [*client, str(_STEPS)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr + log.read_text()
        said = json.loads(done.stdout)
        server.terminate()
        assert server.wait(LONGEST_S) == 0
    finally:
        server.kill()
        server.wait(LONGEST_S)
    assert said["before"]["training_settings"] is None
    assert said["started"]["status"] == "started"
    run_ids, numbers = zip(*said["versions"], strict=True)
    assert len({*run_ids}) == 1 and max(numbers) == _STEPS
    # Replies to rewards count the updates, and completions are of younger and younger models.
    assert {*numbers[1::2]} == {1, 2, 3, 4, 5} and len({*numbers[::2]}) > 2
    assert said["status"]["training_settings"]["max_steps"] == _STEPS
    assert _STEPS <= said["status"]["reward_requests_served"] <= said["status"]["completion_requests_served"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {*said["files"]}


def _listens(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/status", headers={"api-key": "default_key"}, trust_env=False).is_success
    except httpx2.TransportError:
        return False

"""The example of remote training, as its two terminals run it: a service and a client, a process each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conch.service.protocol import KEY_VARIABLE
from examples.remote.alphabetical import make_start
from tests.launches import ROOT
from tests.services import KEY, service

LONGEST_S = 900


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("start") / "model")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_model_learns_to_sort_from_a_client_in_another_process(
    start: Path, tmp_path: Path, seed: int
) -> None:
    command = [sys.executable, "-m", "examples.remote.alphabetical", "--model", start, "--seed", str(seed)]
    with service(tmp_path / "runs") as running:
        client = subprocess.run(
            [*command, "--url", running.url],
            cwd=ROOT,
            env={**os.environ, KEY_VARIABLE: KEY},
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
        )
    assert client.returncode == 0, client.stderr[-3000:]
    shares = dict(line.rsplit(": ", 1) for line in client.stdout.splitlines() if line.startswith("exact"))
    assert float(shares["exact at the start"]) <= 0.3
    assert float(shares["exact at the end"]) >= 0.9

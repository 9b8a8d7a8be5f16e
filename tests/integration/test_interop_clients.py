"""verl and OpenRLHF load and call reward functions of Conch's by their own code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.peers import install

ROOT = Path(__file__).resolve().parents[2]
PEERS = ("verl==0.9.1", "openrlhf==0.11.2")

pytestmark = pytest.mark.slow


def test_their_own_code_loads_and_calls_the_functions(tmp_path: Path) -> None:
    packages, out = tmp_path / "packages", tmp_path / "out.json"
    install(PEERS, "--no-deps", "--target", packages)
    done = subprocess.run(
        [sys.executable, ROOT / "tests/integration/interop_clients.py", packages, out],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(out.read_text())
    # "2+2=four" has 8 letters, and the answer is right.
    is_async, scored = found["verl"]
    assert is_async is True and scored["reward_score"] == 9.0
    assert found["openrlhf"] == {"reward": 5.0, "scores": 5.0, "extra_logs": {}}

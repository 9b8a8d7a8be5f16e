"""OpenRLHF's and verl's own client code, from PyPI, against a reward server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.peers import install
from tests.reward_servers import Lengths, served

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("openrlhf==0.11.2", "verl==0.9.1")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both packages, without what they depend on."""
    folder = tmp_path_factory.mktemp("clients")
    install(PACKAGES, "--no-deps", "--target", folder)
    return folder


def test_their_clients_read_rewards_and_take_no_failure_for_a_number(packages: Path, tmp_path: Path) -> None:
    source, out = Lengths(), tmp_path / "told.json"
    with served(source, label_key="answer") as server:
        program = ROOT / "tests/integration/front_clients.py"
        command = [sys.executable, program, packages, server.url.removeprefix("http://"), out]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr
        metrics = server.ask("GET", "/metrics").text.splitlines()
    told: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    assert told["openrlhf"]["good"] == {"reward": [8.0], "scores": [8.0], "experience": [8.0]}, told[
        "openrlhf"
    ]
    first = source.asked[0][0]
    assert (first.prompt.text, first.completion.text) == ("2+2=", "2+2=four")
    assert first.prompt.metadata == {"answer": "4"}
    for case in ("invalid", "down", "late"):
        assert told["openrlhf"][case] == {"reward": None, "scores": None, "experience": None}
    for name in ("verl", "verl with sglang"):
        assert told[name]["good"] == {"reward_score": 8.0}, told[name]
        # It gives up at once where asking again is useless, and asks 16 times where it may help.
        assert [told[name][case] for case in ("invalid", "down", "late")] == [
            "ClientResponseError 422",
            "ClientResponseError 503",
            "ClientResponseError 504",
        ]
    for form, counts in {
        "openrlhf": {"200": 1, "422": 5, "503": 5, "504": 5},
        "classify": {"200": 1, "422": 1, "503": 16, "504": 16},
        "embeddings": {"200": 1, "422": 1, "503": 16, "504": 16},
    }.items():
        for code, count in counts.items():
            assert f'conch_reward_requests_total{{code="{code}",form="{form}"}} {float(count)}' in metrics

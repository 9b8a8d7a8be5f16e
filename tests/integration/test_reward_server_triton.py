"""`python -m conch.reward_server` before the real Triton: other trainers get the numbers that we get."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from conch.rewards.score import score
from conch.serving.server.server import TritonServer
from tests.footprint import wait_until
from tests.integration.conftest import TEXT_MODEL
from tests.launches import free_port

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["abc", "abcabc", "b", "cabbacab", "a"]
LONGEST_S = 300

pytestmark = pytest.mark.slow


def test_wire_forms_tell_what_score_tells_of_a_model_on_triton(
    reward_server: TritonServer, tmp_path: Path
) -> None:
    model = reward_server.endpoint(TEXT_MODEL)
    results = score([{"text": text} for text in TEXTS], model)
    expected = [next(iter(result.scores.values())) for result in results]
    assert len({round(value, 3) for value in expected}) == len(TEXTS)
    port, log = free_port(), tmp_path / "stderr"
    command = [sys.executable, "-m", "conch.reward_server", "--reward", model, "--port", str(port)]
    with log.open("w") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, stderr=stderr)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:

            def is_ready() -> bool:
                try:
                    return client.get("/ready").is_success
                except httpx2.TransportError:
                    return False

            wait_until(lambda: is_ready() or process.poll() is not None, log.read_text, LONGEST_S)
            blanks = [""] * len(TEXTS)
            query = {"query": TEXTS, "prompts": blanks, "labels": blanks}
            rewards = client.post("/get_reward", json=query).raise_for_status().json()["rewards"]
            classes = client.post("/classify", json={"model": TEXT_MODEL, "input": TEXTS})
            probs = [entry["probs"] for entry in classes.raise_for_status().json()["data"]]
            # As verl sends it, one at a time.
            alone = client.post("/classify", json={"model": TEXT_MODEL, "input": TEXTS[1]}).json()
    finally:
        process.kill()
        process.wait()
    assert rewards == pytest.approx(expected, abs=1e-5)
    assert [each for (each,) in probs] == pytest.approx(expected, abs=1e-5)
    assert alone["data"][0]["probs"] == pytest.approx([expected[1]], abs=1e-5)

"""The bundled server beside vLLM's numpy 2: its models run in what `conch serve install` makes."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2ForSequenceClassification

import conch
from conch.converters.to_triton import to_triton
from conch.errors import ServerStartError
from conch.serving.server.runtime import find_bundle
from conch.serving.server.server import TritonServer
from tests.tiny import reward_checkpoint


def serve(*words: str) -> subprocess.CompletedProcess[str]:
    """`conch serve`, as it is typed."""
    command = [sys.executable, "-m", "conch", "serve", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ, check=False)


def test_models_of_the_bundled_server_run_in_an_environment_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert version("numpy").startswith("2"), "vLLM's environment has numpy 2"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    with pytest.raises(ServerStartError, match="`conch serve install`"):
        find_bundle()
    done = serve("install")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nvidia-pytriton==0.7.0 and numpy<2" in done.stdout

    checkpoint = reward_checkpoint(tmp_path / "checkpoint", reward_model={"max_length": 12})
    to_triton(checkpoint, name="letters", model_store=tmp_path / "store")
    texts = ["abc", "defg", "hhh"]
    with TritonServer(tmp_path / "store", ["letters"], ready_timeout_s=120.0) as server:
        results = conch.score(
            [{"prompt": "", "completion": text} for text in texts], server.endpoint("letters")
        )
    reward_model = GPT2ForSequenceClassification.from_pretrained(checkpoint).eval()
    letters = AutoTokenizer.from_pretrained(checkpoint)
    with torch.inference_mode():
        expected = [
            reward_model(torch.tensor([[*letters(text)["input_ids"], letters.eos_token_id]])).logits.item()
            for text in texts
        ]
    assert [result.scores["reward"] for result in results] == pytest.approx(expected, abs=1e-4)

"""The document's asynchronous command, as it is typed, with vLLM in the actors of Ray that sample."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.integration.grpo_runs import (
    EACH,
    FOLDER,
    LIMITS,
    PROBLEMS,
    check_outputs,
    finish,
    metrics_of,
    only_run,
    start,
    write_inputs,
    write_model,
)


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Where Ray and the programs put what they need while they run; sockets want a short path."""
    with tempfile.TemporaryDirectory(prefix="grpo-", dir="/tmp") as folder:
        yield Path(folder)


def test_command_of_the_document_samples_with_vllm(tmp_path: Path, scratch: Path) -> None:
    write_inputs(tmp_path)
    write_model(tmp_path / "policy", width=64)  # heads of 32, which vLLM has a kernel for
    words = (
        *(*EACH, PROBLEMS, *LIMITS, "train.dialog_turns_per_batch=4", "model.name=policy"),
        *("inference_model.backend=vllm", "reward.gsm8k.extractor=flexible"),
        *("conch.rollout.kv_cache_memory_bytes=50MiB", "inference_model.max_model_len=1024"),
    )
    environment = {"VLLM_USE_V1": "0", "TMPDIR": str(scratch)}
    shown = finish(start(tmp_path, *words, program=(str(FOLDER / "grpo-async.py"),), **environment))
    assert "sampling      simulated devices 2, 3" in shown
    assert not list(scratch.iterdir())
    run = only_run(tmp_path)
    check_outputs(run, overlaps=True)
    lines = metrics_of(run)
    assert lines[0]["rollout/logprob_diff"] < 1e-3, "vLLM sampled from other weights than are trained"
    assert lines[0]["staleness/max"] == 0 and lines[1]["staleness/max"] <= 1
    settings = yaml.safe_load((run / "config.yaml").read_text())["rollout"]
    assert (settings["engine"], settings["ray"]["engine"], settings["ray"]["samplers"]) == ("ray", "vllm", 2)

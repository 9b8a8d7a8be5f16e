"""What the sizing helper says, against the memory that real steps take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from conch.sizing.estimate import sizes
from conch.sizing.options import Setup
from tests.launches import LONGEST_S, ROOT

VOCABULARY = {"vocab_size": 6000, "pad_token_id": 8, "eos_token_id": 9, "bos_token_id": None}
GPT2 = {"model_type": "gpt2", "n_layer": 6, "n_embd": 256, "n_head": 4, "n_positions": 128, **VOCABULARY}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 700,
    "max_position_embeddings": 128,
    **VOCABULARY,
}
CHECKPOINTED = {"gradient_checkpointing": True}
SIZE = {"rows": 16, "prompt_length": 64, "response_length": 32, "generation_rows": 32}


def measured(folder: Path, kind: str, architecture: dict[str, Any], model: dict[str, Any]) -> dict[str, int]:
    """In a process of its own, whose allocator gives large blocks back at once."""
    arguments = [kind, str(folder / "run"), *(json.dumps(part) for part in (architecture, SIZE, model))]
    run = subprocess.run(
        [sys.executable, "-m", "tests.integration.sizing_run", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("kind", "architecture", "model"),
    [
        pytest.param("ppo", GPT2, {}, id="ppo with a full reference"),
        pytest.param("sft", LLAMA, {}, id="sft of a llama", marks=pytest.mark.slow),
        pytest.param("sft", GPT2, CHECKPOINTED, id="checkpointing", marks=pytest.mark.slow),
        pytest.param("ppo", LLAMA, {"num_layers_unfrozen": 2}, id="ppo with a trunk", marks=pytest.mark.slow),
    ],
)
def test_the_peak_is_what_was_measured(
    tmp_path: Path, kind: str, architecture: dict[str, Any], model: dict[str, Any]
) -> None:
    found = measured(tmp_path, kind, architecture, model)
    reference: dict[str, Any] = {} if kind == "ppo" else {"reference": "none"}
    setup = Setup(precision="float32", zero_stage=0, **SIZE, **model, **reference)
    expected = sizes(AutoConfig.for_model(**architecture), setup)
    assert expected.weights == found["parameters"]
    assert expected.peak == pytest.approx(found["peak"], rel=0.2), expected

"""The randomwalks example learns: imitating the best walks of its own makes the policy's walks short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.randomwalks.sft_start import sft_folder
from tests.integration.example_runs import run_example

QUICK = ("train.total_steps=4", "train.eval_every=4", "rft.n_generations_per_prompt=50", "train.seed=0")


@pytest.mark.slow
def test_walks_become_short(walks_output: Path, tmp_path: Path) -> None:
    places = (f"train.output_dir={walks_output}", f"train.run_dir={tmp_path / 'run'}")
    found = run_example("rft_randomwalks", *places, *QUICK)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert 0.2 < rows[0]["eval/optimality"] < 0.45  # the SFT policy
    assert found["eval/optimality"] > 0.7
    # The start is kept for the next run.
    assert (sft_folder(walks_output) / "model.safetensors").is_file()

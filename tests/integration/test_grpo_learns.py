"""The randomwalks example learns: GRPO with the exact reward finds shortest walks, without values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.example_runs import run_example


@pytest.mark.slow
def test_three_seeds_find_the_shortest_walks(walks_output: Path, tmp_path: Path) -> None:
    found = [
        run_example(
            "grpo_randomwalks",
            f"train.output_dir={walks_output}",
            f"train.run_dir={tmp_path / str(seed)}",
            f"train.seed={seed}",
        )
        for seed in range(3)
    ]
    sampled = [run["eval/optimality"] for run in found]
    assert sum(sampled) / 3 >= 0.95 and min(sampled) >= 0.93
    rows = [json.loads(line) for line in (tmp_path / "0/metrics.jsonl").read_text().splitlines()]
    assert 0.2 < rows[0]["eval/optimality"] < 0.45  # the SFT policy
    assert rows[1]["policy/kl"] == 0.0
    assert all(abs(row["train/ratio_first"] - 1) < 1e-4 for row in rows[1:])

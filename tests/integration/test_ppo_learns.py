"""The randomwalks example learns: PPO with the exact reward finds shortest walks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.example_runs import assert_shortest_walks, run_example


def ppo(walks_output: Path, run_dir: Path, *overrides: str) -> dict[str, float]:
    return run_example(
        "ppo_randomwalks", f"train.output_dir={walks_output}", f"train.run_dir={run_dir}", *overrides
    )


@pytest.mark.slow
def test_walks_become_short(walks_output: Path, tmp_path: Path) -> None:
    quick = ("train.total_steps=8", "train.eval_every=8", "train.eval_repeats=20", "train.seed=0")
    found = ppo(walks_output, tmp_path / "run", *quick)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert 0.2 < rows[0]["eval/optimality"] < 0.45  # the SFT policy
    assert found["eval/optimality"] > 0.8
    assert found["eval/optimality@do_sample=false"] > found["eval/optimality"]
    # The first minibatch of each step is on the policy that sampled it, and the KL starts at 0.
    assert rows[1]["policy/kl"] == 0.0
    assert all(abs(row["train/ratio_first"] - 1) < 1e-4 for row in rows[1:])


@pytest.mark.slow
def test_three_seeds_find_the_shortest_walks(walks_output: Path, tmp_path: Path) -> None:
    assert_shortest_walks(
        [ppo(walks_output, tmp_path / str(seed), f"train.seed={seed}") for seed in range(3)]
    )

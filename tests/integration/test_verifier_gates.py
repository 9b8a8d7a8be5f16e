"""The learning gates as a user runs them: from nothing to right answers by a verifier's reward alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONGEST_S = 3600


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("gate", "at_most", "at_least"), [("gsm8k", 0.35, 0.80), ("ifeval", 0.40, 0.85)])
def test_policy_learns_from_the_verifier(
    gate: str, at_most: float, at_least: float, seed: int, tmp_path: Path
) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-m", "examples.grpo.learning_gate", gate),
            *(f"train.seed={seed}", f"train.run_dir={tmp_path / 'run'}"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["gate"] == gate and summary["seed"] == seed
    start, *between, end = summary["sampled"].values()
    assert 0.1 < start <= at_most and end >= at_least and between
    rows = [json.loads(line) for line in (tmp_path / "run/grpo/metrics.jsonl").read_text().splitlines()]
    # What is learned from is the verifier's score, and it climbs as the held-out figure does.
    rewards = [row["reward/mean"] for row in rows if "reward/mean" in row]
    assert rewards[0] <= at_most + 0.1 and rewards[-1] >= at_least - 0.1


@pytest.mark.slow
def test_gate_that_is_missed_leaves_with_1(tmp_path: Path) -> None:
    overrides = ("train.total_steps=1", "train.eval_every=1", f"train.run_dir={tmp_path / 'run'}")
    result = subprocess.run(
        [sys.executable, "-m", "examples.grpo.learning_gate", "gsm8k", *overrides],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    assert result.returncode == 1 and "the gate is missed" in result.stderr, result.stderr


def test_gate_without_a_name_says_which_there_are() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "examples.grpo.learning_gate", "train.seed=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: name a gate before the overrides: gsm8k or ifeval")

"""The learning gates as a user runs them: from nothing to right answers by a verifier's reward alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONGEST_S = 3600


def run_gate(folder: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """What the command printed, and its summary."""
    command = [sys.executable, "-m", "examples.grpo.learning_gate", *words, f"train.run_dir={folder / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST_S, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done, json.loads((folder / "run/summary.json").read_text())


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Metrics of the run's GRPO."""
    return [json.loads(line) for line in (folder / "run/grpo/metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("gate", "at_most", "at_least"), [("gsm8k", 0.35, 0.80), ("ifeval", 0.40, 0.85)])
def test_policy_learns_from_the_verifier(
    gate: str, at_most: float, at_least: float, seed: int, tmp_path: Path
) -> None:
    done, summary = run_gate(tmp_path, gate, f"train.seed={seed}")
    assert done.returncode == 0, done.stderr
    assert summary["gate"] == gate and summary["seed"] == seed
    start, *between, end = summary["sampled"].values()
    assert 0.1 < start <= at_most and end >= at_least and between
    # What is learned from is the verifier's score, and it climbs as the held-out figure does.
    rewards = [row["reward/mean"] for row in rows_of(tmp_path) if "reward/mean" in row]
    assert rewards[0] <= at_most + 0.1 and rewards[-1] >= at_least - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [1, 2, 4])
def test_policy_learns_from_samples_that_are_old(staleness: int, tmp_path: Path) -> None:
    done, summary = run_gate(tmp_path, "gsm8k", "--async", f"asynchronous.max_staleness={staleness}")
    assert done.returncode == 0, done.stderr
    start, *_, end = summary["sampled"].values()
    assert 0.1 < start <= 0.35 and end >= 0.80
    assert max(row.get("staleness/max", 0) for row in rows_of(tmp_path)) == staleness


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "low", "high"), [("truncate", 0.6, 1.0), ("none", 0.0, 0.3)])
def test_large_steps_on_old_samples_learn_with_the_correction_alone(
    kind: str, low: float, high: float, tmp_path: Path
) -> None:
    words = (f"grpo.correction.kind={kind}", "optimizer.learning_rate=1.5e-3", "train.total_steps=60")
    _, summary = run_gate(tmp_path, "gsm8k", "--async", "asynchronous.max_staleness=4", *words)
    start, *_, end = summary["sampled"].values()
    assert low <= end <= high and (end > start) == (kind == "truncate")


@pytest.mark.slow
def test_gate_that_is_missed_leaves_with_1(tmp_path: Path) -> None:
    done, _ = run_gate(tmp_path, "gsm8k", "train.total_steps=1", "train.eval_every=1")
    assert done.returncode == 1 and "the gate is missed" in done.stderr, done.stderr


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

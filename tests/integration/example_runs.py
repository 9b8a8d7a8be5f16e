"""Run an example as a user does, and read what it prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LONGEST_S = 400


def run_example(name: str, *overrides: str) -> dict[str, float]:
    """`python -m examples.randomwalks.<name> overrides...`; returns the metrics of its last lines."""
    result = subprocess.run(
        [sys.executable, "-m", f"examples.randomwalks.{name}", *overrides],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return {
        found: float(value) for found, value in re.findall(r"^(eval/\S+)\s+([\d.]+)$", result.stdout, re.M)
    }


def assert_shortest_walks(runs: Sequence[dict[str, float]]) -> None:
    """The gates of PPO with exact optimality as its reward, over what several seeds came to."""
    sampled = [run["eval/optimality"] for run in runs]
    assert sum(sampled) / len(runs) >= 0.97 and min(sampled) >= 0.94
    assert min(run["eval/optimality@do_sample=false"] for run in runs) >= 0.99

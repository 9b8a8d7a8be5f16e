"""The quickstart as a user runs it, whole."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONGEST_S = 900


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_quickstart_reaches_its_gate_and_reports_it(seed: int, tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-m", "examples.randomwalks.quickstart", f"seed={seed}"),
            *(f"output_dir={tmp_path / 'outputs'}", f"model_store={tmp_path / 'store'}"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    run_dir = Path(re.findall(r"^run folder  (.+)$", result.stdout, re.M)[0])
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["seed"] == seed
    assert summary["gold_optimality_before"] < 0.4 and summary["gold_optimality_after"] >= 0.9
    assert summary["served_reward_before"] < 0.4 and summary["served_reward_after"] >= 0.9
    assert 0 < summary["kl"] < 10
    assert set(summary["phase_seconds"]) > {"sft", "reward_model", "to_triton", "server_start", "ppo"}
    plots = re.findall(r"^plot        (.+)$", result.stdout, re.M)
    assert plots and all(Path(plot).read_bytes().startswith(b"\x89PNG") for plot in plots)
    assert len(re.findall(r"^  \S+\s+-> \S+$", result.stdout, re.M)) == 5

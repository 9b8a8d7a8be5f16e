"""The benchmark of rewards runs small, from dialogues to its tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WAYS = [
    ("in process, best batching", 1),
    ("Conch", 1),
    ("Conch", 2),
    ("sequential, batches of 24", 1),
    ("sequential, batches of 24, padding told by a mask", 1),
    ("one sample a POST", 1),
    ("one sample a POST", 2),
    ("one sample a POST, to Conch's reward server", 1),
    ("one sample a POST, to Conch's reward server", 2),
]


@pytest.mark.slow
def test_benchmark_compares_all_ways_and_ppo_steps(tmp_path: Path) -> None:
    turn = "\n\nHuman: How are you?\n\nAssistant: Well, thank you."
    pairs = [{"chosen": turn * (1 + n), "rejected": turn * (1 + n) + " And you?"} for n in range(32)]
    data, report_file = tmp_path / "data.jsonl", tmp_path / "report.json"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    core = str(min(os.sched_getaffinity(0)))
    size = ["--samples", "64", "--layers", "1", "--width", "64", "--callers", "1", "2", "--rounds", "2"]
    ppo = ["--steps", "1", "--ppo-rounds", "1"]
    cores = ["--server-core", core, "--client-core", core]
    command = [sys.executable, "-m", "benchmarks.rewards", "--data", str(data), *size, *ppo, *cores]
    done = subprocess.run(
        [*command, "--json", str(report_file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(report_file.read_text())
    assert [(row["way"], row["callers"]) for row in report["results"]] == WAYS
    rates = {(row["way"], row["callers"]): row["rates"] for row in report["results"]}
    over_post = report["results"][2]["over"]["one sample a POST, 2 callers"]
    assert over_post["low"] <= rates["Conch", 2]["high"] / rates["one sample a POST", 2]["low"]
    assert 0 <= report["ppo"]["hidden_fraction"] <= 1
    for way, callers in WAYS:
        assert f"| {way} | {callers} | " in done.stdout

"""The benchmarks of rollouts and steps run small, in all their processes, to their tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_small(module: str, folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Report and table."""
    report = folder / "report.json"
    command = [sys.executable, "-m", module, "--small", "--threads", "1", "--json", str(report), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(report.read_text()), done.stdout


@pytest.mark.slow
def test_rollouts_of_both_sides_are_compared(tmp_path: Path) -> None:
    report, table = run_small("benchmarks.rollout", tmp_path, "--rounds", "2")
    assert [each["case"] for each in report["results"]] == ["randomwalks", "synthetic lengths"]
    for each in report["results"]:
        assert list(each["sides"]) == ["Conch", "transformers.generate"]
        assert all(side["peak_bytes"] > 0 for side in each["sides"].values())
        low, high = (each["sides"][name]["tokens_per_s"] for name in each["sides"])
        assert each["ratio"]["low"] <= low["high"] / high["low"]
        assert f"| {each['case']} | {each['rows']}, 4 | {each['response_tokens']} | Conch | " in table


@pytest.mark.slow
def test_ppo_steps_and_references_are_measured(tmp_path: Path) -> None:
    report, table = run_small("benchmarks.ppo_step", tmp_path, "--steps", "1", "--warm-up", "0")
    for what in ("walks-20", "walks-140", "dialogues"):
        assert 0 < report[what]["seconds"]["update"]["median"] < report[what]["seconds"]["step"]["median"]
    assert 0 < report["shared_over_full"]["weight_bytes"] < 1
    assert report["step_over_trlx"] == pytest.approx(report["walks-20"]["seconds"]["step"]["median"] / 1.6)
    assert "| trlX, randomwalks, batches of 20 | 1.6 | 0.35 |  | 0.34 |  | 0.92 | 745 |" in table


@pytest.mark.slow
def test_steps_by_a_service_and_in_one_process_are_compared(tmp_path: Path) -> None:
    report, table = run_small("benchmarks.remote_step", tmp_path, "--rounds", "2", "--warm-up", "1")
    [case] = report["results"]
    assert list(case["seconds"]) == ["service", "one process"] and case["tokens"] == 2 * 2 * 4
    assert 0 < case["ratio"]["low"] <= case["ratio"]["median"]
    assert f"| {case['case']} | 4, 16 | " in table


@pytest.mark.slow
def test_steps_beside_other_programs_are_measured(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    words = ["--ways", "conch", "libgomp", "--others", "1", "--steps", "1", "--rounds", "1", "--json"]
    command = [sys.executable, "-m", "benchmarks.busy", *words, str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=500, check=True)
    seconds = json.loads(report.read_text())["seconds"]
    assert all(seconds[way][when][0] > 0 for way in ("conch", "libgomp") for when in ("alone", "busy"))
    assert b"| libgomp | " in done.stdout


@pytest.mark.slow
def test_stops_for_checkpoints_are_measured_both_ways(tmp_path: Path) -> None:
    report, table = run_small("benchmarks.checkpointing", tmp_path)
    assert [each["ranks"] for each in report["results"]] == [1, 2]
    for each in report["results"]:
        assert all(each["ways"][way]["stop"]["low"] > 0 for way in ("waited for", "beside training"))
        assert each["bytes"] > 500_000
    assert "| 2 | " in table and "2 rank(s): beside training the stop is " in table


@pytest.mark.slow
def test_growth_is_measured_beside_its_arithmetic(tmp_path: Path) -> None:
    report, table = run_small(
        "benchmarks.growth", tmp_path, "--steps", "1", "--picture", f"{tmp_path}/growth.png"
    )
    base, larger, longer = report["results"]
    assert larger["weights"] > 5 * base["weights"] and longer["length"] == 2 * base["length"]
    for each in report["results"]:
        assert all(each[kind]["step_s"] > 0 and each[kind]["gflop"] > 0 for kind in ("sft", "grpo"))
        assert each["sft"]["checkpoint_bytes"] > 16 * each["weights"] > 0
    assert len(table.splitlines()) == 2 + 3
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")

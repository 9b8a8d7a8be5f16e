"""The GPU suite runs small on a CPU: every check and every step of both sides, to its report."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from benchmarks.gpu.cases import ALGORITHMS, SHAPES
from tests.forks import quick_python

ROOT = Path(__file__).resolve().parents[2]
DTYPES = ("float64", "float32", "bfloat16")


def test_all_of_it_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [
        quick_python(),
        "-m",
        "benchmarks.gpu_suite",
        "--small",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    report, table = (
        json.loads((tmp_path / "gpu_suite.json").read_text()),
        (tmp_path / "gpu_suite.md").read_text(),
    )
    assert done.stdout == table + "\n" and report["complete"] and not report["left_out"]
    assert report["card"]["name"] == "cpu" and "MFU is left out" in table

    lines = {line["name"]: line for found in report["checks"].values() for line in found["lines"]}
    passed = {name for name, line in lines.items() if line["result"] == "passed"}
    families = [(family, dtype) for family in ("gpt2", "llama") for dtype in DTYPES]
    assert passed >= {
        *(f"slots, {family}, {dtype}" for family, dtype in families),
        *(f"packing, {family}, {of}, {dtype}" for family, dtype in families for of in ("RL", "SFT")),
        *("bf16, gradient", "bf16, a GRPO step"),
    }
    assert {lines[name]["result"] for name in lines.keys() - passed} <= {
        "not installed",
        "not on this device",
    }
    assert lines["fp16"]["result"] == "not on this device"
    assert all(lines[f"slots, {family}, float64"]["figures"]["tokens"] > 50 for family in ("gpt2", "llama"))

    for shape in SHAPES:
        for algorithm in ALGORITHMS:
            ours, plain = (report["speed"][f"{side}-{algorithm}-{shape}"] for side in ("conch", "plain"))
            for key in ("tokens", "rows", "needed_flops", "parameters"):
                assert ours[key] == plain[key] > 0
            for found in (ours, plain):
                assert found["tokens_per_s"] > 0 and found["peak_bytes"] > 0 and found["steps"] > 0
                names = (
                    ["batch", "update"]
                    if algorithm == "sft"
                    else ["rollout", "passes", "rewards and batch", "update"]
                )
                assert list(found["phases"]) == names
                assert all(0 < each["idle_share"] < 1 and each["top"] for each in found["phases"].values())
                assert 0 < found["profiled"]["busy_s"] < found["profiled"]["seconds"]
            assert f"| {shape} | {algorithm} | conch | " in table

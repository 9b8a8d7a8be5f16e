"""The serving benchmark runs small, from dialogues to a table, and refuses other data before long work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.checkpoint import dialogues
from conch.errors import ConchError

ROOT = Path(__file__).resolve().parents[2]
WAYS = [
    "in process, from text",
    "in process, from tokens",
    "served, python, text form",
    "served, python, token form",
    "served, onnx in python, token form",
]


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    core = str(min(os.sched_getaffinity(0)))
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.serving",
            "--server-core",
            core,
            "--client-core",
            core,
            *arguments,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Sixteen dialogues of rising length."""
    path = tmp_path / "dialogues.jsonl"
    turn = "\n\nHuman: How are you?\n\nAssistant: Well, thank you."
    pairs = [
        {"chosen": turn * (1 + number), "rejected": turn * (1 + number) + " And you?"} for number in range(8)
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


@pytest.mark.slow
def test_benchmark_compares_served_with_in_process_round_by_round(data: Path, tmp_path: Path) -> None:
    size = [
        "--samples",
        "16",
        "--rounds",
        "2",
        "--callers",
        "2",
        "--call",
        "4",
        "--layers",
        "2",
        "--width",
        "64",
    ]
    done = run_benchmark("--data", str(data), *size, "--json", str(tmp_path / "report.json"))

    assert done.returncode == 0, done.stderr
    assert [line.split(" | ")[0].removeprefix("| ") for line in done.stdout.splitlines()[-5:]] == WAYS
    results = json.loads((tmp_path / "report.json").read_text())["results"]
    seconds = {row["name"]: row["seconds"] for row in results}
    for row in results[2:]:
        ratios = [alone / served for served, alone in zip(row["seconds"], seconds[row["limit"]], strict=True)]
        assert row["ratio"]["low"] == pytest.approx(min(ratios))
        assert row["ratio"]["high"] == pytest.approx(max(ratios))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"chosen": "a", "rejected": "b"}\n', "holds 2 distinct dialogues, 512 were asked for"),
        ('{"text": "a"}\n', "does not hold JSON lines with `chosen` and `rejected`"),
    ],
)
def test_other_data_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "data.jsonl").write_text(content)

    with pytest.raises(ConchError, match=message):
        dialogues(tmp_path / "data.jsonl", 512)

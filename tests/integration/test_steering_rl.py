"""`rl.py` as it is typed: two processes that train and one that samples, on a machine without a GPU; and the
gate of the small run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from conch.runs.plots import read_metric
from tests.launches import kill_all

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples/steerability"
LONGEST_S = 1800
"""What hangs ends by this. The small run takes 6 to 8 minutes on two cores of its own."""

SMALL = (
    *("steerability.sft_rows=64", "steerability.sft_steps=3", "steerability.source_texts=4"),
    *("steerability.held_out_texts=2", "steerability.held_out_instructions=2"),
    *("grpo.prompts_per_step=4", "grpo.group_size=2", "generation.max_new_tokens=12"),
    *("train.total_steps=2", "train.eval_every=2", "model.trial=false"),
)


def run(command: Sequence[str], *, code: int = 0) -> str:
    """Output of a command typed in the example's folder, which leaves nothing behind that runs."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=FOLDER,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output, _ = process.communicate(timeout=LONGEST_S)
    finally:
        kill_all(process)
    assert process.returncode == code, output[-6000:]
    return output


def accelerate(*words: str) -> list[str]:
    """`accelerate launch --num-processes 2 rl.py ...`."""
    return ["-m", "accelerate.commands.launch", "--num-processes", "2", "rl.py", *words]


@pytest.mark.slow
def test_two_processes_train_and_a_third_samples(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    output = run(accelerate("--config", "tiny", f"train.run_dir={folder}", *SMALL))
    assert "training      simulated devices 0, 1" in output and "sampling      simulated device 2" in output
    assert "3 devices are simulated by processes on the CPU" in output
    assert "held-out rows" in output and f"run folder: {folder}" in output
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 2
    assert {"steering/error", "steering/value/formality"} <= {name for row in rows for name in row}
    config = (folder / "config.yaml").read_text()
    assert "num_processes: 2" in config and (tmp_path / "run-sft").is_dir()
    marks = [each for each in psutil.process_iter(["cmdline"]) if str(folder) in str(each.info["cmdline"])]
    assert not marks, "the sampler has ended with the run"


def test_what_is_wrong_is_told_by_one_process_in_a_sentence(tmp_path: Path) -> None:
    output = run(["rl.py", "--config", "tiny", "reward.steering.goals=[joy]"], code=1)
    assert output.startswith("error: ") or "\nerror: " in output
    assert "Traceback" not in output
    assert "`joy`" in output


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_small_run_learns_to_steer(tmp_path: Path, seed: int) -> None:
    folder = tmp_path / "run"
    run(["rl.py", "--config", "tiny", f"train.run_dir={folder}", f"train.seed={seed}"])
    _, errors = read_metric(folder, "eval/steering/error")
    _, beside = read_metric(folder, "eval/steering/orthogonality")
    assert errors[-1] <= 0.6 * errors[0], errors
    assert len(beside) == len(errors) and all(-1 <= each <= 0 for each in beside)

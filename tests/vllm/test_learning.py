"""Random walks learned through vLLM, to the gates that runs with the built-in engine reach."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.example_runs import run_example
from tests.launches import finish, torchrun
from tests.launches import start as start_run

SHAPE = ("model.architecture.n_embd=128", "model.architecture.n_head=4")
"""Heads of 32: for those of the examples' own policy vLLM has no kernel on a CPU."""

ENGINE = ("rollout.engine=vllm", "rollout.kv_cache_gb=0.1")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SFT policy, as `sft_start.py` makes it."""
    folder = tmp_path_factory.mktemp("start") / "run"
    run_example("sft_randomwalks", *SHAPE, "train.total_steps=250", f"train.run_dir={folder}")
    return folder / "checkpoints" / "step_250"


def check_rows(run_dir: Path) -> None:
    """The sampler is the policy at every step, and the start is the SFT policy."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert 0.2 < rows[0]["eval/optimality"] < 0.45
    assert all(row["rollout/logprob_gap"] < 1e-4 for row in rows[1:])
    assert all(abs(row["train/ratio_first"] - 1) < 1e-4 for row in rows[1:])


@pytest.mark.parametrize(("algorithm", "gate"), [("grpo", 0.95), ("ppo", 0.94)])
def test_walks_become_short(algorithm: str, gate: float, start: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    found = run_example(
        f"{algorithm}_randomwalks", f"model.path={start}", f"train.run_dir={run_dir}", *ENGINE
    )
    assert found["eval/optimality"] >= gate
    check_rows(run_dir)


def test_two_ranks_sample_each_in_its_own_process(start: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [f"model.path={start}", f"train.run_dir={run_dir}", *ENGINE, "train.total_steps=4"]
    program = ["-m", "examples.randomwalks.grpo_randomwalks", *overrides, "train.num_processes=2"]
    assert "Traceback" not in finish(start_run([*torchrun(2), *program]))
    check_rows(run_dir)

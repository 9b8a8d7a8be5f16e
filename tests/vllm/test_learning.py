"""Random walks learned through vLLM, to the gates that runs with the built-in engine reach."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.example_runs import assert_shortest_walks, run_example
from tests.launches import finish, torchrun
from tests.launches import start as start_run

SHAPE = ("model.architecture.n_embd=128", "model.architecture.n_head=4")
"""Heads of 32: for those of the examples' own policy vLLM has no kernel on a CPU."""

ENGINE = ("rollout.engine=vllm", "rollout.kv_cache_memory_bytes=100MiB")


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
    assert all(row["rollout/logprob_diff"] < 1e-4 for row in rows[1:])
    assert all(abs(row["train/ratio_first"] - 1) < 1e-4 for row in rows[1:])


def learn(algorithm: str, start: Path, run_dir: Path, *overrides: str) -> dict[str, float]:
    """What a run comes to, whose rows are checked."""
    settings = (f"model.path={start}", f"train.run_dir={run_dir}", *ENGINE, *overrides)
    found = run_example(f"{algorithm}_randomwalks", *settings)
    check_rows(run_dir)
    return found


def test_grpo_finds_short_walks(start: Path, tmp_path: Path) -> None:
    assert learn("grpo", start, tmp_path / "run")["eval/optimality"] >= 0.95


def test_ppo_finds_the_shortest_walks_on_three_seeds(start: Path, tmp_path: Path) -> None:
    assert_shortest_walks(
        [learn("ppo", start, tmp_path / str(seed), f"train.seed={seed}") for seed in range(3)]
    )


def test_two_ranks_sample_each_in_its_own_process(start: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [f"model.path={start}", f"train.run_dir={run_dir}", *ENGINE, "train.total_steps=4"]
    program = ["-m", "examples.randomwalks.grpo_randomwalks", *overrides, "train.num_processes=2"]
    assert "Traceback" not in finish(start_run([*torchrun(2), *program]))
    check_rows(run_dir)

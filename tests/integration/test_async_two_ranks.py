"""Asynchronous GRPO on two ranks: at staleness 0 the synchronous run, and whole after a kill."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from conch.training.overlap.ledger import ledger_faults, read_ledger
from tests.integration.test_async_grpo import comparable
from tests.launches import CONFIGS, LONGEST_S, finish, free_port, kill_all, start, torchrun
from tests.numerics import network_rounding
from tests.runs import PROMPTS, TOKENIZER, policy
from tests.transformers_servers import served

RUN = "tests.integration.async_run"
SETTINGS = ("train.num_processes=2", "grpo.prompts_per_step=4", "train.save_every=3")


@pytest.fixture(scope="module")
def servers() -> Iterator[str]:
    with served(policy(), TOKENIZER) as first, served(policy(), TOKENIZER) as second:
        yield f"{first.address},{second.address}"


def run(folder: Path, servers: str, *settings: str, fresh: bool = False) -> Any:
    return start([*torchrun(2), "-m", RUN, str(folder), servers, *SETTINGS, *settings], fresh=fresh)


def under_zero2(folder: Path, servers: str, *settings: str) -> Any:
    """The same under DeepSpeed's ZeRO-2, which computes in the weights' own precision here."""
    file = folder.with_suffix(".yaml")
    zero2 = yaml.safe_load((CONFIGS / "zero2-bf16.yaml").read_text())
    file.write_text(yaml.safe_dump({**zero2, "mixed_precision": "no"}))
    place = ["--num_processes", "2", "--main_process_port", str(free_port())]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), *place]
    return start([*launcher, "-m", RUN, str(folder), servers, *SETTINGS, *settings])


def logged(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.slow
def test_staleness_0_is_the_synchronous_run(tmp_path: Path, servers: str) -> None:
    short = ("train.total_steps=4", "train.eval_every=2", "optimizer.learning_rate=0.01")
    finish(run(tmp_path / "async", servers, *short, "asynchronous.max_staleness=0"))
    finish(run(tmp_path / "sync", servers, *short, "synchronous=true", "grpo.correction={kind: truncate}"))
    steps = [comparable(row) for row in logged(tmp_path / "async")]
    assert len(steps) == 5
    assert steps == [comparable(row) for row in logged(tmp_path / "sync")]


@pytest.mark.slow  # DeepSpeed compiles an operator in each new environment
def test_zero_2_finds_what_ranks_with_all_of_the_optimizer_find(tmp_path: Path) -> None:
    """Optimizer state and gradients lie in shards, and weights reach the sampler whole."""
    linear = ("optimizer.learning_rate=0.1", "optimizer.eps=1.0")  # an update in proportion to its gradient
    short = ("dtype=float32", "train.total_steps=3", "asynchronous.max_staleness=0", *linear)
    with served(policy(dtype=torch.float32), TOKENIZER) as server:
        finish(run(tmp_path / "whole", server.address, *short))
        finish(under_zero2(tmp_path / "shards", server.address, *short))
    whole, shards = ([comparable(row) for row in logged(tmp_path / name)] for name in ("whole", "shards"))
    assert [row["step"] for row in whole] == [1, 2, 3]
    bound = 3 * network_rounding(
        torch.ones(1)
    )  # of a step's forward pass, and of what it adds to the weights
    for one, other in zip(whole, shards, strict=True):
        assert other == pytest.approx(one, rel=bound, abs=bound, nan_ok=True)
    assert whole[0]["train/grad_norm"] > 0.01 and whole[0]["reward/mean"] != whole[1]["reward/mean"]
    assert ledger_faults(tmp_path / "shards", len(PROMPTS)) == []
    assert {line["rank"] for line in read_ledger(tmp_path / "shards")} == {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_rank_that_is_killed_loses_and_doubles_nothing(tmp_path: Path, servers: str, victim: int) -> None:
    folder, settings = tmp_path / "run", ("asynchronous.max_staleness=2", "train.total_steps=8")
    process = run(folder, servers, *settings, fresh=True)  # a fork shows the environment that it came from
    try:
        deadline = time.monotonic() + LONGEST_S
        while len(logged(folder)) < 4:  # within step 5, or step 6; step 3 was saved
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        ranks = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if child.environ().get("RANK") == str(victim)
        ]
        ranks[0].kill()
        output, _ = process.communicate(timeout=LONGEST_S)
        assert process.returncode != 0, output
    finally:
        kill_all(process)
    saved = folder / "checkpoints" / "step_3" / "state"
    assert {file.name for file in saved.glob("rank_*.json")} == {"rank_0.json", "rank_1.json"}
    finish(run(folder, servers, *settings))
    lines = read_ledger(folder)
    assert [line["position"] for line in lines] == list(range(32))
    assert {line["rank"] for line in lines} == {0, 1}
    assert ledger_faults(folder, len(PROMPTS)) == []
    assert all(line["step"] - 1 - version <= 2 for line in lines for version in line["versions"])

"""Asynchronous GRPO on two ranks: at staleness 0 the synchronous run, and whole after a kill."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from conch.training.overlap.ledger import ledger_faults, read_ledger
from tests.integration.test_async_grpo import comparable
from tests.launches import LONGEST_S, finish, kill_all, start, torchrun
from tests.runs import PROMPTS, TOKENIZER, policy
from tests.transformers_servers import served

RUN = "tests.integration.async_run"
SETTINGS = ("train.num_processes=2", "grpo.prompts_per_step=4", "train.save_every=3")


@pytest.fixture(scope="module")
def servers() -> Iterator[str]:
    with served(policy(), TOKENIZER) as first, served(policy(), TOKENIZER) as second:
        yield f"{first.address},{second.address}"


def run(folder: Path, servers: str, *settings: str) -> Any:
    return start([*torchrun(2), "-m", RUN, str(folder), servers, *SETTINGS, *settings])


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


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_rank_that_is_killed_loses_and_doubles_nothing(tmp_path: Path, servers: str, victim: int) -> None:
    folder, settings = tmp_path / "run", ("asynchronous.max_staleness=2", "train.total_steps=8")
    process = run(folder, servers, *settings)
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

"""Asynchronous GRPO whose reward goes away, or that is told to leave at any moment: nothing is lost."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from conch.rewards import outage
from conch.training.overlap.ledger import ledger_faults, read_ledger
from tests.integration.test_async_grpo import comparable
from tests.runs import PROMPTS, TOKENIZER, async_grpo_trainer, policy
from tests.transformers_servers import ServedTransformers, served
from tests.unit.training.test_outages import FOR_EVER, Tide, numbers_of, preempt
from tests.unit.training.test_run import weights

ROWS = PROMPTS[:7]


@pytest.fixture(autouse=True)
def quick_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(outage, "_LONGEST_PAUSE_S", 0.01)


@pytest.fixture(scope="module")
def server() -> Iterator[ServedTransformers]:
    with served(policy(), TOKENIZER) as server:
        yield server


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, server: ServedTransformers) -> Path:
    """A run at staleness 0 whose reward never went away."""
    folder = tmp_path_factory.mktemp("runs") / "calm"
    with closing(run(folder, server, Tide(), 0)) as trainer:
        trainer.fit()
    return folder


def run(folder: Path, server: ServedTransformers, source: Tide, staleness: int, **train: Any) -> Any:
    return async_grpo_trainer(
        folder,
        reward_fn=source,
        prompts=ROWS,
        eval_prompts=["a", "bc"],
        rollout={"urls": server.address},
        reward={"failure": {"policy": "wait", "checkpoint_after_s": 3600.0}},
        asynchronous={"max_staleness": staleness},
        grpo={"minibatches": 2, "kl": {"coef": 0.05}},
        optimizer={"learning_rate": 5e-3},
        train={"total_steps": 4, "eval_every": 2, "save_every": 2, "max_grad_norm": 1.0, **train},
    )


def assert_whole(folder: Path) -> None:
    assert ledger_faults(folder, len(ROWS)) == []
    assert [line["position"] for line in read_ledger(folder)] == list(range(8))


def assert_same_run(found: Path, expected: Path) -> None:
    rows = [[comparable(row) for row in numbers_of(folder)] for folder in (found, expected)]
    assert rows[0] == rows[1]
    assert weights(found / "checkpoints/step_4") == weights(expected / "checkpoints/step_4") != {}
    assert read_ledger(found) == read_ledger(expected)


def preempt_the_waiting() -> None:
    """Only the main thread asks again; what is sampled ahead is asked for in another."""
    if threading.current_thread() is threading.main_thread():
        preempt()


# Requests: one for each evaluation (before step 1, after steps 2 and 4), two for each step.
@pytest.mark.parametrize(("staleness", "first"), [(0, 1), (0, 5), (0, 6), (2, 4)])
def test_run_that_left_in_an_outage_goes_on_as_if_nothing_had_been(
    tmp_path: Path, calm: Path, server: ServedTransformers, staleness: int, first: int
) -> None:
    folder = tmp_path / "storm"
    interrupted = run(folder, server, Tide(first, FOR_EVER, preempt_the_waiting), staleness)
    with closing(interrupted), pytest.raises(SystemExit):
        interrupted.fit()
    with closing(run(folder, server, Tide(), staleness, resume="auto")) as trainer:
        trainer.fit()
    assert_whole(folder)
    if staleness == 0:
        assert_same_run(folder, calm)


@pytest.mark.parametrize(("staleness", "number"), [(0, signal.SIGTERM), (2, signal.SIGINT)])
def test_run_that_is_told_to_leave_again_and_again_loses_nothing(
    tmp_path: Path, calm: Path, server: ServedTransformers, staleness: int, number: signal.Signals
) -> None:
    folder, moments = tmp_path / "run", random.Random(staleness)
    before = {each: signal.signal(each, lambda *_: None) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        for attempt in range(4):
            trainer = run(folder, server, Tide(), staleness, resume="auto", save_every=0)
            timer = threading.Timer(0.6 * moments.random(), os.kill, (os.getpid(), number))
            if attempt < 3:
                timer.start()
            with closing(trainer), suppress(SystemExit, KeyboardInterrupt):
                trainer.fit()
            if attempt < 3:
                timer.join()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert_whole(folder)
    if staleness == 0:
        assert_same_run(folder, calm)

"""Runs whose reward goes away within a step or an evaluation: what they save, and how they go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from conch.errors import RewardUnavailableError
from conch.rewards import outage
from conch.rewards.base import RewardSource
from conch.runs.checkpoint import read_checkpoint, steps_of
from conch.types import RewardResult, RewardStatus, Rollout
from tests.runs import PROMPTS, ppo_trainer, sft_trainer, vowels
from tests.unit.training.test_run import SAMPLES, metrics_of, weights

TRAIN = {"total_steps": 4, "eval_every": 2, "save_every": 2, "max_grad_norm": 1.0}
FOR_EVER = 10**9
# Requests of a run: one for the first evaluation, one a step, one for the evaluation after every second step.
FIRST_EVALUATION, SECOND_STEP, EVALUATION, THIRD_STEP, LAST_EVALUATION = 1, 3, 4, 5, 7


class Tide(RewardSource):
    """A source that is away from its `first` request on, and for `attempts` of them.

    in_outage: called when it is asked again.
    """

    name = "tide"
    batched = True

    def __init__(
        self, first: int = 0, attempts: int = 0, in_outage: Callable[[], object] = lambda: None
    ) -> None:
        self._requests = 0
        self._away = range(first, first + attempts)
        self._in_outage = in_outage

    def check(self) -> None:
        """Nothing to check."""

    def submit(self, chunk: Sequence[Rollout]) -> Future[list[RewardResult]]:
        self._requests += 1
        if self._requests in self._away[1:]:
            self._in_outage()
        future: Future[list[RewardResult]] = Future()
        future.set_result([self._result(rollout) for rollout in chunk])
        return future

    def _result(self, rollout: Rollout) -> RewardResult:
        if self._requests in self._away:
            return RewardResult(RewardStatus.UNAVAILABLE, detail="out at sea")
        return RewardResult(RewardStatus.OK, scores={"reward": vowels([rollout.completion.text])[0]})


def ppo(run_dir: Path, source: Tide, *, failure: dict[str, Any] | None = None, **train: Any) -> Any:
    return ppo_trainer(
        run_dir,
        reward_fn=source,
        reward={"failure": {"policy": "wait", "checkpoint_after_s": 0.0, **(failure or {})}},
        train={**TRAIN, **train},
        optimizer={"learning_rate": 5e-3},
        ppo={"epochs": 2, "minibatches": 2, "kl": {"target": 0.1, "horizon": 100}},
        shaping={"scaling": "running"},
        prompts=PROMPTS[:7],
    )


def numbers_of(run_dir: Path) -> list[dict[str, Any]]:
    """Rows without what the clock measures and without what was sent."""
    counts = ("reward/requests", "reward/retries")
    return [{name: value for name, value in row.items() if name not in counts} for row in metrics_of(run_dir)]


def assert_same_run(found: Path, expected: Path) -> None:
    assert [row["step"] for row in numbers_of(found)] == [0, 1, 2, 3, 4]
    assert numbers_of(found) == numbers_of(expected)
    assert weights(found / "checkpoints/step_4") == weights(expected / "checkpoints/step_4") != {}


def preempt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def quick_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(outage, "_LONGEST_PAUSE_S", 0.01)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose reward never went away."""
    folder = tmp_path_factory.mktemp("runs") / "calm"
    ppo(folder, Tide()).fit()
    return folder


WHERE = pytest.mark.parametrize(
    ("first", "step"),
    [(FIRST_EVALUATION, 0), (SECOND_STEP, 1), (EVALUATION, 2), (THIRD_STEP, 2), (LAST_EVALUATION, 4)],
)


@WHERE
def test_a_run_that_waited_equals_one_that_did_not_have_to(
    tmp_path: Path, calm: Path, first: int, step: int
) -> None:
    saved: list[set[int]] = []
    source = Tide(first, attempts=4, in_outage=lambda: saved.append(set(steps_of(tmp_path / "storm"))))
    ppo(tmp_path / "storm", source).fit()

    assert [step in steps for steps in saved] == [True] * 3
    assert_same_run(tmp_path / "storm", calm)


@WHERE
def test_a_run_that_left_while_waiting_goes_on_as_if_nothing_had_been(
    tmp_path: Path, calm: Path, first: int, step: int
) -> None:
    storm = tmp_path / "storm"
    with pytest.raises(SystemExit) as left:
        ppo(storm, Tide(first, FOR_EVER, preempt), failure={"checkpoint_after_s": 3600.0}).fit()
    assert left.value.code == 143
    assert max(steps_of(storm)) == step

    resumed = ppo(storm, Tide(), resume="auto")
    assert resumed.run.step == step
    resumed.fit()
    assert_same_run(storm, calm)


def test_a_run_without_regular_checkpoints_goes_on_from_the_outages(tmp_path: Path) -> None:
    calm, storm = tmp_path / "calm", tmp_path / "storm"
    ppo(calm, Tide(), save_every=0).fit()
    with pytest.raises(SystemExit):
        ppo(storm, Tide(THIRD_STEP, FOR_EVER, preempt), save_every=0).fit()
    ppo(storm, Tide(), save_every=0, resume="auto").fit()
    assert_same_run(storm, calm)


def test_a_spent_budget_leaves_a_checkpoint_behind(tmp_path: Path, calm: Path) -> None:
    storm = tmp_path / "storm"
    impatient = {"checkpoint_after_s": 3600.0, "wait_budget_s": 0.05}
    with pytest.raises(RewardUnavailableError, match="out at sea"):
        ppo(storm, Tide(SECOND_STEP, FOR_EVER), failure=impatient).fit()
    assert list(steps_of(storm)) == [1]
    ppo(storm, Tide(), resume="auto").fit()
    assert_same_run(storm, calm)


def test_a_checkpoint_that_stands_already_is_not_written_again(tmp_path: Path) -> None:
    storm, written = tmp_path / "storm", []

    def look() -> None:
        written.append((storm / "checkpoints/step_2/files.json").stat().st_mtime_ns)

    ppo(storm, Tide(THIRD_STEP, 3, look), keep_last=None).fit()
    before = read_checkpoint(storm / "checkpoints/step_2").folder / "files.json"
    assert written == [before.stat().st_mtime_ns] * 2


def test_a_trainer_that_only_measures_with_the_reward_waits_as_well(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "eval_prompts": PROMPTS[:3],
        "train": TRAIN,
        "reward": {"failure": {"policy": "wait", "checkpoint_after_s": 0.0}},
    }
    sft_trainer(tmp_path / "calm", SAMPLES, reward_fn=Tide(), **settings).fit()
    with pytest.raises(SystemExit):
        sft_trainer(tmp_path / "storm", SAMPLES, reward_fn=Tide(2, FOR_EVER, preempt), **settings).fit()
    train = {**TRAIN, "resume": "auto"}
    sft_trainer(tmp_path / "storm", SAMPLES, reward_fn=Tide(), **{**settings, "train": train}).fit()
    assert_same_run(tmp_path / "storm", tmp_path / "calm")

"""Rewards on record: every score is a line without its text, and a run can be done again from them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from conch.config import RewardConfig
from conch.errors import ConfigError, RewardInvalidError
from conch.rewards.factory import from_user
from conch.rewards.replay import REWARDS_FILE, ReplayReward, append_lines, cut_lines, line_of
from conch.types import RewardResult, RewardStatus
from tests.fakes.rollouts import rollouts
from tests.runs import PROMPTS, ppo_trainer
from tests.unit.training.test_run import interrupt_after, metrics_of, weights

WAIT_S = 120
TRAIN = {"total_steps": 4, "eval_every": 2, "save_every": 2, "max_grad_norm": 1.0}


class Moody:
    """Scores differ from call to call, and have all their bits in use; one output gets none."""

    def __init__(self) -> None:
        self.chance = random.Random(7)

    def __call__(self, outputs: Sequence[str], **_: Any) -> list[float]:
        return [float("nan") if output == "h" else self.chance.gauss(0, 1) / 3 for output in outputs]


def ppo(
    run_dir: Path, reward_fn: Any, *, train: dict[str, Any] | None = None, policy: str = "drop", **reward: Any
) -> Any:
    return ppo_trainer(
        run_dir,
        reward_fn=reward_fn,
        reward={"failure": {"policy": policy, "max_fraction": 1.0}, **reward},
        train={**TRAIN, **(train or {})},
        optimizer={"learning_rate": 5e-3},
        shaping={"scaling": "running"},
        prompts=PROMPTS[:7],
    )


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / REWARDS_FILE).read_text().splitlines()]


def numbers_of(run_dir: Path) -> list[dict[str, Any]]:
    rows = metrics_of(run_dir)
    return [{name: value for name, value in row.items() if name != "reward/requests"} for row in rows]


def never(outputs: Sequence[str], **_: Any) -> list[float]:
    raise AssertionError("asked in spite of the record")


def test_a_run_is_done_again_from_its_record_bit_for_bit(tmp_path: Path) -> None:
    live, offline = tmp_path / "live", tmp_path / "offline"
    ppo(live, Moody(), record=True).fit()
    ppo(offline, never, record=True, replay=live).fit()

    assert numbers_of(offline) == numbers_of(live)
    assert weights(offline / "checkpoints/step_4") == weights(live / "checkpoints/step_4") != {}
    assert lines_of(offline) == [{**line, "detail": line["detail"]} for line in lines_of(live)]
    places = [(line["step"], line["phase"]) for line in lines_of(live)]
    assert [places.count(place) for place in ((0, "eval"), (1, "train"), (2, "train"), (2, "eval"))] == [
        7,
        8,
        8,
        7,
    ]
    assert {line["rank"] for line in lines_of(live)} == {0}


def test_a_resumed_run_has_the_record_of_one_that_was_not_interrupted(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    length = lambda outputs, **_: [len(output) / 3 for output in outputs]  # noqa: E731
    ppo(whole, length, record=True).fit()
    ppo(cut, length, record=True).fit()
    interrupt_after(cut, 2)
    ppo(cut, length, record=True, train={"resume": "auto"}).fit()

    timeless = [[{**line, "latency_s": 0.0} for line in lines_of(folder)] for folder in (whole, cut)]
    assert timeless[0] == timeless[1]


SCORED = RewardResult(
    RewardStatus.OK,
    scores={"reward": 0.1 + 0.2},
    model="m",
    version="3",
    latency_s=0.25,
    detail="scored by 1 of 2 members",
    members={"a": 0.3, "b": None},
)
DENSE = RewardResult(RewardStatus.OK, token_scores=(0.1, 1 / 3), model="m")
FAILED = RewardResult(RewardStatus.TIMEOUT, detail="your text `secret` was too long")


def record(folder: Path, *results: RewardResult, rank: int = 0, output: str = "secret") -> None:
    folder.mkdir(exist_ok=True)
    append_lines(
        folder, [line_of(rollouts(output)[0], result, step=1, phase="train", rank=rank) for result in results]
    )


def replayed(source: ReplayReward, *outputs: str) -> list[RewardResult]:
    source.check()
    return source.submit(rollouts(*outputs)).result(WAIT_S)


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    record(tmp_path, SCORED, DENSE, FAILED)
    first, second, third, fourth = replayed(ReplayReward(tmp_path), *["secret"] * 4)

    assert (first, second) == (SCORED, DENSE)
    assert third.status is RewardStatus.TIMEOUT and third.detail == "recorded as timeout"
    assert fourth == third, "the last line counts from then on"
    assert "secret" not in (tmp_path / REWARDS_FILE).read_text()


def test_each_rank_has_its_own_lines_first(tmp_path: Path) -> None:
    record(tmp_path, SCORED, rank=0)
    record(tmp_path, DENSE, rank=1)
    record(tmp_path, DENSE, rank=0, output="a")

    assert replayed(ReplayReward(tmp_path / REWARDS_FILE, rank=1), "secret", "a") == [DENSE, DENSE]


def test_a_sample_that_was_never_recorded_is_named_by_its_hash(tmp_path: Path) -> None:
    record(tmp_path, SCORED)
    (found,) = replayed(ReplayReward(tmp_path), "another")

    assert found.status is RewardStatus.INVALID
    assert "none of them is of sample" in found.detail and "another" not in found.detail


def test_a_run_with_another_seed_than_the_record_is_stopped(tmp_path: Path) -> None:
    ppo(tmp_path / "live", Moody(), record=True).fit()
    other = {"seed": 5}
    with pytest.raises(RewardInvalidError, match="replay with the configuration, the seed"):
        ppo(tmp_path / "other", never, replay=tmp_path / "live", policy="raise", train=other).fit()


@pytest.mark.parametrize("content", [None, "", "[]\n", '{"step": 1}\n'])
def test_what_is_no_record_is_refused_at_the_start(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / REWARDS_FILE).write_text(content)
    with pytest.raises(ConfigError, match=r"reward\.replay"):
        from_user(None, RewardConfig(replay=tmp_path))


def test_cutting_leaves_what_is_done(tmp_path: Path) -> None:
    def write() -> None:
        (tmp_path / REWARDS_FILE).unlink(missing_ok=True)
        for step, phase in ((0, "eval"), (1, "train"), (2, "train"), (2, "eval"), (3, "train")):
            append_lines(tmp_path, [line_of(rollouts("a")[0], SCORED, step=step, phase=phase, rank=0)])
        with (tmp_path / REWARDS_FILE).open("a") as file:
            file.write('{"step": 1, "pha')

    for last, evaluated, kept in ((2, True, 4), (2, False, 3), (1, True, 2), (0, False, 0), (-1, True, 0)):
        write()
        cut_lines(tmp_path, last, evaluated=evaluated)
        assert len(lines_of(tmp_path)) == kept, (last, evaluated)

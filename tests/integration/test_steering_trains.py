"""Steering through the trainers: metrics of goals, rows refused by line, three servers of which one dies."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from conch.errors import DataError
from conch.trainers.grpo import GRPOTrainer
from tests.fakes.goal_server import GoalServer, goal_server
from tests.runs import PROMPTS, grpo_trainer, ppo_trainer, rft_trainer
from tests.unit.test_metrics_doc import explained

# Of outputs of up to five letters, none of them empty for all: between 0 and 1.
GOALS = {
    "vowels": lambda text: sum(letter in "ae" for letter in text) / 5,
    "size": lambda text: len(text) / 5,
}
ROWS = [
    {"prompt": prompt, "source_vowels": 0.2, "target_vowels": 0.8, "source_size": 0.6, "target_size": None}
    for prompt in PROMPTS
]
STEERING = {
    "rewards": ["steerability_error", "orthogonality"],
    "eval_rewards": ["miscalibration", "vowels_error"],
    "goals": ["vowels", "size"],
}


@contextmanager
def servers(number: int, **settings: Any) -> Iterator[list[GoalServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(goal_server(goals=GOALS, **settings)) for _ in range(number)]


def reward_of(copies: list[GoalServer], **client: Any) -> dict[str, Any]:
    return {
        "url": ",".join(each.url for each in copies),
        "dialect": "goals",
        "weights": {"orthogonality": 0.5},
        "steering": STEERING,
        "client": {"batch_rows": 1, "max_in_flight": 1, "cache_size": 0, "deadline_s": 60.0, **client},
    }


def grpo(folder: Path, copies: list[GoalServer], **settings: Any) -> GRPOTrainer:
    rows = {"prompts": ROWS, "eval_prompts": ROWS, "reward_fn": None, **settings}
    return grpo_trainer(folder, reward=reward_of(copies), **rows)


def test_metrics_of_steps_and_evaluations_are_the_goals(tmp_path: Path) -> None:
    with servers(1) as copies:
        trainer = grpo(tmp_path / "run", copies)
        step, evaluation = trainer.step(), trainer.evaluate()
        trainer.close()
    for prefix, metrics in (("", step), ("eval/", evaluation)):
        named = {name.removeprefix(prefix) for name in metrics if name.startswith(f"{prefix}steering/")}
        assert named == {
            *(f"steering/{name}" for name in (*STEERING["rewards"], *STEERING["eval_rewards"])),
            *(f"steering/{name}/{goal}" for name in ("error", "value") for goal in GOALS),
            "steering/error",
        }
        steered, beside = metrics[f"{prefix}steering/steerability_error"], metrics[f"{prefix}steering/error"]
        assert steered == pytest.approx(-beside) and beside > 0
        rewarded = metrics["eval/reward" if prefix else "reward/mean"]
        assert rewarded == pytest.approx(steered + 0.5 * metrics[f"{prefix}steering/orthogonality"])
    general = {f"reward/mean/{name}" for name in STEERING["rewards"]}
    missing = (step.keys() | evaluation.keys()) - explained() - general
    assert not {name for name in missing if "steering/" not in name}
    assert {"steering/<reward>", "eval/steering/<name>", "steering/error"} <= explained()


@pytest.mark.parametrize("make", [ppo_trainer, rft_trainer])
def test_other_trainers_are_steered_too(tmp_path: Path, make: Any) -> None:
    with servers(1) as copies:
        given = {"prompts": ROWS, "eval_prompts": ROWS, "reward_fn": None}
        trainer = make(tmp_path / "run", reward=reward_of(copies), **given)
        metrics = trainer.step()
        trainer.close()
    assert math.isfinite(metrics["steering/error"])


def test_one_of_three_servers_that_dies_in_mid_batch_changes_no_metric(tmp_path: Path) -> None:
    def run(folder: Path, die_at: int | None) -> tuple[list[dict[str, Any]], GoalServer]:
        with servers(3, delay_s=0.01) as copies:
            trainer = grpo(folder, copies, train={"total_steps": 3, "eval_every": 1})
            copies[1].die_at = None if die_at is None else len(copies[1].asked) + die_at
            trainer.fit()
            trainer.close()
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        measured = (
            "steering/",
            "eval/",
            "reward/mean",
            "reward/std",
            "train/",
            "policy/",
            "rollout/",
            "grpo/",
        )
        return [
            {name: value for name, value in json.loads(line).items() if name.startswith(measured)}
            for line in lines
        ], copies[1]

    undisturbed, _ = run(tmp_path / "quiet", None)
    disturbed, killed = run(tmp_path / "killed", 3)
    assert killed.dead.is_set() and disturbed == undisturbed and len(disturbed) >= 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"target_vowels": "many"}, r"prompt 3 has `target_vowels` = 'many', which is no number"),
        ({"target_vowels": [0.9, 0.1]}, r"prompt 3 has .* which is upside down"),
        ({"steering_goals": ["joy"], "target_joy": 0.1, "source_joy": 0}, r"prompt 3 is steered in `joy`"),
    ],
)
def test_a_row_that_is_no_target_is_refused_before_the_run(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    rows = [{**row, **change} if index == 3 else row for index, row in enumerate(ROWS)]
    with servers(1) as copies, pytest.raises(DataError, match=says):
        grpo(tmp_path / "run", copies, prompts=rows)
    assert not (tmp_path / "run").exists()

"""Trainers and rewards of whole groups: who hands them over, who refuses, and that nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from conch.errors import ConfigError
from conch.types import RewardStatus
from tests.fakes.group_rewards import GroupSource, places, ranked
from tests.fakes.judge_server import judge_server
from tests.runs import PROMPTS, grpo_trainer, parameters, ppo_trainer, rft_trainer, vowels
from tests.unit.rewards.test_judge_server import rank_by_length

SHORT = {"total_steps": 3}


def sizes(source: GroupSource) -> list[int]:
    """Of all submits; each of one prompt."""
    assert all(len(names) == 1 for names, _ in source.submitted)
    return [len(outputs) for _, outputs in source.submitted]


@pytest.mark.parametrize("chunk_size", [3, 64])
def test_grpo_hands_over_whole_groups(tmp_path: Path, chunk_size: int) -> None:
    source = GroupSource(0.02, 0.0)
    settings = {"generation": {"chunk_size": chunk_size}, "train": SHORT}
    with closing(grpo_trainer(tmp_path / "run", reward_fn=source, **settings)) as trainer:
        rollouts = trainer.sample(2)
        results = trainer.score(rollouts)
        assert sizes(source) == [4, 4]
        texts = [rollout.completion.text for rollout in rollouts]
        assert [result.scores["reward"] for result in results] == places(texts[:4]) + places(texts[4:])
        metrics = trainer.step()
    assert metrics["reward/mean"] == pytest.approx(0.5)
    assert sizes(source) == [4] * 4


def test_ranks_of_a_source_a_function_and_a_judge_train_alike(tmp_path: Path) -> None:
    """The judge likes length, so a source of the same taste stands beside it."""
    weights: list[torch.Tensor] = []

    def longest(outputs: Sequence[str], **_: Any) -> list[float]:
        order = sorted(set(map(len, outputs)))
        return [float(order.index(len(output))) for output in outputs]

    longest.needs_groups = True  # pyright: ignore[reportFunctionMemberAccess]  what `groupwise` does
    with judge_server(rank_by_length) as server:
        judge = tmp_path / "judge.yaml"
        judge.write_text(f"url: {server.url}\nmodel: judge\nparser: ranking\n")
        for name, reward in (("source", GroupSource()), ("function", ranked)):
            with closing(grpo_trainer(tmp_path / name, reward_fn=reward, train=SHORT)) as trainer:
                for _ in range(2):
                    trainer.step()
                weights.append(parameters(trainer.module))
        with closing(grpo_trainer(tmp_path / "judge", reward_fn=f"judge:{judge}", train=SHORT)) as trainer:
            metrics = trainer.step()
            assert metrics["judge/tokens_in"] > 0 and metrics["reward/failed_fraction"] == 0
            before = len(server.bodies)
        assert before == 1 + 2, "a trial, and one request for each of two groups"
    assert torch.equal(*weights)


def test_rft_hands_over_whole_groups(tmp_path: Path) -> None:
    source = GroupSource()
    rft = {"prompts_per_round": 3, "n_generations_per_prompt": 5}
    with closing(rft_trainer(tmp_path / "run", reward_fn=source, rft=rft)) as trainer:
        trainer.step()
    assert sizes(source) == [5, 5, 5]


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (ppo_trainer, {}, "this trainer samples one of each: train with `grpo`"),
        (rft_trainer, {"rft": {"n_generations_per_prompt": 1}}, "this trainer samples one of each"),
        (grpo_trainer, {"train": {"eval_every": 1}}, "set `train.eval_repeats` to 2 or more"),
        (
            grpo_trainer,
            {
                "reward": {"delta": True},
                "prompts": [{"prompt": prompt, "original_output": "a"} for prompt in PROMPTS],
            },
            "`reward.delta`",
        ),
    ],
)
def test_trainer_that_has_no_groups_refuses_before_the_run(
    tmp_path: Path, make: Any, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        make(tmp_path / "run", reward_fn=GroupSource(), **settings)
    assert not (tmp_path / "run").exists()


def test_member_that_wants_groups_is_refused_with_the_others(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this trainer samples one of each"):
        ppo_trainer(tmp_path / "run", reward_fn={"rank": ranked, "vowels": vowels})


def test_evaluation_of_several_completions_hands_over_groups(tmp_path: Path) -> None:
    source, gold = GroupSource(), GroupSource()
    train = {"eval_every": 1, "eval_repeats": 3}
    settings = {"eval_prompts": PROMPTS[:5], "gold": gold, "train": train}
    with closing(grpo_trainer(tmp_path / "run", reward_fn=source, **settings)) as trainer:
        metrics = trainer.evaluate()
        assert sizes(source) == sizes(gold) == [3] * 5
        assert metrics["eval/reward"] == metrics["eval/gold/reward"] == pytest.approx(0.5)
        with pytest.raises(ConfigError, match="eval_repeats"):
            trainer.evaluate(repeats=1)


def test_gold_that_wants_groups_needs_evaluations_of_several(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eval_repeats"):
        ppo_trainer(tmp_path / "run", gold=GroupSource(), train={"eval_every": 1})


def test_dropped_group_leaves_the_loss_and_the_others_stay(tmp_path: Path) -> None:
    source = GroupSource(failures=1, status=RewardStatus.INVALID)
    failure = {"failure": {"policy": "drop", "max_fraction": 0.5}}
    with closing(grpo_trainer(tmp_path / "run", reward_fn=source, reward=failure)) as trainer:
        metrics = trainer.step()
    assert metrics["reward/failed_fraction"] == 0.5


def test_dynamic_sampling_hands_over_groups(tmp_path: Path) -> None:
    source = GroupSource()
    grpo = {"max_resamples": 2}
    with closing(grpo_trainer(tmp_path / "run", reward_fn=source, grpo=grpo)) as trainer:
        metrics = trainer.step()
    assert sizes(source) == [4] * 2 * (1 + int(metrics["grpo/resamples"]))


def test_members_of_a_sum_train_with_one_that_wants_groups(tmp_path: Path) -> None:
    reward = {"rank": ranked, "vowels": vowels}
    weights = {"reward": {"weights": {"vowels": 0.1}}}
    with closing(grpo_trainer(tmp_path / "run", reward_fn=reward, **weights)) as trainer:
        metrics = trainer.step()
    assert metrics["reward/mean/rank"] == pytest.approx(0.5)


def test_recorded_run_is_replayed_bit_for_bit(tmp_path: Path) -> None:
    train = {"eval_every": 1, "eval_repeats": 2, "total_steps": 2}
    reward = {"record": True}
    with closing(grpo_trainer(tmp_path / "first", reward_fn=ranked, train=train, reward=reward)) as trainer:
        trainer.fit()
        weights = parameters(trainer.module)
    lines = [json.loads(line) for line in (tmp_path / "first/rewards.jsonl").read_text().splitlines()]
    assert all(line["groups"] is True for line in lines)
    replay = {"replay": tmp_path / "first"}
    with closing(grpo_trainer(tmp_path / "again", reward_fn=vowels, train=train, reward=replay)) as trainer:
        trainer.fit()
        assert torch.equal(parameters(trainer.module), weights)

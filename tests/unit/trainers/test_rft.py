"""Real RFT trainers of a tiny policy: what is sampled, kept and learned, and what a resumed run has."""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from conch.errors import ConfigError, RewardInvalidError
from conch.runs.checkpoint import steps_of
from conch.trainers.rft import Candidates, RFTTrainer, keep_best
from tests.clock import CLOCK
from tests.runs import (
    EOS,
    LINEAR_ADAM,
    PROMPTS,
    letters_rollout,
    parameters,
    policy,
    rft_trainer,
    scored,
    vowels,
)

# At percentile 0.5 one of each prompt's two is kept: [2, 3, eos] and [4].
POOL = [
    Candidates((0,), ((2, 3, EOS), (1,)), (1.0, 0.0)),
    Candidates((5, 6), ((4,), (7, 7, 7)), (2.0, 1.0)),
]
LEARNED = [([0, 2, 3, EOS], 1), ([5, 6, 4], 2)]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def likelihood_loss(lm: GPT2LMHeadModel, samples: Sequence[tuple[list[int], int]]) -> torch.Tensor:
    """Mean negative log-likelihood of what stands from the given place on, one sample at a time."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, first in samples:
        logprobs = lm(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        total = total - sum(logprobs[t - 1, ids[t]] for t in range(first, len(ids)))
        count += len(ids) - first
    return total / count


# -------------------------------------------------------------------------------------------------- an update


def test_update_is_adam_on_the_likelihood_of_what_is_kept(run_dir: Path) -> None:
    lm = policy()
    reference = copy.deepcopy(lm)
    loss = likelihood_loss(reference, LEARNED)
    loss.backward()
    trainer = rft_trainer(
        run_dir,
        lm=lm,
        rft={"batch_size": 2, "updates_per_step": 1},
        optimizer=LINEAR_ADAM,
        generation={"temperature": 0.3},  # of sampling alone
    )
    metrics = trainer.update(POOL)
    assert metrics["train/loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    # Adam's first step is lr * g / (|g| + eps), with lr 0.1 and eps 1.
    for moved, start in zip(trainer.lm.parameters(), reference.parameters(), strict=True):
        assert start.grad is not None
        expected = start.detach() - 0.1 * start.grad / (start.grad.abs() + 1.0)
        torch.testing.assert_close(moved.detach(), expected, rtol=1e-9, atol=1e-12)
    assert metrics["rft/kept"] == 2 and metrics["rft/kept_prompts"] == 2 and metrics["rft/passes"] == 1
    assert metrics["rft/percentile"] == 0.5
    assert metrics["rft/threshold_mean"] == (0.5 + 1.5) / 2
    assert metrics["rft/kept_score_mean"] == 1.5
    assert trainer.policy_version == 1


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    found = []
    for steps in (1, 4):
        trainer = rft_trainer(
            tmp_path / str(steps),
            lm=policy(),
            optimizer=LINEAR_ADAM,
            train={"gradient_accumulation_steps": steps},
        )
        loss = trainer.update(POOL)["train/loss"]
        found.append((loss, parameters(trainer.lm)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-9, atol=1e-12)


def test_fewer_kept_than_a_batch_come_again(run_dir: Path) -> None:
    lm = policy()
    expected = float(likelihood_loss(copy.deepcopy(lm).double(), LEARNED[:1]).detach())
    metrics = rft_trainer(run_dir, lm=lm, rft={"updates_per_step": 1}).update(POOL[:1])
    assert metrics["train/loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["rft/kept"] == 1 and metrics["rft/passes"] == 8


def test_every_kept_completion_is_seen_before_one_comes_again(run_dir: Path) -> None:
    pool = [
        Candidates((0,), tuple((first, second) for first in range(4) for second in range(4)), (1.0,) * 16)
    ]
    trainer = rft_trainer(run_dir)
    seen: list[tuple[int, ...]] = []
    update = trainer._update_batch

    def noted(samples: Any) -> Any:
        seen.extend(sample.token_ids for sample in samples)
        return update(samples)

    trainer._update_batch = noted  # pyright: ignore[reportAttributeAccessIssue]
    trainer.update(pool)
    assert sorted(seen) == sorted((0, *ids) for ids in pool[0].completions)


@pytest.mark.parametrize("pool", [POOL, []])
def test_where_nothing_is_kept_nothing_is_learned(
    run_dir: Path, pool: list[Candidates], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = rft_trainer(run_dir, rft={"min_score": 2.5})
    before = parameters(trainer.lm)
    with caplog.at_level(logging.WARNING, logger="conch"):
        metrics = trainer.update(pool)
    assert "step 1 learns nothing: no completion has a score of at least rft.min_score = 2.5" in caplog.text
    assert metrics["rft/kept"] == 0 and math.isnan(metrics["rft/kept_score_mean"])
    assert "train/loss" not in metrics
    assert torch.equal(parameters(trainer.lm), before)


# ---------------------------------------------------------------------------------------------------- a round


def test_experience_leaves_failed_rewards_out_and_counts_them(run_dir: Path) -> None:
    rollouts = [
        letters_rollout("a", "bc"),
        letters_rollout("a", "d", "length"),
        letters_rollout("ef", "g"),
        letters_rollout("a", ""),
    ]
    trainer = rft_trainer(run_dir)
    pool, metrics = trainer.make_batch(rollouts, scored(1.0, None, None, -3.0))
    assert pool == [Candidates((0,), ((1, 2, EOS), (EOS,)), (1.0, -3.0))]
    assert metrics["rft/pool_size"] == 2 and metrics["reward/failed_fraction"] == 0.5
    assert metrics["reward/mean"] == -1.0
    assert metrics["rollout/length_mean"] == (3 + 1 + 2 + 1) / 4
    assert metrics["rollout/truncated_fraction"] == 0.25


def test_a_round_samples_once_and_raises_the_bar(run_dir: Path) -> None:
    trainer = rft_trainer(run_dir)
    first, second, third = trainer.step(), trainer.step(), trainer.step()
    assert [row["rft/percentile"] for row in (first, second, third)] == [0.5, 0.9, 0.5]
    assert first["rft/pool_size"] == third["rft/pool_size"] == len(PROMPTS) * 4
    assert first["rft/kept"] > second["rft/kept"] > 0
    assert second["rft/threshold_mean"] > first["rft/threshold_mean"]
    assert "reward/mean" in third and "reward/mean" not in second


def test_what_is_learned_are_the_sampled_ids(run_dir: Path) -> None:
    trainer = rft_trainer(run_dir)
    trainer.step()
    known = {prompt.token_ids: prompt for prompt in trainer.prompts}
    assert [candidates.prompt_ids for candidates in trainer.pool] == sorted(known)
    for candidates in trainer.pool:
        assert len(candidates.completions) == 4
        for ids, score in zip(candidates.completions, candidates.scores, strict=True):
            assert 1 <= len(ids) <= 5 and EOS not in ids[:-1]
            assert score == sum(token in (0, 4) for token in ids)


def test_rounds_go_through_the_prompts(run_dir: Path) -> None:
    trainer = rft_trainer(run_dir, rft={"prompts_per_round": 4, "n_improve_steps": 1})
    rounds = []
    for _ in range(2):
        trainer.step()
        rounds.append({candidates.prompt_ids for candidates in trainer.pool})
    assert [len(prompts) for prompts in rounds] == [4, 4]
    assert rounds[0] | rounds[1] == {prompt.token_ids for prompt in trainer.prompts}


def test_rollouts_are_written_where_asked_for(run_dir: Path) -> None:
    trainer = rft_trainer(run_dir, tracking={"rollouts": True})
    trainer.step()
    rows = [json.loads(line) for line in (run_dir / "rollouts" / "step_1.jsonl").read_text().splitlines()]
    assert len(rows) == len(PROMPTS) * 4
    assert all(row["kl"] is None and row["reward_status"] == "ok" for row in rows)


def test_the_policy_learns_what_is_rewarded(run_dir: Path) -> None:
    trainer = rft_trainer(
        run_dir,
        rft={"n_generations_per_prompt": 16, "batch_size": 16, "updates_per_step": 8},
        optimizer={"learning_rate": 3e-3},
        metric_fn=lambda outputs, **_: {"vowels": vowels(outputs)},
        train={"total_steps": 8, "eval_every": 8, "eval_repeats": 8},
    )
    before = trainer.evaluate(repeats=20)["eval/reward"]
    trainer.fit()
    after = trainer.evaluate(repeats=20)
    assert after["eval/reward"] > before + 1.5  # of at most 5
    assert after["eval/vowels"] == after["eval/reward"]
    assert trainer.default_best_metric == "eval/vowels"
    saved = GPT2LMHeadModel.from_pretrained(run_dir / "checkpoints" / "step_8")
    assert torch.equal(parameters(saved), parameters(trainer.lm))
    assert len(trainer.generate(["a", "bc"], greedy=True)) == 2


# ------------------------------------------------------------------------------------------- failures, resume


def broken(outputs: Sequence[str], **_: Any) -> list[float]:
    """A reward function that never has a reward."""
    return [math.nan for _ in outputs]


def test_rewards_that_all_fail_stop_the_run_or_are_dropped(tmp_path: Path) -> None:
    with pytest.raises(RewardInvalidError, match="32 of 32 samples got no reward"):
        rft_trainer(tmp_path / "raise", reward_fn=broken).step()
    dropping = {"failure": {"policy": "drop", "max_fraction": 1.0}}
    metrics = rft_trainer(tmp_path / "drop", reward_fn=broken, reward=dropping).step()
    assert metrics["reward/failed_fraction"] == 1.0 and metrics["rft/kept"] == 0


@pytest.mark.parametrize("interrupted_after", [2, 3])  # between two rounds, and within one
def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path: Path, interrupted_after: int) -> None:
    def made(run_dir: Path) -> RFTTrainer:
        return rft_trainer(
            run_dir,
            rft={"prompts_per_round": 3},
            optimizer={"learning_rate": 5e-3},
            scheduler={"name": "cosine", "warmup_updates": 3},
            train={"save_every": 1, "eval_every": 2, "resume": "auto", "run_dir": run_dir},
        )

    calm, storm = tmp_path / "calm", tmp_path / "storm"
    made(calm).fit()
    shutil.copytree(calm, storm, symlinks=True)
    (storm / "best").unlink(missing_ok=True)
    for step, folder in steps_of(storm).items():
        if step > interrupted_after:
            shutil.rmtree(folder)
    resumed = made(storm)
    assert resumed.run.step == interrupted_after
    assert bool(resumed.pool) == (interrupted_after == 3)
    resumed.fit()

    def rows(folder: Path) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if not key.startswith(CLOCK)} for row in found]

    assert rows(storm) == rows(calm)
    weights = "checkpoints/step_6/model.safetensors"
    assert (storm / weights).read_bytes() == (calm / weights).read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rft": {"batch_size": 9}, "train": {"gradient_accumulation_steps": 2}},
            r"`rft.batch_size` = 9 .* 9 rows.*`train.gradient_accumulation_steps` = 2",
        ),
        ({"rft": {"prompts_per_round": 9}}, "`rft.prompts_per_round` = 9 is more than the 8 prompts"),
        ({"generation": {"max_new_tokens": 16}}, "`generation.max_new_tokens` = 16 leaves no room"),
    ],
)
def test_bad_input_is_refused_before_sampling(run_dir: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rft_trainer(run_dir, **settings)


def test_prompts_of_the_same_tokens_with_other_metadata_are_other_prompts(run_dir: Path) -> None:
    """The best completion for one answer is not the best for another."""

    def matches(outputs: list[str], answer: list[str], **_: Any) -> list[float]:
        return [float(answer[row] in output) for row, output in enumerate(outputs)]

    prompts = [{"prompt": "ab", "answer": "c"}, {"prompt": "ab", "answer": "d"}]
    trainer = rft_trainer(run_dir, prompts=prompts, reward_fn=matches)
    first, second = trainer.prompts
    rollouts = [
        replace(letters_rollout("ab", text), prompt=prompt)
        for prompt in (first, second)
        for text in ("c", "d", "e")
    ]
    pool, _ = trainer.make_batch(rollouts, scored(1.0, 0.0, 0.0, 0.0, 1.0, 0.0))
    best = [keep_best(candidates, 0.7, None).scores for candidates in pool]
    c, d = (rollouts[row].completion.token_ids for row in (0, 4))
    assert sorted(map(list, best)) == [[c], [d]] and len(pool) == 2
    same = [replace(rollout, prompt=first) for rollout in rollouts]
    assert len(trainer.make_batch(same, scored(*[1.0] * 6))[0]) == 1

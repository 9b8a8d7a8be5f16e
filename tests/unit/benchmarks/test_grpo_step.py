"""The benchmark of GRPO steps: both sides are set alike, sample as many tokens, and take turns."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.grpo_step import OURS, THEIRS, Worker, in_turns, our_trainer, table, tokens_of, write_spec
from benchmarks.policies import case_of
from benchmarks.trl_step import settings
from conch.errors import ConchError

FAKE = Path(__file__).resolve().parents[2] / "fakes" / "grpo_side.py"


def worker(name: str, tokens: int, *seconds: float) -> Worker:
    return Worker(name, [sys.executable, str(FAKE), str(tokens), *map(str, seconds)])


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    """Prompts of a step, 8 of them, 4 completions each."""
    case = case_of("dialogues", None, small=True)
    return json.loads(write_spec(tmp_path, case, "dialogues", 0.04, 3, 1).read_text())


def test_a_step_has_the_tokens_that_the_lengths_say(tmp_path: Path) -> None:
    walks = write_spec(tmp_path, case_of("walks", None), "walks", 0.0, 1, 1)
    assert tokens_of(json.loads(walks.read_text())) == 128 * 9
    dialogues = {"lengths": [2, 3, 50], "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 64}
    assert tokens_of(dialogues) == 4 * (2 + 3)


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_our_side_samples_the_lengths_drawn_with_a_reference_where_beta_wants_one(
    spec: dict[str, Any], beta: float
) -> None:
    trainer = our_trainer({**spec, "beta": beta})
    try:
        metrics = trainer.step()
    finally:
        trainer.close()
    assert round(metrics["rollout/length_mean"] * 32) == tokens_of(spec)
    assert len(set(spec["lengths"])) > 1
    assert (trainer.reference is None) == (beta == 0)


def test_both_sides_are_set_alike(spec: dict[str, Any]) -> None:
    theirs, trainer = settings(spec), our_trainer(spec)
    trainer.close()
    ours = trainer.config
    completions = ours.grpo.prompts_per_step * ours.grpo.group_size
    accumulated = ours.train.gradient_accumulation_steps
    assert theirs["gradient_accumulation_steps"] == accumulated == 4
    assert theirs["per_device_train_batch_size"] * accumulated == completions == 32
    assert theirs["num_generations"] == ours.grpo.group_size
    assert theirs["max_completion_length"] == ours.generation.max_new_tokens
    assert theirs["beta"] == ours.grpo.kl.coef
    assert theirs["loss_type"] == ours.grpo.loss
    assert theirs["learning_rate"] == ours.optimizer.learning_rate
    assert theirs["gradient_checkpointing"] is ours.model.gradient_checkpointing is False
    assert ours.grpo.epochs == ours.grpo.minibatches == 1
    assert ours.generation.chunk_size == completions


def test_a_ratio_is_of_two_steps_of_one_turn_after_the_warm_up() -> None:
    spec = {"steps": 3, "prompts_per_step": 2, "group_size": 2, "lengths": [1, 2], "beta": 0.0}
    workers = [worker(OURS, 6, 9.0, 1.0, 3.0), worker(THEIRS, 6, 1.0, 2.0, 2.0)]
    try:
        found = in_turns(spec, workers, warm_up=1)
    finally:
        for each in workers:
            each.kill()
    assert found["seconds"][OURS] == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert found["ratio"] == {"median": 1.0, "low": 0.5, "high": 1.5}
    lines = table({"results": [{"case": "walks", **found}]}).splitlines()
    assert lines[2].startswith("| walks | 4, 6 | 0.0 | 2.000 (1.000-3.000) | 2.000 (2.000-2.000) | 1.00 ")
    assert lines[-1] == "TRL: trl 1"


def test_other_tokens_and_a_dead_side_are_told() -> None:
    side = worker(THEIRS, 6, 1.0)
    try:
        with pytest.raises(ConchError, match="TRL sampled 6 tokens in a step instead of 7"):
            side.step(7)
        side.end()
        with pytest.raises(ConchError, match="the process of TRL has ended"):
            side.step(6)
    finally:
        side.kill()

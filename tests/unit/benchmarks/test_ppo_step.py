"""The benchmark of PPO steps: forced lengths, phases, and weights beside the policy's."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.policies import Case, case_of, walk_case
from benchmarks.ppo_step import (
    PHASES,
    bytes_beside,
    dialogue_trainer,
    phases_of,
    reference_cost,
    walk_trainer,
)
from conch.config import ModelConfig, load
from conch.models.freezing import freeze_layers
from conch.models.reference import FullCopyReference, SharedTrunkReference


@pytest.fixture(scope="module")
def case() -> Case:
    return case_of("dialogues", None, small=True)


def test_responses_of_a_step_have_the_lengths_drawn(case: Case, tmp_path: Path) -> None:
    trainer = dialogue_trainer(tmp_path, case)
    try:
        rollouts = trainer.rollout(trainer.prompts)
    finally:
        trainer.close()
    assert [rollout.prompt.token_ids for rollout in rollouts] == [each.token_ids for each in case.prompts]
    assert [len(rollout.completion.token_ids) for rollout in rollouts] == case.expected


def test_phases_make_up_the_steps_that_count(case: Case, tmp_path: Path) -> None:
    found = phases_of(dialogue_trainer(tmp_path, case), steps=1, warm_up=1)
    parts = sum(found["seconds"][name]["median"] for name in PHASES)
    assert 0 < parts <= found["seconds"]["step"]["median"]
    assert min(case.expected) <= found["response_tokens"] <= max(case.expected)
    assert found["peak_bytes"] > 100 << 20


def test_walks_are_those_of_trlx(tmp_path: Path) -> None:
    start = tmp_path / "start"
    walks = walk_case()
    walks.model().save_pretrained(start)
    walks.tokenizer.save_pretrained(start)
    trainer = walk_trainer(tmp_path, start, 20)
    trainer.close()
    ppo = trainer.config.ppo
    assert (ppo.rollouts_per_step, ppo.epochs * ppo.minibatches) == (140, 8)
    assert trainer.config.generation.chunk_size == 20
    assert trainer.config.generation.max_new_tokens == 9
    assert isinstance(trainer.reference, FullCopyReference)


def test_only_weights_that_a_reference_holds_alone_are_counted(case: Case) -> None:
    lm = case.model()
    width = case.model_config.n_embd
    block, norm = 12 * width**2 + 13 * width, 2 * width
    embeddings = (case.model_config.vocab_size + case.model_config.n_positions) * width
    assert bytes_beside(FullCopyReference(lm), lm) == 4 * (embeddings + block + norm)  # one block in all
    freeze_layers(lm, load(ModelConfig, {"path": "", "num_layers_unfrozen": 1}))
    assert (
        bytes_beside(SharedTrunkReference(lm, 1), lm) == 4 * block
    )  # the norm is not trained, so both have one


def test_both_references_are_measured(case: Case) -> None:
    shared, full = (reference_cost(case, shared=shared, rounds=2) for shared in (True, False))
    assert 0 < shared["weight_bytes"] < full["weight_bytes"]
    for found in (shared, full):
        assert found["seconds"]["both"]["median"] >= found["seconds"]["policy"]["low"] > 0
        assert found["peak_bytes"] >= found["weight_bytes"]

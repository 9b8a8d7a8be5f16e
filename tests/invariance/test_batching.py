"""How a batch is cut and padded changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.invariance.scenarios import PAIRS, REWARDS, ROLLOUTS, SAMPLES, SCORED, SMALL
from tests.runs import (
    LINEAR_ADAM,
    batch_of,
    parameters,
    policy,
    ppo_trainer,
    reward_trainer,
    sft_trainer,
)

ACCUMULATION = pytest.mark.parametrize("steps", [2, 4, 8])


def cut(steps: int) -> dict[str, Any]:
    """The same batch in so many micro-batches; weights after the update tell its gradient."""
    return {"train": {"gradient_accumulation_steps": steps}, "optimizer": LINEAR_ADAM}


def sft_update(run_dir: Path, steps: int) -> tuple[torch.Tensor, float]:
    trainer = sft_trainer(run_dir, SAMPLES, lm=policy(**SMALL), **cut(steps))
    metrics = trainer.update(trainer.experience(trainer.samples))
    return parameters(trainer.lm), metrics["train/loss"]


def ppo_update(run_dir: Path, steps: int) -> tuple[torch.Tensor, float]:
    trainer = ppo_trainer(run_dir, lm=policy(**SMALL), **cut(steps))
    metrics = trainer.update(batch_of(trainer, ROLLOUTS, REWARDS))
    return parameters(trainer.policy.lm), metrics["train/loss"]


@ACCUMULATION
@pytest.mark.parametrize("update", [sft_update, ppo_update])
def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path: Path, update: Any, steps: int) -> None:
    whole, loss = update(tmp_path / "whole", 1)
    found, loss_in_parts = update(tmp_path / "parts", steps)
    torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-12)
    assert loss_in_parts == pytest.approx(loss, rel=1e-10)


@ACCUMULATION
@pytest.mark.parametrize("rows", [SCORED, PAIRS], ids=["regression", "pairs"])
def test_accumulation_gives_the_same_reward_model(
    tmp_path: Path, rows: list[dict[str, Any]], steps: int
) -> None:
    found = []
    for number in (1, steps):
        trainer = reward_trainer(tmp_path / str(number), rows, **cut(number))
        trainer.step()
        found.append(parameters(trainer.model))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("forward_batch_size", [1, 3, 8])
def test_forward_batch_size_does_not_change_experience(tmp_path: Path, forward_batch_size: int) -> None:
    whole = batch_of(ppo_trainer(tmp_path / "whole", ppo={"forward_batch_size": 64}), ROLLOUTS, REWARDS)
    settings = {"forward_batch_size": forward_batch_size}
    parts = batch_of(ppo_trainer(tmp_path / "parts", ppo=settings), ROLLOUTS, REWARDS)
    for name in ("old_logprobs", "old_values", "advantages", "returns"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=0, atol=1e-10)


def test_order_of_samples_does_not_change_the_update(tmp_path: Path) -> None:
    found = []
    for name, order in (("forth", slice(None)), ("back", slice(None, None, -1))):
        trainer = ppo_trainer(tmp_path / name, lm=policy(**SMALL), optimizer=LINEAR_ADAM)
        trainer.update(batch_of(trainer, ROLLOUTS[order], REWARDS[order]))
        found.append(parameters(trainer.policy))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "settings",
    [
        {"train": {"gradient_accumulation_steps": 4}},
        {"model": {"gradient_checkpointing": True}},
        {"sft": {"packing": True}},
        {
            "train": {"gradient_accumulation_steps": 2},
            "model": {"gradient_checkpointing": True},
            "sft": {"packing": True},
        },
    ],
    ids=["accumulated", "checkpointed", "packed", "all"],
)
def test_every_layout_of_a_batch_gives_the_same_update(tmp_path: Path, settings: dict[str, Any]) -> None:
    found = []
    for name, changed in (("plain", {}), ("other", settings)):
        sections = {key: dict(value) for key, value in changed.items()}
        if "model" in sections:
            sections["model"]["architecture"] = {"model_type": "gpt2"}
        lm = policy(**SMALL)
        trainer = sft_trainer(tmp_path / name, SAMPLES, lm=lm, optimizer=LINEAR_ADAM, **sections)
        losses = [trainer.update(trainer.experience(trainer.samples))["train/loss"] for _ in range(3)]
        found.append((parameters(trainer.lm), losses))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-9, atol=1e-11)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-10)

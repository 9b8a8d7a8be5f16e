"""Evaluations leave training as it is, and measure the distribution that they sample."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conch.trainers.ppo import PPOTrainer
from tests.runs import (
    PROMPTS,
    TOKENIZER,
    grpo_trainer,
    ilql_trainer,
    policy,
    ppo_trainer,
    rft_trainer,
    sft_trainer,
    shake,
    vowels,
)

SAMPLES = ["ab", "abcdefgh", "c", "hgfedcba", "de", "bcdefghab", "fg", "ccccccc"]

ALWAYS = {"eval/reward", "eval/reward_standard_error", "eval/length_mean"}


def dice(outputs: list[str], **_: Any) -> dict[str, list[float]]:
    """A user's metric that draws from every generator there is."""
    draws = random.random() + float(np.random.rand()) + float(torch.rand(()))
    return {"dice": [draws] * len(outputs)}


TRAINERS: dict[str, Callable[..., Any]] = {
    "ppo": ppo_trainer,
    "grpo": grpo_trainer,
    "rft": rft_trainer,
    "sft": lambda run_dir, **given: sft_trainer(run_dir, SAMPLES, reward_fn=vowels, **given),
    "ilql": lambda run_dir, **given: ilql_trainer(
        run_dir, SAMPLES, [1.0] * len(SAMPLES), reward_fn=vowels, **given
    ),
}


def test_a_distance_that_is_no_number_has_no_root(tmp_path: Path) -> None:
    trainer = ppo_trainer(tmp_path / "run", eval_prompts=["a"])
    found = trainer.evaluator.run(extra=lambda rollouts, variant: {"eval/kl": float("nan")})
    trainer.close()
    assert np.isnan(found["eval/sqrt_kl"])


@pytest.mark.parametrize("kind", TRAINERS)
def test_an_evaluation_changes_nothing_that_is_drawn_later(tmp_path: Path, kind: str) -> None:
    """`train.eval_every` may change on resume: one that evaluates and one that does not are the same."""
    given = {"eval_prompts": ["a", "b"], "metric_fn": dice}
    evaluated, other = (TRAINERS[kind](tmp_path / name, **given) for name in ("evaluated", "other"))

    def outcome(trainer: Any, *, evaluates: bool) -> tuple[Any, ...]:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        found = []
        for _ in range(2):
            if evaluates:
                trainer.evaluate(repeats=3)
            found.append({k: v for k, v in trainer.step().items() if not k.startswith(("time/", "reward/"))})
        return found, trainer.generate(PROMPTS), random.random(), np.random.rand(), float(torch.rand(()))

    assert outcome(evaluated, evaluates=True) == outcome(other, evaluates=False)


def test_an_evaluation_comes_out_the_same_whatever_was_drawn_before(run_dir: Path) -> None:
    trainer = ppo_trainer(run_dir, metric_fn=dice)
    # The checks of types that tests add draw from Python's generator, more of them while an engine is new.
    trainer.evaluate(step=0)
    first = trainer.evaluate(step=4)
    torch.rand(5), random.random(), np.random.rand()
    assert trainer.evaluate(step=4) == first
    assert trainer.evaluate(step=5)["eval/dice"] != first["eval/dice"]
    other = ppo_trainer(run_dir.with_name("other"), metric_fn=dice, train={"seed": 1})
    assert other.evaluate(step=4)["eval/dice"] != first["eval/dice"]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def far_from_start(run_dir: Path, **settings: Any) -> tuple[PPOTrainer, Any]:
    """A trainer that samples one token, and its policy as it was at the start."""
    trainer = ppo_trainer(
        run_dir,
        lm=policy(),
        generation={"max_new_tokens": 1, "chunk_size": 800},
        ppo={"forward_batch_size": 800},
        **settings,
    )
    start = copy.deepcopy(trainer.lm)
    shake(trainer.lm, 0.1)
    return trainer, start


def exact_kl(lm: Any, start: Any, temperature: float) -> float:
    """KL(lm || start) of the token after each prompt, in nats; mean over the prompts."""
    total = 0.0
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
            own, other = ((m(ids).logits[0, -1] / temperature).log_softmax(-1) for m in (lm, start))
            total += float((own.exp() * (own - other)).sum())
    return total / len(PROMPTS)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_kl_is_that_of_the_temperature_of_the_evaluation(run_dir: Path, temperature: float) -> None:
    trainer, start = far_from_start(run_dir, eval_generation={"temperature": temperature})
    expected = exact_kl(trainer.lm, start, temperature)
    assert trainer.evaluate(repeats=400)["eval/kl"] == pytest.approx(expected, rel=0.1)
    assert exact_kl(trainer.lm, start, 1.0) != pytest.approx(expected, rel=0.5)


@pytest.mark.parametrize("cut", [{"do_sample": False}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
def test_completions_that_no_temperature_gives_have_no_kl(run_dir: Path, cut: dict[str, Any]) -> None:
    trainer, _ = far_from_start(run_dir, eval_generation=cut)
    assert trainer.evaluate().keys() == ALWAYS


def test_a_sweep_names_what_its_last_value_has(run_dir: Path) -> None:
    trainer, _ = far_from_start(run_dir, eval_generation={"top_k": [0, 2]})
    assert trainer.evaluate().keys() == {
        *(f"{name}{suffix}" for name in ALWAYS for suffix in ("", "@top_k=0", "@top_k=2")),
        *("eval/kl@top_k=0", "eval/sqrt_kl@top_k=0"),
    }

"""Real SFT trainers of a tiny model: loss by hand, weights after an update, what is refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from conch.errors import ConfigError, DataError, ModelError
from tests.runs import EOS, LINEAR_ADAM, TOKENIZER, parameters, policy, sft_trainer
from tests.tiny import char_tokenizer

SAMPLES = ["abc", {"prompt": "ab", "completion": "cdefg"}, "h", {"prompt": "", "completion": "gf"}]
IDS = [[0, 1, 2, EOS], [0, 1, 2, 3, 4, 5, 6, EOS], [7, EOS], [6, 5, EOS]]
FIRST_LEARNED = [1, 2, 1, 1]
NUM_LEARNED = 3 + 6 + 1 + 2


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def negative_log_likelihood(lm: GPT2LMHeadModel) -> torch.Tensor:
    """Of SAMPLES, sample by sample without padding, over the number of learned tokens."""
    total = torch.zeros((), dtype=torch.float64)
    for ids, first in zip(IDS, FIRST_LEARNED, strict=True):
        logprobs = lm(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        total = total - sum(logprobs[t - 1, ids[t]] for t in range(first, len(ids)))
    return total / NUM_LEARNED


def test_loss_is_the_mean_over_learned_tokens(run_dir: Path) -> None:
    lm = policy()
    expected = float(negative_log_likelihood(copy.deepcopy(lm).eval().double()).detach())
    trainer = sft_trainer(run_dir, SAMPLES, lm=lm, sft={"batch_size": 4}, eval_samples=SAMPLES)
    assert trainer.evaluate()["eval/loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.step()["train/loss"] == pytest.approx(expected, rel=1e-6)


def test_update_is_adam_on_that_loss(run_dir: Path) -> None:
    lm = policy().double()
    reference = copy.deepcopy(lm)
    negative_log_likelihood(reference).backward()
    trainer = sft_trainer(run_dir, SAMPLES, lm=lm, sft={"batch_size": 4}, optimizer=LINEAR_ADAM)
    metrics = trainer.step()
    # Adam's first step is lr * g / (|g| + eps), with lr 0.1 and eps 1.
    for moved, start in zip(trainer.lm.parameters(), reference.parameters(), strict=True):
        assert start.grad is not None
        expected = start.detach() - 0.1 * start.grad / (start.grad.abs() + 1.0)
        torch.testing.assert_close(moved.detach(), expected, rtol=1e-9, atol=1e-12)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in reference.parameters() if p.grad is not None))
    assert metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-6)


def test_gradient_is_clipped_before_the_step(run_dir: Path) -> None:
    lm = policy().double()
    reference = copy.deepcopy(lm)
    negative_log_likelihood(reference).backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
    train = {"max_grad_norm": 0.01}
    trainer = sft_trainer(run_dir, SAMPLES, lm=lm, sft={"batch_size": 4}, optimizer=LINEAR_ADAM, train=train)
    assert trainer.step()["train/grad_norm"] > 0.1  # reported as it was
    for moved, start in zip(trainer.lm.parameters(), reference.parameters(), strict=True):
        assert start.grad is not None
        expected = start.detach() - 0.1 * start.grad / (start.grad.abs() + 1.0)
        torch.testing.assert_close(moved.detach(), expected, rtol=1e-6, atol=1e-9)


def test_prompts_are_not_learned(tmp_path: Path) -> None:
    losses = []
    for name, first in (("1", "ab"), ("2", "ba")):
        lm = policy(n_layer=1)
        with torch.no_grad():  # attention and position see nothing: only the token before counts
            lm.transformer.h[0].attn.c_proj.weight.zero_()
            lm.transformer.h[0].attn.c_proj.bias.zero_()
            lm.transformer.wpe.weight.zero_()
        sample = {"prompt": first + "h", "completion": "c"}
        losses.append(
            sft_trainer(tmp_path / name, [sample], lm=lm, sft={"batch_size": 1}).step()["train/loss"]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_weight_decay_leaves_biases_and_norms(run_dir: Path) -> None:
    trainer = sft_trainer(run_dir, ["ab"], optimizer={"learning_rate": 0.1, "weight_decay": 1.0, "eps": 1e9})
    before = {name: parameter.detach().clone() for name, parameter in trainer.lm.named_parameters()}
    trainer.step()  # eps leaves nothing of the gradient
    for name, parameter in trainer.lm.named_parameters():
        expected = before[name] * (0.9 if parameter.ndim == 2 else 1.0)
        torch.testing.assert_close(parameter.detach(), expected, msg=name)


@pytest.mark.parametrize(
    ("name", "expected"), [("linear", [0.5, 1.0, 0.75, 0.5, 0.25]), ("constant", [0.5, 1.0, 1.0, 1.0, 1.0])]
)
def test_schedule_counts_updates_after_warmup(run_dir: Path, name: str, expected: list[float]) -> None:
    trainer = sft_trainer(
        run_dir,
        SAMPLES,
        train={"total_steps": 6, "gradient_accumulation_steps": 2},
        sft={"batch_size": 4},
        scheduler={"name": name, "warmup_updates": 2},
        optimizer={"learning_rate": 1.0, "eps": 1e6},
    )
    assert trainer.step()["train/learning_rate"] == 0.0
    assert [trainer.step()["train/learning_rate"] for _ in range(5)] == pytest.approx(expected)
    if name == "linear":
        before = parameters(trainer.lm)
        assert trainer.step()["train/learning_rate"] == 0.0
        assert torch.equal(parameters(trainer.lm), before)


def test_evaluation_runs_without_dropout_and_training_with_it(run_dir: Path) -> None:
    lm = policy(resid_pdrop=0.3, embd_pdrop=0.3).eval()  # as `from_pretrained` returns it
    trainer = sft_trainer(run_dir, SAMPLES, lm=lm, eval_samples=SAMPLES, model={"disable_dropout": False})
    expected = float(negative_log_likelihood(copy.deepcopy(lm).eval().double()).detach())
    assert trainer.evaluate()["eval/loss"] == pytest.approx(expected, rel=1e-6)
    batch = trainer.experience(trainer.samples)
    first, second = (trainer.engine.module(input_ids=batch.input_ids).logits for _ in range(2))
    assert not torch.equal(first, second)


def test_only_unfrozen_layers_move(run_dir: Path) -> None:
    trainer = sft_trainer(run_dir, SAMPLES, model={"num_layers_unfrozen": 1})
    before = {name: parameter.detach().clone() for name, parameter in trainer.lm.named_parameters()}
    trainer.step()
    moved = {name for name, p in trainer.lm.named_parameters() if not torch.equal(p.detach(), before[name])}
    assert moved and all(name.startswith("transformer.h.1.") for name in moved)


def test_fit_learns_and_saves_a_loadable_model(run_dir: Path) -> None:
    trainer = sft_trainer(
        run_dir,
        ["abcd"],
        eval_samples=["abcd"],
        train={"total_steps": 20, "eval_every": 20},
        sft={"batch_size": 2},
        optimizer={"learning_rate": 0.01},
    )
    before = trainer.evaluate()["eval/loss"]
    trainer.fit()
    assert trainer.evaluate()["eval/loss"] < 0.1 * before
    saved = GPT2LMHeadModel.from_pretrained(run_dir / "checkpoints" / "step_20")
    assert torch.equal(parameters(saved), parameters(trainer.lm))


@pytest.mark.parametrize(
    ("samples", "settings", "error", "message"),
    [
        ([], {}, DataError, "empty"),
        (["a" * 16], {}, DataError, "sample 0 has 17 tokens.*window holds 16"),
        (
            ["a"],
            {"sft": {"batch_size": 9}, "train": {"gradient_accumulation_steps": 2}},
            ConfigError,
            r"`sft.batch_size` = 9 .* 9 rows.*`train.gradient_accumulation_steps` = 2",
        ),
        (["a"], {"model": {"num_layers_unfrozen": 5}}, ConfigError, "is 5; the model has 2 layers"),
    ],
)
def test_bad_input_is_refused_before_training(
    run_dir: Path, samples: list[Any], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sft_trainer(run_dir, samples, **settings)


def test_a_tokenizer_of_another_model_is_refused(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.runs.TOKENIZER", char_tokenizer("abcdefghijklm"))
    with pytest.raises(ModelError, match="has id 13, the vocabulary ends at 10"):
        sft_trainer(run_dir, ["a"], lm=policy(vocab_size=len(TOKENIZER)))

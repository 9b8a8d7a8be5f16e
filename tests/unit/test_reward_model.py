"""Real reward-model trainers: losses and rank correlation by hand, and what is saved."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from conch.config import load
from conch.errors import ConfigError, DataError, ModelError
from conch.trainers.reward_model import (
    RewardModelConfig,
    RewardModelRunConfig,
    RewardModelTrainer,
    check_rows,
    rank_correlation,
)
from tests.runs import EOS, LINEAR_ADAM, PAD, TOKENIZER, reward_trainer

SCORED = [
    {"text": "abc", "score": 0.5},
    {"text": "h", "score": -1},
    {"text": "defgh", "score": 2.0},
    {"text": "ba", "score": 0.0},
]
PAIRS = [{"chosen": "abc", "rejected": "cb"}, {"chosen": "h", "rejected": "gfedcb"}]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def score(model: torch.nn.Module, text: str) -> torch.Tensor:
    """Of one text with its eos, without padding, at its last token."""
    ids = torch.tensor([[*("abcdefgh".index(letter) for letter in text), EOS]])
    hidden = model.transformer(input_ids=ids).last_hidden_state[0, -1]
    return model.score(hidden)[0]


def test_regression_loss_is_the_mean_squared_error(run_dir: Path) -> None:
    trainer = reward_trainer(run_dir, SCORED, eval_samples=SCORED, reward_model={"batch_size": 4})
    reference = copy.deepcopy(trainer.model).double()
    errors = [(float(score(reference, row["text"]).detach()) - row["score"]) ** 2 for row in SCORED]
    assert trainer.evaluate()["eval/loss"] == pytest.approx(sum(errors) / 4, rel=1e-5)
    assert trainer.step()["train/loss"] == pytest.approx(sum(errors) / 4, rel=1e-5)


def test_pair_loss_is_bradley_terry(run_dir: Path) -> None:
    trainer = reward_trainer(run_dir, PAIRS, eval_samples=PAIRS, reward_model={"batch_size": 2})
    reference = copy.deepcopy(trainer.model).double()
    margins = [
        float((score(reference, r["chosen"]) - score(reference, r["rejected"])).detach()) for r in PAIRS
    ]
    expected = sum(math.log(1 + math.exp(-margin)) for margin in margins) / 2
    metrics = trainer.evaluate()
    assert metrics["eval/loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval/accuracy"] == sum(margin > 0 for margin in margins) / 2
    assert trainer.step()["train/loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", [SCORED, PAIRS], ids=["regression", "pairs"])
def test_update_is_adam_on_that_loss(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    trainer = reward_trainer(run_dir, rows, reward_model={"batch_size": len(rows)}, optimizer=LINEAR_ADAM)
    reference = copy.deepcopy(trainer.model).double()
    if rows is SCORED:
        losses = [(score(reference, row["text"]) - row["score"]) ** 2 for row in rows]
    else:
        losses = [
            torch.log1p((score(reference, r["rejected"]) - score(reference, r["chosen"])).exp()) for r in rows
        ]
    (torch.stack(losses).sum() / len(rows)).backward()
    trainer.step()
    for moved, start in zip(trainer.model.parameters(), reference.parameters(), strict=True):
        assert start.grad is not None
        expected = start.detach() - 0.1 * start.grad / (start.grad.abs() + 1.0)
        torch.testing.assert_close(moved.detach().double(), expected, rtol=1e-4, atol=1e-6)


def test_the_same_pair_twice_says_nothing(run_dir: Path) -> None:
    trainer = reward_trainer(run_dir, [{"chosen": "ab", "rejected": "ab"}])
    metrics = trainer.step()
    assert metrics["train/loss"] == pytest.approx(math.log(2)) and metrics["train/grad_norm"] < 1e-6


def test_score_is_read_at_the_eos_whatever_the_padding(run_dir: Path) -> None:
    trainer = reward_trainer(run_dir, SCORED)
    texts = trainer.experience(SCORED).texts  # pyright: ignore[reportAttributeAccessIssue]
    assert texts.input_ids.tolist() == [
        [0, 1, 2, EOS, PAD, PAD],
        [7, EOS, PAD, PAD, PAD, PAD],
        [3, 4, 5, 6, 7, EOS],
        [1, 0, EOS, PAD, PAD, PAD],
    ]
    together = trainer.model(input_ids=texts.input_ids, attention_mask=texts.attention_mask.long()).logits[
        :, 0
    ]
    alone = torch.stack([score(trainer.model, row["text"]) for row in SCORED])
    torch.testing.assert_close(together, alone)


def test_template_wraps_every_text(run_dir: Path) -> None:
    trainer = reward_trainer(run_dir, SCORED, reward_model={"batch_size": 4, "template": "h{text}g"})
    assert trainer.experience(SCORED[1:2]).texts.input_ids.tolist() == [[7, 7, 6]]  # pyright: ignore[reportAttributeAccessIssue]


def test_long_texts_are_cut_to_max_length(run_dir: Path) -> None:
    trainer = reward_trainer(run_dir, SCORED, reward_model={"batch_size": 4, "max_length": 3})
    assert trainer.experience(SCORED).texts.input_ids.shape == (4, 3)  # pyright: ignore[reportAttributeAccessIssue]


def test_new_head_starts_as_published(run_dir: Path) -> None:
    # Before the noise that the helper adds: N(0, 1 / (d + 1)), no bias.
    wide = {
        "architecture": {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 2048, "vocab_size": 11}
    }
    config = load(RewardModelRunConfig, {"model": wide, "train": {"run_dir": run_dir}})
    trainer = RewardModelTrainer(config, samples=SCORED, tokenizer=TOKENIZER)
    weight = trainer.model.score.weight.detach()
    assert float(weight.std()) == pytest.approx(1 / math.sqrt(2049), rel=0.06)
    assert abs(float(weight.mean())) < 4 / 2049


# ------------------------------------------------------------------------------------------- rank correlation


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([1, 2, 3], [10, 20, 1000], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        # Ranks 1 2 3 4 5 against 2 1 4 3 5: 1 - 6 * 4 / (5 * 24).
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),
        # Ranks 1 2.5 2.5 4 against 1 2 3 4: covariance 4.5, squares 4.5 and 5.
        ([0, 5, 5, 9], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5)),
        # Ranks 2 2 2 4 against 1.5 1.5 3.5 3.5: covariance 2, squares 3 and 4.
        ([7, 7, 7, 8], [0, 0, 1, 1], 2 / math.sqrt(3 * 4)),
        ([1, 1, 1], [1, 2, 3], 0.0),
    ],
)
def test_rank_correlation_by_hand(left: list[float], right: list[float], expected: float) -> None:
    x, y = [float(value) for value in left], [float(value) for value in right]
    assert rank_correlation(x, y) == pytest.approx(expected)
    assert rank_correlation(y, x) == pytest.approx(expected)


# ----------------------------------------------------------------------------------------------------- saving


def test_saved_model_scores_the_same_and_says_how(run_dir: Path) -> None:
    trainer = reward_trainer(run_dir, SCORED, eval_samples=SCORED[:3])
    trainer.step()
    folder = trainer.save_pretrained(run_dir / "saved")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(
        ["abc<eos>", "h<eos>", "defgh<eos>"], padding=True, padding_side="right", return_tensors="pt"
    )
    with torch.no_grad():
        loaded = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits[:, 0]
        trained = torch.stack([score(trainer.model, row["text"]) for row in SCORED[:3]])
    torch.testing.assert_close(loaded, trained, rtol=1e-5, atol=1e-6)
    metadata = json.loads((folder / "reward_model.json").read_text())
    assert metadata == {
        "template": "{text}{eos}",
        "pooling": "hf",
        "max_length": 16,
        "reward_names": ["reward"],
        "mean": pytest.approx(float(trained.mean()), rel=1e-4),
        "std": pytest.approx(float(trained.std(correction=0)), rel=1e-4),
    }


def test_moments_of_pairs_are_those_of_the_chosen(run_dir: Path) -> None:
    trainer = reward_trainer(run_dir, PAIRS)
    metadata = json.loads((trainer.save_pretrained(run_dir / "saved") / "reward_model.json").read_text())
    chosen = [float(score(trainer.model, row["chosen"]).detach()) for row in PAIRS]
    assert metadata["mean"] == pytest.approx(sum(chosen) / 2, rel=1e-4)


def test_fit_ranks_held_out_texts(run_dir: Path) -> None:
    texts = [first + second for first in "abcdefgh" for second in "abcdefgh"]
    rows = [{"text": text, "score": float(text.count("a") - text.count("h"))} for text in texts]
    trainer = reward_trainer(
        run_dir,
        rows[::2],
        eval_samples=rows[1::2],
        reward_model={"batch_size": 32},
        train={"total_steps": 40},
        optimizer={"learning_rate": 0.01},
    )
    trainer.fit()
    assert trainer.evaluate()["eval/spearman"] > 0.8
    assert (run_dir / "checkpoints" / "step_40" / "reward_model.json").is_file()


def test_frozen_trunk_trains_top_and_head(run_dir: Path) -> None:
    trainer = reward_trainer(run_dir, SCORED, model={"num_layers_unfrozen": 1})
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.step()
    moved = {
        name for name, p in trainer.model.named_parameters() if not torch.equal(p.detach(), before[name])
    }
    assert "score.weight" in moved
    assert all(name.startswith(("transformer.h.1.", "score.")) for name in moved)


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([*SCORED, {"text": "a"}], r"row 4: its score None is not a finite number"),
        ([*SCORED, PAIRS[0]], r'row 4 has no string "text".*chosen, rejected'),
        ([PAIRS[0], {"chosen": "a"}], r'row 1 has no string "rejected"'),
        ([PAIRS[0], SCORED[0]], r'row 1 has no string "chosen"'),
        ([{"text": 3, "score": 1.0}], r'row 0 has no string "text"'),
        (["just text"], r'row 0 has no string "chosen".*just text'),
        ([SCORED[0], "just text"], r'row 1 has no string "text"'),
        ([{"text": "a", "score": float("nan")}], "row 0: its score nan"),
        ([{"text": "a", "score": "5"}], "row 0: its score '5'"),
    ],
)
def test_bad_rows_are_refused_by_number(rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_rows(rows)


def test_rows_of_two_kinds_are_refused(run_dir: Path) -> None:
    with pytest.raises(DataError, match="different kinds"):
        reward_trainer(run_dir, SCORED, eval_samples=PAIRS)


def test_batches_that_do_not_divide_are_refused(run_dir: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"`reward_model.batch_size` = 6 .*`train.gradient_accumulation_steps` = 4"
    ):
        reward_trainer(
            run_dir, SCORED, reward_model={"batch_size": 6}, train={"gradient_accumulation_steps": 4}
        )


def test_pad_that_is_eos_is_refused(run_dir: Path) -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ModelError, match="pad and eos are one token"):
        reward_trainer(run_dir, SCORED, tokenizer=tokenizer)


@pytest.mark.parametrize("template", ["{txt}", "{eos}", "{0}", "{text", "no text"])
def test_templates_without_text_are_refused(template: str) -> None:
    with pytest.raises(ValidationError, match="text"):
        RewardModelConfig(template=template)

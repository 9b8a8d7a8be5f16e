"""Real reward-model trainers: losses by hand, objectives, held-out rows, normalisation, and what is saved."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from conch.config import load
from conch.converters.checkpoints.reader import read_checkpoint
from conch.errors import ConfigError, DataError, ModelError
from conch.trainers.reward_model import (
    RewardModelConfig,
    RewardModelRunConfig,
    RewardModelTrainer,
    pair_losses,
)
from tests.numerics import network_rounding
from tests.runs import EOS, LETTERS, LINEAR_ADAM, PAD, TOKENIZER, reward_trainer
from tests.tiny import tiny_gpt2_config

SCORED = [
    {"text": "abc", "score": 0.5},
    {"text": "h", "score": -1},
    {"text": "defgh", "score": 2.0},
    {"text": "ba", "score": 0.0},
]
PAIRS = [{"chosen": "abc", "rejected": "cb"}, {"chosen": "h", "rejected": "gfedcb"}]
BERT = {
    "model_type": "bert",
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def outputs(model: torch.nn.Module, text: str) -> torch.Tensor:
    """Every score of one text with its eos, without padding, at its last token."""
    ids = torch.tensor([[*("abcdefgh".index(letter) for letter in text), EOS]])
    return model.score(model.transformer(input_ids=ids).last_hidden_state[0, -1])


def score(model: torch.nn.Module, text: str) -> torch.Tensor:
    """The first of them."""
    return outputs(model, text)[0]


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
        torch.testing.assert_close(moved.detach(), expected, rtol=1e-10, atol=1e-10)


def test_pairs_of_equal_texts_say_nothing_and_are_left_out(run_dir: Path) -> None:
    equal = {"chosen": "ab", "rejected": "ab"}
    trainer = reward_trainer(run_dir, [equal, PAIRS[0]])
    assert len(trainer.samples) == 1
    with pytest.raises(DataError, match="each of the 1 pairs are equal"):
        reward_trainer(run_dir.with_name("equal"), [equal])


def test_score_is_read_at_the_eos_whatever_the_padding(run_dir: Path) -> None:
    trainer = reward_trainer(run_dir, SCORED)
    texts = trainer.experience(trainer.samples).texts  # pyright: ignore[reportAttributeAccessIssue]
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
    assert trainer.experience(trainer.samples[1:2]).texts.input_ids.tolist() == [[7, 7, 6]]  # pyright: ignore[reportAttributeAccessIssue]


def test_new_head_starts_as_published(run_dir: Path) -> None:
    # Before the noise that the helper adds: N(0, 1 / (d + 1)), no bias.
    narrow_inside = {"num_attention_heads": 1, "head_dim": 8, "intermediate_size": 8}
    shape = {"num_hidden_layers": 1, "hidden_size": 2048, "vocab_size": 11, "max_position_embeddings": 16}
    wide = {"architecture": {"model_type": "llama", **shape, **narrow_inside}}
    config = load(RewardModelRunConfig, {"model": wide, "train": {"run_dir": run_dir}})
    trainer = RewardModelTrainer(config, samples=SCORED, tokenizer=TOKENIZER)
    weight = trainer.model.score.weight.detach()
    assert float(weight.std()) == pytest.approx(1 / math.sqrt(2049), rel=0.06)
    assert abs(float(weight.mean())) < 4 / 2049


# -------------------------------------------------------------------------------------- margin and centering


def test_margin_and_centering_by_hand() -> None:
    pairs = torch.tensor([[2.0, 0.5], [-1.0, 1.0]], dtype=torch.float64)
    margins = torch.tensor([1.0, 0.0], dtype=torch.float64)
    # Ahead by 1.5, 1 of it the margin's, sum 2.5; behind by 2, sum 0.
    expected = [math.log(1 + math.exp(-0.5)) + 0.1 * 6.25, math.log(1 + math.exp(2.0))]
    assert pair_losses(pairs, margins, 0.1).tolist() == pytest.approx(expected)


def test_margin_and_centering_reach_the_loss(run_dir: Path) -> None:
    rows = [{**PAIRS[0], "margin": 2.0}, PAIRS[1]]
    trainer = reward_trainer(
        run_dir, rows, eval_samples=rows, reward_model={"batch_size": 2, "center_coef": 0.5}
    )
    reference = copy.deepcopy(trainer.model).double()
    expected = 0.0
    for row, margin in zip(rows, (2.0, 0.0), strict=True):
        chosen, rejected = (float(score(reference, row[key]).detach()) for key in ("chosen", "rejected"))
        expected += math.log(1 + math.exp(margin - chosen + rejected)) + 0.5 * (chosen + rejected) ** 2
    assert trainer.evaluate()["eval/loss"] == pytest.approx(expected / 2, rel=1e-5)
    assert trainer.step()["train/loss"] == pytest.approx(expected / 2, rel=1e-5)


# ----------------------------------------------------------------------------------------- several objectives

SEVERAL = [
    {"text": "abc", "scores": {"kind": 0.5, "brief": 1.0}},
    {"text": "h", "scores": {"kind": -1.0, "brief": 0.0}},
    {"text": "defgh", "scores": {"brief": -2.0, "kind": 2.0}},
    {"text": "ba", "scores": {"kind": 0.0, "brief": 3.0}},
]
NAMED = [
    {"chosen": "abc", "rejected": "cb", "objective": "kind"},
    {"chosen": "h", "rejected": "gfedcb", "objective": "brief"},
    {"chosen": "cb", "rejected": "ad", "objective": "brief"},
]


def test_several_scores_are_the_mean_squared_error_over_objectives(run_dir: Path) -> None:
    trainer = reward_trainer(run_dir, SEVERAL, eval_samples=SEVERAL, reward_model={"batch_size": 4})
    reference = copy.deepcopy(trainer.model).double()
    squares = [
        (found - row["scores"][name]) ** 2
        for row in SEVERAL
        for name, found in zip(("kind", "brief"), outputs(reference, row["text"]).tolist(), strict=True)
    ]
    metrics = trainer.evaluate()
    assert metrics["eval/loss"] == pytest.approx(sum(squares) / 8, rel=1e-5)
    assert metrics["eval/spearman"] == pytest.approx(
        (metrics["eval/spearman/kind"] + metrics["eval/spearman/brief"]) / 2
    )
    assert trainer.step()["train/loss"] == pytest.approx(sum(squares) / 8, rel=1e-5)


def test_a_pair_is_judged_by_the_output_of_its_objective(run_dir: Path) -> None:
    trainer = reward_trainer(run_dir, NAMED, eval_samples=NAMED, reward_model={"batch_size": 3})
    reference = copy.deepcopy(trainer.model).double()
    ahead = [
        outputs(reference, row["chosen"]).tolist()[k] - outputs(reference, row["rejected"]).tolist()[k]
        for row, k in zip(NAMED, (0, 1, 1), strict=True)
    ]
    metrics = trainer.evaluate()
    expected = sum(math.log(1 + math.exp(-gap)) for gap in ahead) / 3
    assert metrics["eval/loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval/accuracy/kind"] == float(ahead[0] > 0)
    assert metrics["eval/accuracy/brief"] == sum(gap > 0 for gap in ahead[1:]) / 2
    before = trainer.model.score.weight.detach().clone()
    trainer.update(trainer.experience(trainer.samples[:1] * 3))
    assert torch.equal(before[1], trainer.model.score.weight[1]), "a pair about `kind` moved `brief`"
    assert not torch.equal(before[0], trainer.model.score.weight[0])


def test_several_objectives_are_saved_by_name(run_dir: Path) -> None:
    trainer = reward_trainer(run_dir, SEVERAL, reward_model={"batch_size": 4})
    folder = trainer.save_pretrained(run_dir / "saved")
    metadata = json.loads((folder / "reward_model.json").read_text())
    found = torch.stack([outputs(trainer.model, row["text"]) for row in SEVERAL]).detach()
    assert metadata["reward_names"] == ["kind", "brief"]
    assert metadata["mean"] == pytest.approx(found.mean(dim=0).tolist(), rel=1e-4)
    assert metadata["std"] == pytest.approx(found.std(dim=0, correction=0).tolist(), rel=1e-4)
    assert read_checkpoint(str(folder)).rules.reward_names == ("kind", "brief")


# --------------------------------------------------------------------------------------------------- held out


def test_held_out_rows_are_evaluated_and_not_trained_on(run_dir: Path) -> None:
    rows = [{"text": first + second, "score": 1.0} for first in "abcde" for second in "abcd"]
    members = [
        reward_trainer(run_dir / str(seed), rows, reward_model={"eval_fraction": 0.2, "rng_seed": seed})
        for seed in (1, 2)
    ]
    for trainer in members:
        assert len(trainer.eval_samples) == 4 and len(trainer.samples) == 16
        assert not {row.identity for row in trainer.samples} & {row.identity for row in trainer.eval_samples}
        assert trainer.stream.length == 16
    assert members[0].eval_samples == members[1].eval_samples, "members of an ensemble must share them"


def test_given_evaluation_rows_win_over_the_fraction(run_dir: Path) -> None:
    trainer = reward_trainer(
        run_dir, SCORED, eval_samples=SCORED[:1], reward_model={"batch_size": 4, "eval_fraction": 0.5}
    )
    assert len(trainer.samples) == 4 and len(trainer.eval_samples) == 1


# --------------------------------------------------------------------------------------------------- ensemble


def test_rng_seed_names_a_member(run_dir: Path) -> None:
    rows = [{"text": letters, "score": 0.0} for letters in ("a", "b", "c", "d", "e", "f", "g", "h")]

    def member(name: str, **seeds: int) -> tuple[torch.Tensor, list[int], int]:
        train = {"seed": seeds.pop("train")}
        trainer = reward_trainer(run_dir / name, rows, train=train, reward_model=seeds, noise=0.0)
        saved = json.loads(
            (trainer.save_pretrained(run_dir / f"{name} saved") / "reward_model.json").read_text()
        )
        return trainer.model.score.weight.detach().clone(), trainer.stream.draw(8), saved["rng_seed"]

    head, order, seed = member("plain", train=3)
    same_head, same_order, same_seed = member("same", train=0, rng_seed=3)
    other_head, other_order, other_seed = member("other", train=3, rng_seed=4)
    assert torch.equal(head, same_head) and order == same_order and seed == same_seed == 3
    assert not torch.equal(head, other_head) and order != other_order and other_seed == 4


# ---------------------------------------------------------------------------------------------- normalisation


def test_normalised_head_starts_at_deviation_one(run_dir: Path) -> None:
    settings: dict[str, Any] = {"reward_model": {"batch_size": 2, "normalise": True}, "noise": 0.0}
    trainer = reward_trainer(run_dir, PAIRS, reference=["abc", "h", "gg", "fedc"], **settings)
    found = torch.stack([score(trainer.model, text) for text in ("abc", "h", "gg", "fedc")]).detach()
    assert float(found.std(correction=0)) == pytest.approx(1.0, rel=1e-5)
    (mean,), (std,) = trainer.moments()
    assert mean == pytest.approx(float(found.mean()), rel=1e-4) and std == pytest.approx(1.0, rel=1e-5)


def test_normalised_head_with_a_bias_starts_at_mean_zero_too(run_dir: Path) -> None:
    trainer = reward_trainer(
        run_dir,
        [{**row, "objective": name} for row in PAIRS for name in ("kind", "brief")],
        reference=["abc", "h", "gg", "fedc"],
        model={"architecture": BERT},
        reward_model={"batch_size": 2, "normalise": True},
        noise=0.0,
    )
    mean, std = trainer.moments()
    assert mean == pytest.approx([0.0, 0.0], abs=1e-5) and std == pytest.approx([1.0, 1.0], rel=1e-5)


def test_normalised_model_says_so_to_the_converter(run_dir: Path) -> None:
    trainer = reward_trainer(run_dir, PAIRS, reward_model={"batch_size": 2, "normalise": True})
    for _ in range(3):
        trainer.step()
    checkpoint = read_checkpoint(str(trainer.save_pretrained(run_dir / "saved")))
    rules = checkpoint.rules
    assert rules.normalise and rules.mean and rules.std
    raw = torch.stack([score(checkpoint.model, row["chosen"]) for row in PAIRS]).detach()
    served = (raw - rules.mean[0]) / rules.std[0]
    assert served.tolist() == pytest.approx([1.0, -1.0] if raw[0] > raw[1] else [-1.0, 1.0], rel=1e-4)


def test_normalising_scores_is_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"reward_model.normalise` is for preference pairs"):
        reward_trainer(run_dir, SCORED, reward_model={"batch_size": 4, "normalise": True})


def test_normalising_by_one_text_is_refused(run_dir: Path) -> None:
    with pytest.raises(DataError, match=r"scores of the 2 reference texts do not vary"):
        reward_trainer(
            run_dir, PAIRS, reference=["ab", "ab"], reward_model={"batch_size": 2, "normalise": True}
        )


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
    torch.testing.assert_close(loaded.double(), trained, rtol=0, atol=1e-10)
    metadata = json.loads((folder / "reward_model.json").read_text())
    assert metadata == {
        "template": "{text}{eos}",
        "pooling": "hf",
        "max_length": 16,
        "reward_names": ["reward"],
        "mean": pytest.approx(float(trained.mean()), rel=1e-4),
        "std": pytest.approx(float(trained.std(correction=0)), rel=1e-4),
        "normalise": False,
        "rng_seed": 0,
    }


def test_moments_that_do_not_vary_are_left_out(run_dir: Path) -> None:
    trainer = reward_trainer(run_dir, SCORED, reference=["ab"], reward_model={"batch_size": 4})
    folder = trainer.save_pretrained(run_dir / "saved")
    metadata = json.loads((folder / "reward_model.json").read_text())
    assert metadata["mean"] is metadata["std"] is None
    assert read_checkpoint(str(folder)).rules.std is None


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


def test_an_encoder_learns_with_its_own_head(run_dir: Path) -> None:
    texts = [first + second for first in "abcdefgh" for second in "abcdefgh"]
    rows = [{"text": text, "score": float(text.count("a"))} for text in texts]
    trainer = reward_trainer(
        run_dir,
        rows,
        eval_samples=rows,
        model={"architecture": BERT},
        reward_model={"batch_size": 32},
        optimizer={"learning_rate": 0.01},
    )
    before = trainer.evaluate()["eval/loss"]
    for _ in range(30):
        trainer.step()
    assert trainer.evaluate()["eval/loss"] < before / 2
    saved = read_checkpoint(str(trainer.save_pretrained(run_dir / "saved")))
    assert (saved.rules.reward_names, saved.rules.max_length) == (("reward",), 16)


def test_adapter_trains_with_the_head_and_is_saved_merged(run_dir: Path) -> None:
    trainer = reward_trainer(
        run_dir,
        PAIRS,
        model={"peft_config": {"r": 4, "target_modules": ["c_attn"]}, "merge_adapter": True},
        reward_model={"batch_size": 2, "normalise": True},
        noise=0.0,
    )
    assert trainer.moments()[1] == pytest.approx([1.0], rel=1e-5)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    for _ in range(2):  # the first update moves only one of an adapter's two matrices
        trainer.step()
    moved = {
        name for name, p in trainer.model.named_parameters() if not torch.equal(p.detach(), before[name])
    }
    assert {name.split(".")[-3] for name in moved if "lora_" in name} == {"lora_A", "lora_B"}
    assert [name for name in moved if "lora_" not in name] == ["score.modules_to_save.default.weight"]

    saved = read_checkpoint(str(trainer.save_pretrained(run_dir / "saved"))).model
    texts = trainer.experience(trainer.samples).input_ids[:, 0]  # pyright: ignore[reportAttributeAccessIssue]
    mask = (texts != PAD).long()
    with torch.no_grad():
        trained = trainer.model(input_ids=texts, attention_mask=mask).logits
        scores = saved(input_ids=texts, attention_mask=mask).logits.double()
    torch.testing.assert_close(scores, trained, rtol=0, atol=network_rounding(trained))


# -------------------------------------------------------------------------------------------------- bad input


def test_rows_of_two_kinds_are_refused(run_dir: Path) -> None:
    with pytest.raises(DataError, match=r'evaluation row 0 has no string "text"'):
        reward_trainer(run_dir, SCORED, eval_samples=PAIRS)


def test_texts_longer_than_the_window_are_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"`reward_model.max_length` is 17, the model's window 16 tokens"):
        reward_trainer(run_dir, SCORED, reward_model={"batch_size": 4, "max_length": 17})


def test_batches_that_do_not_divide_are_refused(run_dir: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"`reward_model.batch_size` = 6 .*`train.gradient_accumulation_steps` = 4"
    ):
        reward_trainer(
            run_dir, SCORED, reward_model={"batch_size": 6}, train={"gradient_accumulation_steps": 4}
        )


def test_pad_that_is_eos_gives_way_to_a_token_that_no_text_contains(run_dir: Path) -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.pad_token = tokenizer.eos_token
    trainer = reward_trainer(run_dir, SCORED, tokenizer=tokenizer)
    assert (trainer.tokenizer.pad_token, trainer.model.config.pad_token_id) == (
        "<pad>",
        TOKENIZER.pad_token_id,
    )
    assert tokenizer.pad_token == tokenizer.eos_token


def test_pad_that_is_eos_is_refused_where_there_is_no_other(run_dir: Path) -> None:
    vocabulary = {token: index for index, token in enumerate([*LETTERS, "<eos>", "<unk>"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    )
    with pytest.raises(ModelError, match="pad and eos are one token"):
        reward_trainer(run_dir, SCORED, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "template", ["{txt}", "{eos}", "{0}", "{text", "no text", "{text}{text}", "{text!r}"]
)
def test_templates_without_text_are_refused(template: str) -> None:
    with pytest.raises(ValidationError, match="text"):
        RewardModelConfig(template=template)


@pytest.mark.parametrize(("side", "kept"), [("left", [2, 3, EOS]), ("right", [0, 1, EOS])])
def test_a_tokenizer_that_is_passed_cuts_where_the_settings_say(
    run_dir: Path, side: str, kept: list[int]
) -> None:
    rows = [{"text": "abcd", "score": 1.0}, {"text": "dcba", "score": 0.0}]
    tokenizer = copy.deepcopy(TOKENIZER)
    model = {"architecture": {**tiny_gpt2_config(TOKENIZER).to_diff_dict(), "model_type": "gpt2"}}
    values = {
        "model": model,
        "reward_model": {"batch_size": 2, "max_length": 3, "eval_fraction": 0.0},
        "tokenizer": {"truncation_side": side},
        "train": {"run_dir": run_dir},
    }
    trainer = RewardModelTrainer(load(RewardModelRunConfig, values), samples=rows, tokenizer=tokenizer)
    assert list(trainer.samples[0].token_ids) == kept  # pyright: ignore[reportAttributeAccessIssue]
    assert tokenizer.truncation_side == TOKENIZER.truncation_side, "the user's own stays as it is"
    saved = AutoTokenizer.from_pretrained(trainer.save_pretrained(run_dir / "saved"))
    assert saved.truncation_side == side, "what is served cuts as it was trained"


def test_rows_of_dialogues_make_a_model_that_is_served_dialogues(run_dir: Path) -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    prompt = [{"role": "user", "content": "ab"}]
    row = {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": "c"}],
        "rejected": [{"role": "assistant", "content": "d"}],
    }
    trainer = reward_trainer(run_dir, [row] * 4, tokenizer=tokenizer)
    assert trainer.samples[0].chosen == (0, 1, EOS, 2, EOS)  # pyright: ignore[reportAttributeAccessIssue]
    folder = trainer.save_pretrained(run_dir / "saved")
    assert json.loads((folder / "reward_model.json").read_text())["template"] == "chat"

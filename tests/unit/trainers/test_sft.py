"""Real SFT trainers of a tiny model: loss by hand, weights after an update, what is refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from conch.data.samples import TokenizedSample
from conch.errors import ConfigError, DataError, ModelError
from tests.numerics import network_rounding
from tests.runs import EOS, LINEAR_ADAM, TOKENIZER, parameters, policy, sft_trainer, vowels
from tests.tiny import char_tokenizer, cycle_decoder, tiny_decoder

SAMPLES = ["abc", {"prompt": "ab", "completion": "cdefg"}, "h", {"prompt": "", "completion": "gf"}]
IDS = [[0, 1, 2, EOS], [0, 1, 2, 3, 4, 5, 6, EOS], [7, EOS], [6, 5, EOS]]
FIRST_LEARNED = [1, 2, 1, 1]
NUM_LEARNED = 3 + 6 + 1 + 2


def half_length(outputs: list[str], **_: Any) -> dict[str, list[float]]:
    return {"half_length": [len(output) / 2 for output in outputs]}


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
    lm = policy()
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
    lm = policy()
    reference = copy.deepcopy(lm)
    negative_log_likelihood(reference).backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
    train = {"max_grad_norm": 0.01}
    trainer = sft_trainer(run_dir, SAMPLES, lm=lm, sft={"batch_size": 4}, optimizer=LINEAR_ADAM, train=train)
    assert trainer.step()["train/grad_norm"] > 0.1  # reported as it was
    for moved, start in zip(trainer.lm.parameters(), reference.parameters(), strict=True):
        assert start.grad is not None
        expected = start.detach() - 0.1 * start.grad / (start.grad.abs() + 1.0)
        torch.testing.assert_close(moved.detach(), expected, rtol=0, atol=1e-9)


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
    (batch,) = trainer.experience(trainer.samples)
    first, second = (trainer.engine.module(batch) for _ in range(2))
    assert first != second


def test_of_an_encoder_decoder_the_completions_are_learned(run_dir: Path) -> None:
    lm = tiny_decoder("t5")
    pairs = [{"prompt": "abcd", "completion": "e"}, {"prompt": "f", "completion": "gha"}]
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for prompt, completion in (([0, 1, 2, 3], [4, EOS]), ([5], [6, 7, 0, EOS])):
            labels = torch.tensor([completion])
            total += lm(input_ids=torch.tensor([prompt]), labels=labels).loss * len(completion)
    trainer = sft_trainer(run_dir, pairs, lm=lm, sft={"batch_size": 2}, eval_samples=pairs)
    assert trainer.evaluate()["eval/loss"] == pytest.approx(float(total) / 6, rel=1e-6)
    (batch,) = trainer.experience(trainer.samples)
    before = trainer.update([batch])["train/loss"]
    assert before == pytest.approx(float(total) / 6, rel=1e-6)
    assert trainer.update([batch])["train/loss"] < before
    assert len(trainer.generate(["ab"])) == 1


def test_encoder_decoders_refuse_strings(run_dir: Path) -> None:
    with pytest.raises(DataError, match="sample 0 is no pair; an encoder-decoder"):
        sft_trainer(run_dir, ["abc"], lm=tiny_decoder("t5"))


def test_an_adapter_alone_is_trained_and_can_be_saved_merged(run_dir: Path, tmp_path: Path) -> None:
    peft = {"r": 2, "target_modules": ["c_attn"]}
    trainer = sft_trainer(run_dir, SAMPLES, model={"peft_config": peft, "merge_adapter": True})
    before = {name: parameter.detach().clone() for name, parameter in trainer.lm.named_parameters()}
    for _ in range(2):
        trainer.step()
    moved = {name for name, p in trainer.lm.named_parameters() if not torch.equal(p.detach(), before[name])}
    assert moved and all("lora_" in name for name in moved)
    trainer.save_pretrained(tmp_path / "saved")
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[0, 1, 2]])
    found, expected = merged(ids).logits.double(), trainer.lm.eval()(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=network_rounding(expected))


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


@pytest.mark.parametrize(("side", "cut"), [("left", (5, 6, 7, EOS)), ("right", (0, 1, 2, 3))])
def test_long_samples_are_cut_to_max_length(run_dir: Path, side: str, cut: tuple[int, ...]) -> None:
    settings = {"sft": {"max_length": 4}, "tokenizer_config": {"truncation_side": side}}
    trainer = sft_trainer(run_dir, ["abcdefgh", "ab"], **settings)
    assert [sample.token_ids for sample in trainer.samples] == [cut, (0, 1, EOS)]


def test_samples_may_fill_the_window_and_no_more(run_dir: Path) -> None:
    trainer = sft_trainer(run_dir, ["a" * 15, "a" * 16])
    assert [len(sample.token_ids) for sample in trainer.samples] == [16, 16]


def test_of_dialogues_the_answers_are_learned(run_dir: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}h{% endfor %}")
    dialogue = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    tokenizer = copy.deepcopy(TOKENIZER)
    trainer = sft_trainer(run_dir, [dialogue], sft={"chat_template": template}, tokenizer=tokenizer)
    assert trainer.samples[0].token_ids == (0, 1, 7, 2, 3, 7)
    assert trainer.samples[0].loss_mask == (False, False, False, True, True, True)
    trainer.step()
    trainer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.chat_template == template.read_text()


def test_padding_is_reported_as_a_share_of_the_batch(run_dir: Path) -> None:
    trainer = sft_trainer(run_dir, ["ab", "abcd"], train={"gradient_accumulation_steps": 2})
    long, short = (
        TokenizedSample(tuple(range(length)), (False,) + (True,) * (length - 1)) for length in (6, 3)
    )
    # Micro-batches of 2 x 6 and 2 x 3 columns, the first with 3 of them empty.
    metrics = trainer.update(trainer.experience([long, short, short, short]))
    assert metrics["train/padding_fraction"] == pytest.approx(3 / 18)


def test_samples_are_measured_in_evaluations(run_dir: Path) -> None:
    trainer = sft_trainer(
        run_dir,
        ["ab"],
        lm=cycle_decoder(TOKENIZER),
        eval_samples=["ab"],
        eval_prompts=["ef", "g"],
        metric_fn=half_length,
        reward_fn=vowels,
        eval_generation={"max_new_tokens": [1, 4], "do_sample": False},
    )
    assert trainer.default_best_metric == "eval/loss"
    metrics = trainer.evaluate()
    # The model goes on from each letter to the next: "gh" and "h".
    assert metrics["eval/half_length@max_new_tokens=1"] == 0.5
    assert metrics["eval/half_length"] == metrics["eval/half_length@max_new_tokens=4"] == 0.75
    assert metrics["eval/reward"] == 0.0
    assert metrics["eval/loss"] > 0
    assert trainer.default_best_metric == "eval/half_length"
    assert trainer.generate(["d", "gh"], greedy=True) == ["efgh", ""]


def test_the_best_of_a_run_that_has_prompts_alone_is_by_reward(run_dir: Path) -> None:
    trainer = sft_trainer(run_dir, ["ab"], eval_prompts=["a"], reward_fn=vowels)
    assert set(trainer.evaluate()) == {"eval/reward", "eval/reward_standard_error", "eval/length_mean"}
    assert trainer.default_best_metric == "eval/reward"


@pytest.mark.parametrize(
    ("samples", "settings", "error", "message"),
    [
        ([], {}, DataError, "empty"),
        (["a"], {"sft": {"max_length": 17}}, ConfigError, "`sft.max_length` = 17 exceeds .* window of 16"),
        (
            [{"messages": [{"role": "assistant", "content": "a"}]}],
            {"sft": {"chat_template": Path("no/such.jinja")}},
            ConfigError,
            "`sft.chat_template` = no/such.jinja cannot be read",
        ),
        (
            ["a"],
            {"metric_fn": half_length},
            ConfigError,
            "`metric_fn`, `reward` and gold .* `eval_prompts`: give",
        ),
        (["a"], {"reward": {"delta": True}}, ConfigError, "`reward.delta` is for rewards that are learned"),
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

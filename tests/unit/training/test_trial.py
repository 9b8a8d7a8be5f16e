"""The trial at start finds models that are not what trainers take for granted, and says what to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
    GPT2ForSequenceClassification,
    PreTrainedModel,
)

from conch.config import ModelConfig, load
from conch.errors import ModelError
from conch.models.attention import logprob_gap
from conch.models.loading import disable_dropout
from conch.trainers.reward_model import RewardModelRunConfig, RewardModelTrainer
from conch.training.trial import check_classifier, check_language_model
from tests.odd_families import DECODERS, ENCODER_DECODERS, odd_model
from tests.runs import TOKENIZER, ilql_trainer, policy, ppo_trainer, sft_trainer
from tests.tiny import tiny_decoder, tiny_gpt2_config

END = [22]


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conch.training.trial._passed", set())


def settings(**changes: Any) -> ModelConfig:
    return ModelConfig(architecture={"model_type": "gpt2"}, **changes)


def counted(model: PreTrainedModel) -> list[int]:
    """One number for each forward pass from now on."""
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    return passes


def classifier(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    small |= {"num_key_value_heads": 2} if family == "qwen3" else {}
    config = AutoConfig.for_model(family, vocab_size=24, pad_token_id=21, num_labels=1, **small)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*DECODERS, *ENCODER_DECODERS])
def test_families_pass_in_less_than_a_second(family: str, dtype: torch.dtype) -> None:
    lm = odd_model(family, dtype=dtype)
    disable_dropout(lm)
    before, start = torch.get_rng_state(), time.process_time()
    check_language_model(lm, settings(), END)
    assert time.process_time() - start < 1
    assert torch.equal(torch.get_rng_state(), before) and not lm.training


@pytest.mark.parametrize("family", ["bert", "roberta", "qwen3"])
def test_reward_models_pass(family: str) -> None:
    model = classifier(family).train()
    disable_dropout(model)
    check_classifier(model, settings())
    assert model.training


def test_a_model_is_tried_once_or_not_at_all() -> None:
    lm = tiny_decoder("gpt2")
    passes = counted(lm)
    check_language_model(lm, settings(trial=False), END)
    assert not passes
    check_language_model(lm, settings(disable_dropout=False), END)
    first = len(passes)
    check_language_model(tiny_decoder("gpt2", seed=1), settings(disable_dropout=False), END)
    check_language_model(lm, settings(disable_dropout=False), END)
    assert first and len(passes) == first, "other weights are the same architecture"
    lm.config.layer_norm_epsilon = 1e-3
    check_language_model(lm, settings(disable_dropout=False), END)
    assert len(passes) == 2 * first


# ----------------------------------------------------------------------------------------------------- faults


def with_embeddings(lm: PreTrainedModel, change: Callable[[Tensor, bool], Tensor]) -> PreTrainedModel:
    """change: makes other embeddings of a row's; also told whether the model trains."""

    def hook(module: nn.Module, _args: Any, output: Any) -> Tensor:
        return change(output, module.training)

    lm.get_input_embeddings().register_forward_hook(hook)
    return lm


def seeing_padding(lm: PreTrainedModel) -> PreTrainedModel:
    return with_embeddings(lm, lambda rows, _: rows + rows.mean(dim=1, keepdim=True))


def noisy(lm: PreTrainedModel) -> PreTrainedModel:
    return with_embeddings(lm, lambda rows, trains: rows + 0.01 * trains * torch.randn_like(rows))


def other_in_training(lm: PreTrainedModel) -> PreTrainedModel:
    return with_embeddings(lm, lambda rows, trains: 1.01 * rows if trains else rows)


def broken(lm: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        next(lm.parameters())[:] = torch.nan
    return lm


FAULTS = [
    (seeing_padding, r"scores a padded sample otherwise than it does alone, by [\d.]+ nats"),
    (noisy, r"computes something else in training than in evaluation \(two passes differ by [\d.]+ nats\)"),
    (
        other_in_training,
        r"computes something else in training than in evaluation \(a pass is off by [\d.]+ nats\)",
    ),
    (broken, r"gives NaN for a few tokens in float32: set `model.dtype` to bfloat16 or float32"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
def test_faults_are_named_with_a_way_out(
    fault: Callable[[PreTrainedModel], PreTrainedModel], message: str
) -> None:
    lm = fault(tiny_decoder("gpt2", dtype=torch.float32))
    disable_dropout(lm)
    for _ in range(2):  # what failed is not known as good
        with pytest.raises(ModelError, match=rf"GPT2LMHeadModel {message}.*`model.trial=false`"):
            check_language_model(lm, settings(), END)
    check_language_model(lm, settings(trial=False), END)


def test_a_model_whose_tokens_see_later_ones_is_refused() -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    encoder, decoder = (
        BertLMHeadModel(BertConfig(vocab_size=32, intermediate_size=16, is_decoder=causal, **sizes))
        for causal in (False, True)
    )
    for lm in (encoder, decoder):
        disable_dropout(lm)
        for parameter in lm.parameters():
            parameter.data *= 8
    with pytest.raises(ModelError, match=r"BertLMHeadModel lets tokens see later tokens: .* `is_decoder"):
        check_language_model(encoder, settings(), END)
    check_language_model(decoder, settings(), END)


def test_dropout_that_is_wanted_is_no_fault() -> None:
    lm = tiny_decoder("gpt2")
    with pytest.raises(ModelError, match=r"keep it by `model.disable_dropout=false`"):
        check_language_model(lm, settings(), END)
    check_language_model(lm, settings(disable_dropout=False), END)


def test_an_end_that_cannot_be_chosen_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    lm = tiny_decoder("gpt2")
    disable_dropout(lm)
    with pytest.raises(
        ModelError, match=r"cannot choose \[24\] to end a text: its output has 24 tokens, and no"
    ):
        check_language_model(lm, settings(), [24])
    assert not caplog.records
    check_language_model(lm, settings(), [22, 24])
    assert "cannot choose [24] to end a text: its output has 24 tokens; others of [22, 24]" in caplog.text


def test_a_reward_model_that_sees_padding_is_refused() -> None:
    model = classifier("bert")
    disable_dropout(model)
    forward = model.forward
    model.forward = lambda attention_mask=None, **inputs: forward(**inputs)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(
        ModelError, match=r"BertForSequenceClassification scores a padded .* by [\d.]+ points"
    ):
        check_classifier(model, settings())


def test_rounding_is_told_from_faults_of_a_size() -> None:
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    assert logprob_gap(logits + 5, logits) < 1e-6, "a constant is nothing to a distribution"
    moved = logits.clone()
    moved[1] += 0.1 * torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert logprob_gap(moved, logits) == pytest.approx(0.08, abs=0.01), "the mean of |N(0, 0.1)|"
    never = logits.clone()
    never[:, 7] = -torch.inf
    assert logprob_gap(never, never) == 0


# --------------------------------------------------------------------------------------------------- trainers


def test_no_trainer_starts_with_a_model_that_fails(tmp_path: Path) -> None:
    message = "GPT2LMHeadModel computes something else in training"
    with pytest.raises(ModelError, match=message):
        ppo_trainer(tmp_path / "ppo", lm=noisy(policy()))
    with pytest.raises(ModelError, match=message):
        sft_trainer(tmp_path / "sft", ["abc"], lm=noisy(policy()))
    with pytest.raises(ModelError, match=message):
        ilql_trainer(tmp_path / "ilql", ["abc"], [1.0], lm=noisy(policy()))
    torch.manual_seed(0)
    broken(GPT2ForSequenceClassification(tiny_gpt2_config(TOKENIZER, num_labels=1))).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="GPT2ForSequenceClassification gives NaN for a few tokens"):
        RewardModelTrainer(
            load(
                RewardModelRunConfig, {"model": {"path": str(tmp_path)}, "train": {"run_dir": tmp_path / "r"}}
            ),
            samples=[{"text": "ab", "score": 1.0}, {"text": "c", "score": 0.0}] * 32,
            tokenizer=TOKENIZER,
        )

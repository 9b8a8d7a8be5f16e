"""An adapter trains alone, comes off without a trace, and is saved alone or merged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from conch.config import GenerationConfig, ModelConfig
from conch.errors import ConfigError, ModelError
from conch.models.adapter import adapter_off, has_adapter, merged_copy
from conch.models.forward import ForwardInputs
from conch.models.freezing import freeze_layers
from conch.models.loading import load_lm, load_sequence_classifier
from conch.models.policy import PolicyWithValue, response_logits
from conch.models.reference import AdapterOffReference, build_reference
from conch.rollouts.hf.engine import HFEngine
from conch.runs.checkpoint import save_model
from conch.types import Prompt
from tests.numerics import network_rounding, rounding
from tests.runs import reward_trainer
from tests.tiny import LANGUAGE_MODELS, char_tokenizer, decoder_shape, tiny_decoder

TOKENIZER = char_tokenizer("abcdefghijklmnopqrstu")
PAD = 21
ignore_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def a_batch() -> ForwardInputs:
    """Rows with 3 and 0 pads on the left."""
    ids = torch.randint(0, PAD, (2, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :3] = False
    return ForwardInputs(ids.masked_fill(~mask, PAD), mask, 4)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return response_logits(model, a_batch())


def settings(family: str = "gpt2", *, merge: bool = True, **peft_config: Any) -> ModelConfig:
    values = {"r": 2, "lora_alpha": 4, **peft_config}
    return ModelConfig(architecture=decoder_shape(family), peft_config=values, merge_adapter=merge)


def base_model(family: str) -> PreTrainedModel:
    """Frozen, as it is below an adapter: torch may multiply by weights that learn in another order."""
    return tiny_decoder(family).requires_grad_(False)  # pyright: ignore[reportReturnType]


def adapted(family: str, *, learned: bool = True, **peft_config: Any) -> PreTrainedModel:
    """A model with an adapter, as if it had learned something."""
    lm = tiny_decoder(family)
    freeze_layers(lm, settings(family, **peft_config))
    if learned:
        learn(lm)
    return lm


@torch.no_grad()
def learn(model: PreTrainedModel) -> None:
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.1)


def classifier(**peft_config: Any) -> PreTrainedModel:
    config = settings("llama", **peft_config)
    torch.manual_seed(0)
    model = load_sequence_classifier(config, num_labels=1, pad_token_id=PAD)
    freeze_layers(model, config)
    return model


# --------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_adapter_and_value_head_alone_learn(family: str) -> None:
    policy = PolicyWithValue(adapted(family))
    torch.nn.init.normal_(policy.value_head.out.weight)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    output = policy(a_batch())
    (output.logits.square().mean() + (output.values - 1).square().mean()).backward()
    optimizer.step()
    moved = {name for name, tensor in policy.state_dict().items() if not torch.equal(tensor, before[name])}

    assert moved == {name for name in before if "lora_" in name or name.startswith("value_head.")}


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_model_starts_as_its_base_and_is_it_again_with_the_adapter_off(family: str) -> None:
    base, lm = logits(base_model(family)), adapted(family, learned=False)
    assert torch.equal(logits(lm), base)
    learn(lm)

    assert not torch.isclose(logits(lm), base).all()
    with adapter_off(lm):
        assert torch.equal(logits(lm), base)
    assert not torch.isclose(logits(lm), base).all()


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_reference_of_an_adapted_model_is_its_base(family: str) -> None:
    base, lm = logits(base_model(family)), adapted(family, learned=False).train()
    reference, parameters = build_reference(lm, -1), len(list(lm.parameters()))
    assert isinstance(reference, AdapterOffReference)
    assert torch.equal(reference.logits(a_batch()), logits(lm)), "KL must be exactly 0 at first"
    learn(lm)
    trained, was_trainable = logits(lm), [p.requires_grad for p in lm.parameters()]

    assert torch.equal(reference.logits(a_batch()), base)
    assert torch.equal(logits(lm), trained) and lm.training
    assert [p.requires_grad for p in lm.parameters()] == was_trainable and len(was_trainable) == parameters


def test_adapter_is_on_again_after_a_failure() -> None:
    lm = adapted("gpt2")
    trained = logits(lm)
    ids, mask, *_ = a_batch()
    with pytest.raises(IndexError):
        build_reference(lm, -1).logits(ForwardInputs(ids + 1000, mask, 4))

    assert torch.equal(logits(lm), trained)


def test_trained_copies_of_whole_modules_come_on_again() -> None:
    lm = adapted("gpt2", modules_to_save=["ln_f"])
    base, trained = logits(base_model("gpt2")), logits(lm)

    assert torch.equal(build_reference(lm, -1).logits(a_batch()), base)
    assert torch.equal(logits(lm), trained)


def test_adapter_has_no_dropout_unless_the_config_allows_it() -> None:
    lm = adapted("gpt2", lora_dropout=0.5).train()

    assert torch.equal(logits(lm), logits(lm))


def test_adapter_of_a_bfloat16_model_is_held_in_float32() -> None:
    lm = tiny_decoder("llama").bfloat16()
    freeze_layers(lm, settings("llama"))
    learn(lm)

    assert {p.dtype for p in lm.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in lm.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert logits(lm).dtype == torch.bfloat16
    merged = merged_copy(lm)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(merged), logits(lm), rtol=0, atol=0.1)


def test_adapted_model_samples_from_what_it_learned() -> None:
    lm = adapted("gpt2")
    config = GenerationConfig(max_new_tokens=4)
    [[rollout]] = list(
        HFEngine(lambda: lm, TOKENIZER, config, version=lambda: 0).generate([Prompt("ab", (0, 1))])
    )
    ids = torch.tensor([[0, 1, *rollout.completion.token_ids]])
    with torch.no_grad():
        table = response_logits(
            lm, ForwardInputs(ids, torch.ones_like(ids, dtype=torch.bool), ids.shape[1] - 2)
        )
    expected = table.log_softmax(-1).gather(-1, ids[:, 2:, None])[0, :, 0]

    sampled = torch.tensor(rollout.completion.logprobs, dtype=torch.float64)
    torch.testing.assert_close(sampled, expected, rtol=0, atol=rounding(table, 8))


def test_head_of_a_reward_model_trains_beside_its_adapter() -> None:
    model = classifier()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}

    assert {"score" in name or "lora_" in name for name in trained} == {True}
    assert any("score" in name for name in trained)


# ----------------------------------------------------------------------------------------------------- saving


@ignore_peft
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_adapter_is_saved_alone_and_peft_loads_it_onto_the_base(family: str, tmp_path: Path) -> None:
    auto_class = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    tiny_decoder(family, dtype=torch.float32).save_pretrained(tmp_path / "base")
    config = ModelConfig(path=str(tmp_path / "base"), peft_config={"r": 2})
    lm = load_lm(config)
    freeze_layers(lm, config)
    learn(lm)
    folder = save_model(tmp_path / "step_1", lm, TOKENIZER)
    loaded = PeftModel.from_pretrained(auto_class.from_pretrained(tmp_path / "base"), str(folder)).eval()

    assert (folder / "adapter_config.json").is_file() and (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists() and not (folder / "config.json").exists()
    expected = logits(lm)
    bound = network_rounding(expected)
    torch.testing.assert_close(logits(loaded.base_model.model), expected, rtol=0, atol=bound)
    torch.testing.assert_close(logits(load_lm(ModelConfig(path=str(folder)))), expected, rtol=0, atol=bound)


@ignore_peft
def test_saved_adapter_finds_its_base_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_decoder("llama", dtype=torch.float32).save_pretrained("base")
    config = ModelConfig(path="base", peft_config={"r": 2})
    lm = load_lm(config)
    freeze_layers(lm, config)
    learn(lm)
    save_model(tmp_path / "step_1", lm, TOKENIZER)
    monkeypatch.chdir("/")
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "step_1"))

    expected = logits(lm)
    found = logits(loaded.base_model.model.eval())
    torch.testing.assert_close(found, expected, rtol=0, atol=network_rounding(expected))


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_merged_folder_is_an_ordinary_model_and_the_live_one_is_untouched(
    family: str, tmp_path: Path
) -> None:
    lm = adapted(family)
    before, state = logits(lm), {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    folder = save_model(tmp_path / "step_1", lm, TOKENIZER, merge_adapter=True)
    auto_class = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    loaded, info = auto_class.from_pretrained(folder, output_loading_info=True)

    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not (folder / "adapter_config.json").exists() and not has_adapter(loaded)
    torch.testing.assert_close(logits(loaded.eval()), before, rtol=0, atol=1e-10)
    assert torch.equal(logits(lm), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in lm.state_dict().items())


@pytest.mark.parametrize("merge", [True, False])
@torch.no_grad()
def test_saved_reward_model_scores_as_it_did(merge: bool, tmp_path: Path) -> None:
    config = settings("llama")
    torch.manual_seed(0)
    load_sequence_classifier(config, num_labels=1, pad_token_id=PAD).save_pretrained(tmp_path / "base")
    config = ModelConfig(path=str(tmp_path / "base"), peft_config={"r": 2})
    model = load_sequence_classifier(config, num_labels=1, pad_token_id=PAD)
    freeze_layers(model, config)
    learn(model)
    scores = model.eval()(*a_batch()[:1]).logits
    folder = save_model(tmp_path / "rm", model, TOKENIZER, merge_adapter=merge)
    loaded = load_sequence_classifier(ModelConfig(path=str(folder)), num_labels=1, pad_token_id=PAD).eval()

    found = loaded(*a_batch()[:1]).logits
    torch.testing.assert_close(found, scores, rtol=0, atol=network_rounding(scores))


def test_adapter_on_a_merged_one_belongs_to_it(tmp_path: Path) -> None:
    tiny_decoder("gpt2", dtype=torch.float32).save_pretrained(tmp_path / "base")
    path = str(tmp_path / "base")
    for name in ("first", "second"):
        config = ModelConfig(path=path, peft_config={"r": 2})
        lm = load_lm(config)
        freeze_layers(lm, config)
        learn(lm)
        path = str(save_model(tmp_path / name, lm, TOKENIZER))

    found, expected = logits(load_lm(ModelConfig(path=path))), logits(lm)
    torch.testing.assert_close(found, expected, rtol=0, atol=network_rounding(expected))


FOREIGN_WARNINGS = (
    "ignore:Model (has|with) `tie_word_embeddings=True`",
    "ignore:fan_in_fan_out is set",
    "ignore:Setting `save_embedding_layers`",
)
EMBEDDINGS = {"llama": "embed_tokens", "gpt2": "wte"}


def foreign_adapter(tmp_path: Path, family: str, grown: int = 0, tied: bool = True, **keys: Any) -> Tensor:
    """Save a base and, as another program trains it, an adapter on it; give that model's logits.

    grown: tokens that were added to the vocabulary before training.
    """
    lm = tiny_decoder(family, dtype=torch.float32, tie_word_embeddings=tied)
    lm.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if grown:
        base.resize_token_embeddings(24 + grown, mean_resizing=False)
    model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", **keys)).eval()
    learn(model)  # pyright: ignore[reportArgumentType]
    model.save_pretrained(str(tmp_path / "adapter"))
    return logits(model.base_model.model)  # pyright: ignore[reportArgumentType]


def keys_of(family: str) -> list[dict[str, Any]]:
    embeddings = EMBEDDINGS[family]
    return [
        {},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": [embeddings]},
        {"modules_to_save": ["lm_head", embeddings]},
        {"target_modules": ["lm_head", embeddings]},
    ]


@pytest.mark.filterwarnings(*FOREIGN_WARNINGS)
@pytest.mark.parametrize("grown", [0, 2])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", EMBEDDINGS)
@ignore_peft
def test_adapters_with_tokens_and_heads_of_their_own_load_and_save_whole(
    family: str, tied: bool, grown: int, tmp_path: Path
) -> None:
    """What is saved says itself whether embeddings and head are one weight, for readers that tie them."""
    for number, keys in enumerate(keys_of(family)):
        folder = tmp_path / str(number)
        expected = foreign_adapter(folder, family, grown, tied, **keys)
        lm = load_lm(ModelConfig(path=str(folder / "adapter")))
        save_model(folder / "merged", lm, TOKENIZER)
        saved = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
        assert saved.config.tie_word_embeddings is (tied and not keys)
        assert lm.config.vocab_size == 24 + grown == saved.config.vocab_size
        for model in (lm, saved):
            torch.testing.assert_close(logits(model), expected, rtol=0, atol=network_rounding(expected))


@pytest.mark.filterwarnings(*FOREIGN_WARNINGS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", EMBEDDINGS)
@ignore_peft
def test_an_adapter_on_a_model_that_grew_in_memory_is_saved_with_its_embeddings(
    family: str, tied: bool, tmp_path: Path
) -> None:
    tiny_decoder(family, dtype=torch.float32, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    for number, keys in enumerate(keys_of(family)[: 4 if tied else 5]):
        lm = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        lm.resize_token_embeddings(26)
        freeze_layers(lm, settings(family, merge=False, **keys))
        learn(lm)
        folder = save_model(tmp_path / f"{number}", lm, TOKENIZER, merge_adapter=False)
        loaded = load_lm(ModelConfig(path=str(folder)))
        assert loaded.config.vocab_size == 26
        if not keys:
            assert torch.equal(loaded.get_input_embeddings().weight, lm.get_input_embeddings().weight)  # pyright: ignore[reportArgumentType]
        expected = logits(lm)
        torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=network_rounding(expected))


def test_an_adapter_on_its_base_is_saved_without_embeddings(tmp_path: Path) -> None:
    tiny_decoder("llama").save_pretrained(tmp_path / "base")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    freeze_layers(lm, settings("llama", merge=False))
    folder = save_model(tmp_path / "adapter", lm, TOKENIZER, merge_adapter=False)
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))


@pytest.mark.filterwarnings(*FOREIGN_WARNINGS)
@ignore_peft
def test_adapter_that_does_not_bring_its_new_tokens_is_refused(tmp_path: Path) -> None:
    foreign_adapter(tmp_path, "llama", 2, tied=False, target_modules=["lm_head"])
    with pytest.raises(ModelError, match=r"knows 26 tokens, its base .*base' 24: it lacks the embeddings"):
        load_lm(ModelConfig(path=str(tmp_path / "adapter")))


@pytest.mark.parametrize("family", EMBEDDINGS)
def test_merged_model_says_that_its_trained_head_is_not_tied(family: str, tmp_path: Path) -> None:
    lm = tiny_decoder(family, tie_word_embeddings=True)
    freeze_layers(lm, settings(family, modules_to_save=["lm_head"]))
    learn(lm)
    expected = logits(lm)
    folder = save_model(tmp_path / "step_1", lm, TOKENIZER, merge_adapter=True)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert lm.config.tie_word_embeddings, "the model in memory stays as it is"
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        ("{", "damaged"),
        ("{}", "damaged"),
        ('{"base_model_name_or_path": null}', "names no base model"),
        ('{"base_model_name_or_path": "/nowhere/base"}', "/nowhere/base: there is no such folder"),
    ],
)
def test_adapter_without_its_base_is_refused(damage: str, wanted: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(damage)

    with pytest.raises(ModelError, match=wanted):
        load_lm(ModelConfig(path=str(tmp_path)))


def test_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    for folder, width in (("base", 32), ("other", 64)):
        tiny_decoder("llama", hidden_size=width).save_pretrained(tmp_path / folder)
    config = ModelConfig(path=str(tmp_path / "base"), peft_config={"r": 2})
    lm = load_lm(config)
    freeze_layers(lm, config)
    file = save_model(tmp_path / "step_1", lm, TOKENIZER) / "adapter_config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(tmp_path / "other")})
    )

    with pytest.raises(ModelError, match=r"the adapter in .*step_1' does not fit its base .*other'"):
        load_lm(ModelConfig(path=str(tmp_path / "step_1")))


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("peft_config", "wanted"),
    [
        ({"lora_alfa": 2}, r"`model\.peft_config\.lora_alfa` is no key .* did you mean `lora_alpha`"),
        ({"r": 0}, "`r` should be a positive integer"),
        ({"target_modules": ["c_attn", "q_prj"]}, "GPT2LMHeadModel has no layer 'q_prj'; there are .*c_attn"),
        ({"target_modules": "nothing"}, "does not fit a GPT2LMHeadModel: .*nothing"),
        ({"modules_to_save": ["ln_g"]}, "modules_to_save.*: GPT2LMHeadModel has no layer 'ln_g'"),
        ({"layers_to_transform": [0, 7]}, "no layer 7 of GPT2LMHeadModel"),
        ({"bias": "all"}, "`model.peft_config.bias` must be none"),
        ({"init_lora_weights": False}, "init_lora_weights` = False would start the model elsewhere"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights` = 'pissa' would start the model elsewhere"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication` makes an adapter that cannot"),
        ({"target_modules": ["lm_head"]}, "names lm_head, whose weight embeddings and head share"),
        ({"target_modules": ["wte"]}, "names transformer.wte, whose weight embeddings and head share"),
    ],
)
def test_bad_peft_config_is_refused(peft_config: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        freeze_layers(tiny_decoder("gpt2"), settings("gpt2", **peft_config))


def test_adapter_whose_base_is_nowhere_must_be_merged() -> None:
    with pytest.raises(ConfigError, match=r"comes from no folder: set `model\.merge_adapter=true`"):
        freeze_layers(tiny_decoder("gpt2"), settings("gpt2", merge=False))


def test_second_adapter_is_refused() -> None:
    lm = adapted("gpt2")

    with pytest.raises(ConfigError, match="carries an adapter already"):
        freeze_layers(lm, settings("gpt2"))


def test_copy_of_an_adapted_model_keeps_its_adapter() -> None:
    lm = adapted("gpt2")

    assert torch.equal(logits(copy.deepcopy(lm)), logits(lm))


@pytest.mark.parametrize("shape", [{}, {"model_type": "bert"}, {"model_type": "roberta"}], ids=str)
def test_a_reward_model_learns_by_an_adapter_on_a_bfloat16_base(
    tmp_path: Path, shape: dict[str, Any]
) -> None:
    """Its head trains in float32 behind a trunk that gives bfloat16; its scores are float32."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = {"dtype": "bfloat16", "merge_adapter": True, "peft_config": {"r": 2}}
    if shape:
        model["architecture"] = {**shape, **small, "vocab_size": 24, "max_position_embeddings": 24}
    rows = [{"text": "ab" * n, "score": float(n % 3)} for n in range(1, 9)]
    trainer = reward_trainer(tmp_path / "run", rows, model=model, noise=0.0)
    losses = [trainer.step()["train/loss"] for _ in range(3)]
    assert losses[2] < losses[0]
    assert trainer.evaluate() == {}
    batch = trainer.experience(trainer.samples[:2])
    assert trainer.model(batch.texts.input_ids).logits.dtype == torch.float32
    trainer.save_pretrained(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize(("family", "embedding"), [("gpt2", "wte"), ("llama", "embed_tokens")])
def test_embeddings_train_beside_an_adapter_on_a_bfloat16_base(family: str, embedding: str) -> None:
    lm = tiny_decoder(family).bfloat16()
    before = logits(lm)
    freeze_layers(lm, settings(family, modules_to_save=[embedding]))
    assert torch.equal(logits(lm), before)
    response_logits(lm, a_batch()).float().sum().backward()
    trained = {name for name, p in lm.named_parameters() if p.requires_grad and p.grad is not None}
    assert any(f"{embedding}.modules_to_save" in name for name in trained)

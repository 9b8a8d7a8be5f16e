"""What a model and a tokenizer must be, how a reward head starts, and what is left to train."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    GPT2LMHeadModel,
)
from transformers.activations import NewGELUActivation

from conch.config import ModelConfig, TokenizerConfig
from conch.errors import ConfigError, ModelError
from conch.models.freezing import freeze_trunk
from conch.models.loading import (
    align_weights,
    context_window,
    decoder_layers,
    disable_dropout,
    load_lm,
    load_sequence_classifier,
    load_tokenizer,
)
from tests.numerics import network_rounding
from tests.text_tokenizers import sentencepiece
from tests.tiny import (
    DECODERS,
    LANGUAGE_MODELS,
    char_tokenizer,
    decoder_shape,
    reward_checkpoint,
    tiny_decoder,
    tiny_gpt2_config,
)

LETTERS = "abcdefghijklmnopqrstu"
PAD, EOS = 21, 22


def lm_checkpoint(folder: Path) -> Path:
    tokenizer = char_tokenizer(LETTERS)
    torch.manual_seed(0)
    GPT2LMHeadModel(tiny_gpt2_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit_json(path: Path, **values: Any) -> None:
    """Set keys; None takes a key away."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# --------------------------------------------------------------------------------------------------- models


def test_lm_from_folder_has_its_weights(tmp_path: Path) -> None:
    lm = load_lm(ModelConfig(path=str(lm_checkpoint(tmp_path))))

    saved = load_file(tmp_path / "model.safetensors")
    loaded = lm.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_lm_from_architecture_has_that_shape(family: str) -> None:
    lm = load_lm(ModelConfig(architecture=decoder_shape(family)))

    assert lm.config.model_type == family
    assert lm.get_input_embeddings().weight.shape == (24, 32)
    assert len(decoder_layers(lm)) == 3
    assert context_window(lm.config) == (None if family == "t5" else 32)


def test_encoder_decoder_from_folder_has_its_weights(tmp_path: Path) -> None:
    saved = tiny_decoder("t5")
    saved.save_pretrained(tmp_path)
    loaded = load_lm(ModelConfig(path=str(tmp_path))).state_dict()

    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.state_dict().items())


@pytest.mark.parametrize("source", ["path", "architecture"])
def test_lm_is_held_in_the_asked_dtype(source: str, tmp_path: Path) -> None:
    value = str(lm_checkpoint(tmp_path)) if source == "path" else decoder_shape("gpt2")
    lm = load_lm(ModelConfig.model_validate({source: value, "dtype": "bfloat16"}))

    assert {parameter.dtype for parameter in lm.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("/nowhere/model", "`model.path` = /nowhere/model: there is no such folder"),
        ("./nowhere", "`model.path` = ./nowhere: there is no such folder"),
        ("runs/x/checkpoints/step_1", "`model.path` = runs/x/checkpoints/step_1: there is no such folder"),
        (
            "outputs/nowhere",
            "no folder 'outputs/nowhere' .* as a name on the model hub .* check `model.path`",
        ),
    ],
)
def test_missing_model_folder_is_named(
    path: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no `outputs`, which a checkout that was used has
    with pytest.raises(ModelError, match=wanted):
        load_lm(ModelConfig(path=path))


@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "cut short"])
def test_damaged_weights_are_refused(content: bytes | None, tmp_path: Path) -> None:
    weights = lm_checkpoint(tmp_path) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2] if content is None else content)

    with pytest.raises(ModelError, match=f"no model can be loaded from '{tmp_path}': .*header"):
        load_lm(ModelConfig(path=str(tmp_path)))


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (lm_checkpoint(tmp_path) / "model.safetensors").unlink()

    with pytest.raises(ModelError, match=r"no model can be loaded from .* no file named model.safetensors"):
        load_lm(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize("fault", ["missing", "other shape"])
def test_weights_that_lack_a_tensor_are_refused_with_its_name(fault: str, tmp_path: Path) -> None:
    weights = lm_checkpoint(tmp_path) / "model.safetensors"
    tensors, name = load_file(weights), "transformer.h.1.mlp.c_fc.weight"
    if fault == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(3, 3)
    save_file(tensors, weights, metadata={"format": "pt"})

    with pytest.raises(ModelError, match=rf"1 tensors are missing or of another shape, {name} among them"):
        load_lm(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{", "not a valid JSON file"),
        ("{}", "Should have a `model_type` key"),
        ('{"model_type": "nonsense"}', "model type `nonsense`"),
        ('{"model_type": "gpt2", "n_layer": "six"}', "n_layer"),
    ],
)
def test_damaged_model_config_is_refused(text: str, wanted: str, tmp_path: Path) -> None:
    (lm_checkpoint(tmp_path) / "config.json").write_text(text)

    with pytest.raises(ModelError, match=f"no model can be loaded from '{tmp_path}': .*{wanted}"):
        load_lm(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"model_type": "gpt22"}, "model_type` = 'gpt22' is unknown to transformers; did you mean `gpt2`"),
        ({"n_layers": 3}, r"architecture.n_layers` is no key of gpt2; did you mean `n_layer`"),
        ({"n_layer": "six"}, "architecture` is not valid: .*n_layer.* expected int, got str"),
        ({"n_head": 5}, "gpt2 makes no model .* must be divisible by num_heads"),
    ],
)
def test_bad_architecture_is_refused_with_the_key(change: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        load_lm(ModelConfig(architecture={**decoder_shape("gpt2"), **change}))


def test_architecture_that_is_no_decoder_is_refused() -> None:
    with pytest.raises(ConfigError, match="type vit makes no model for AutoModelForCausalLM"):
        load_lm(ModelConfig(architecture={"model_type": "vit"}))


# --------------------------------------------------------------------------------------------- reward heads


def test_fresh_reward_head_is_normal_with_variance_one_over_width_plus_one() -> None:
    config = ModelConfig(architecture=decoder_shape("gpt2"))
    torch.manual_seed(0)
    model = load_sequence_classifier(config, num_labels=4096, pad_token_id=21)

    weight = model.score.weight
    assert weight.shape == (4096, 32)
    assert weight.std().item() == pytest.approx(1 / math.sqrt(33), rel=0.01)
    assert abs(weight.mean().item()) < 0.002
    assert weight.abs().max().item() > 3.5 / math.sqrt(33), "a normal distribution has tails"
    assert model.score.bias is None


def test_reward_model_from_a_language_model_keeps_its_trunk_and_gets_a_head(tmp_path: Path) -> None:
    config = ModelConfig(path=str(lm_checkpoint(tmp_path)))
    heads = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = load_sequence_classifier(config, num_labels=1, pad_token_id=21)
        heads.append(model.score.weight.detach())

    saved = load_file(tmp_path / "model.safetensors")
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved if name in loaded)
    assert not torch.equal(*heads)
    assert heads[0].std().item() == pytest.approx(1 / math.sqrt(33), rel=0.4)


def test_reward_model_from_a_classifier_keeps_its_head(tmp_path: Path) -> None:
    reward_checkpoint(tmp_path)
    model = load_sequence_classifier(ModelConfig(path=str(tmp_path)), num_labels=1, pad_token_id=21)

    assert torch.equal(model.score.weight, load_file(tmp_path / "model.safetensors")["score.weight"])


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_score_of_a_sample_that_ends_in_eos_does_not_depend_on_its_padding(family: str) -> None:
    """It is read at the eos, which is not the pad token, however much padding follows."""
    torch.manual_seed(0)
    config = ModelConfig(architecture=decoder_shape(family))
    model = load_sequence_classifier(config, num_labels=1, pad_token_id=PAD).eval()
    sample = [3, 1, 4, 1, 5, EOS]
    alone = model(torch.tensor([sample])).logits
    for padding in (1, 3, 9):
        ids = torch.tensor([[*sample, *[PAD] * padding]])
        score = model(ids, attention_mask=(ids != PAD).long()).logits
        torch.testing.assert_close(score, alone, rtol=0, atol=network_rounding(alone))
    without_eos = model(torch.tensor([sample[:-1]])).logits

    assert (without_eos - alone).abs().item() > 1e-3, "the score is not read at the eos"


def test_reward_model_from_an_encoder_may_lack_pooler_and_head_alone(tmp_path: Path) -> None:
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    encoder = BertConfig(vocab_size=24, hidden_size=32, **shape)
    BertModel(encoder, add_pooling_layer=False).save_pretrained(tmp_path)
    model = load_sequence_classifier(ModelConfig(path=str(tmp_path)), num_labels=1, pad_token_id=0)

    assert model.classifier.out_features == 1


def test_reward_model_from_weights_without_a_trunk_is_refused(tmp_path: Path) -> None:
    weights = lm_checkpoint(tmp_path) / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if ".h.1." not in name}
    save_file(kept, weights, metadata={"format": "pt"})

    with pytest.raises(ModelError, match=r"12 tensors are missing .* transformer\.h\.1\."):
        load_sequence_classifier(ModelConfig(path=str(tmp_path)), num_labels=1, pad_token_id=21)


# ------------------------------------------------------------------------------------- dropout and freezing


@pytest.mark.parametrize("family", [*DECODERS, "falcon"])
def test_disabled_dropout_makes_forwards_equal_in_training_mode(family: str) -> None:
    falcon = {"model_type": "falcon", "vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 2}
    shape = {**falcon, "num_attention_heads": 2} if family == "falcon" else decoder_shape(family)
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    dropouts = [key for key, value in config.to_dict().items() if "drop" in key and isinstance(value, float)]
    for key in dropouts:
        setattr(config, key, 0.5)
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.arange(20).view(2, 10)

    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits), "there was no dropout to disable"
        disable_dropout(model)
        assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("disable", [True, False])
def test_config_decides_about_dropout(disable: bool) -> None:
    shape = decoder_shape("gpt2", resid_pdrop=0.5)
    lm = load_lm(ModelConfig(architecture=shape, disable_dropout=disable)).train()
    ids = torch.arange(10)[None]

    with torch.no_grad():
        assert torch.equal(lm(ids).logits, lm(ids).logits) is disable


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("unfrozen", [1, 2, 3])
def test_freeze_trunk_leaves_the_top_blocks_alone_trainable(family: str, unfrozen: int) -> None:
    lm = tiny_decoder(family)
    freeze_trunk(lm, unfrozen)

    layers = decoder_layers(lm)
    top = {id(p) for layer in layers[3 - unfrozen :] for p in layer.parameters()}
    assert {id(p) for p in lm.parameters() if p.requires_grad} == top


def test_freeze_trunk_with_minus_one_leaves_everything_trainable() -> None:
    lm = tiny_decoder("gpt2")
    freeze_trunk(lm, -1)

    assert all(p.requires_grad for p in lm.parameters())


def test_more_unfrozen_layers_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`model\.num_layers_unfrozen` is 4; the model has 3 layers"):
        freeze_trunk(tiny_decoder("gpt2"), 4)


def test_freeze_trunk_of_an_encoder_decoder_leaves_the_top_of_its_decoder() -> None:
    lm = tiny_decoder("t5")
    freeze_trunk(lm, 2)
    trained = {name.split(".block.")[0] + name[13:16] for name, p in lm.named_parameters() if p.requires_grad}

    assert trained == {"decoder.1.", "decoder.2."}


def test_decoder_layers_of_bart_are_those_of_its_decoder() -> None:
    shape = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 3, "vocab_size": 24, "model_type": "bart"}
    small = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2}
    special = {"decoder_attention_heads": 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    lm = load_lm(ModelConfig(architecture={**shape, **small, **special, "decoder_start_token_id": 2}))

    assert decoder_layers(lm) is lm.get_decoder().layers


def test_two_stacks_of_layers_are_refused() -> None:
    stack = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**stack, "vocab_size": 24, "max_position_embeddings": 8, "eos_token_id": 2}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**stack, "image_size": 8, "patch_size": 4}))

    with pytest.raises(ModelError, match=r"has 2 stacks of 2 layers.*num_layers_unfrozen=-1"):
        freeze_trunk(model, 1)


def test_encoder_decoder_without_a_start_token_is_refused() -> None:
    shape = decoder_shape("t5")
    del shape["decoder_start_token_id"]

    with pytest.raises(ConfigError, match="the t5 has no `decoder_start_token_id`"):
        load_lm(ModelConfig(architecture=shape))


def test_context_window_of_relative_positions_is_none() -> None:
    assert context_window(AutoConfig.for_model("t5", n_positions=512)) is None


@torch.no_grad()
def test_context_window_of_roberta_is_what_its_positions_allow() -> None:
    """Its positions count from pad_token_id + 1 on: of 12 embeddings, 10 are for tokens."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = AutoConfig.for_model(
        "roberta", vocab_size=24, max_position_embeddings=12, pad_token_id=1, **shape
    )
    model = AutoModelForSequenceClassification.from_config(config).eval()
    window = context_window(config)

    assert window == 10
    assert model(torch.full((1, window), 5)).logits.isfinite().all()
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(torch.full((1, window + 1), 5))


def test_context_window_is_none_where_the_config_names_none() -> None:
    assert context_window(AutoConfig.for_model("bloom")) is None


# ----------------------------------------------------------------------------------------------- tokenizers


def test_tokenizer_of_a_folder_pads_left(tmp_path: Path) -> None:
    char_tokenizer(LETTERS).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(TokenizerConfig(truncation_side="right"), str(tmp_path))

    assert tokenizer("abc")["input_ids"] == [0, 1, 2]
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("left", "right")


def test_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    char_tokenizer(LETTERS).save_pretrained(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", eos_token=None)

    with pytest.raises(ModelError, match=f"the tokenizer of '{tmp_path}' has no eos token.* set `"):
        load_tokenizer(TokenizerConfig(path=str(tmp_path)))


def test_pad_token_of_the_config_is_used_where_there_is_none(tmp_path: Path) -> None:
    char_tokenizer(LETTERS).save_pretrained(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", pad_token=None)
    tokenizer = load_tokenizer(TokenizerConfig(path=str(tmp_path), pad_token="u"))

    assert tokenizer.pad_token_id == 20


def test_folder_with_a_model_alone_has_no_tokenizer(tmp_path: Path) -> None:
    GPT2LMHeadModel(tiny_gpt2_config(char_tokenizer(LETTERS))).save_pretrained(tmp_path)

    with pytest.raises(ModelError, match=f"'{tmp_path}' holds no tokenizer: give `tokenizer.path`"):
        load_tokenizer(TokenizerConfig(), str(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "{}", '{"model": {"type": "nonsense"}, "added_tokens": []}'])
def test_damaged_tokenizer_is_refused(text: str, tmp_path: Path) -> None:
    char_tokenizer(LETTERS).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)

    with pytest.raises(ModelError, match=f"no tokenizer can be loaded from '{tmp_path}'"):
        load_tokenizer(TokenizerConfig(), str(tmp_path))


@pytest.mark.parametrize(
    ("config", "model_path", "setting"),
    [
        (TokenizerConfig(path="/nowhere/at/all"), "gpt2", r"`tokenizer\.path` = /nowhere/at/all"),
        (TokenizerConfig(), "/nowhere/at/all", r"`model\.path` = /nowhere/at/all"),
    ],
)
def test_missing_folder_is_named_by_the_setting_that_names_it(
    config: TokenizerConfig, model_path: str, setting: str
) -> None:
    with pytest.raises(ModelError, match=f"{setting}: there is no such folder .*/nowhere does not exist"):
        load_tokenizer(config, model_path)
    with pytest.raises(ModelError, match=r"`model\.path` = /nowhere/at/all"):
        load_lm(ModelConfig(path="/nowhere/at/all"))


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh"])
def test_gelu_of_gpt2_runs_as_one_kernel_with_its_values_and_gradients(activation: str) -> None:
    plain = NewGELUActivation()
    lm = load_lm(ModelConfig(architecture={**decoder_shape("gpt2"), "activation_function": activation}))
    fused = decoder_layers(lm)[0].mlp.act
    assert not any(isinstance(module, NewGELUActivation) for module in lm.modules())
    states = torch.linspace(-8, 8, 4001, dtype=torch.float64, requires_grad=True)
    found = []
    for act in (plain, fused):
        values = act(states)
        found.append((values.detach(), torch.autograd.grad(values.sum(), states)[0]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-9)


def test_model_with_a_fused_gelu_is_saved_as_what_it_was(tmp_path: Path) -> None:
    lm = load_lm(ModelConfig(architecture=decoder_shape("gpt2"))).eval()
    lm.save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert isinstance(decoder_layers(again)[0].mlp.act, NewGELUActivation)
    ids = torch.arange(8).unsqueeze(0)
    torch.testing.assert_close(lm(ids).logits, again(ids).logits)


def test_no_tokenizer_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"give `tokenizer\.path`, or `model\.path`"):
        load_tokenizer(TokenizerConfig(), None)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_llama_tokenizer_is_saved_with_its_legacy(tmp_path: Path, legacy: bool) -> None:
    """transformers 5.23 leaves it out, and reads the same text as other ids once it is loaded again."""
    sentencepiece().save_pretrained(tmp_path / "published")
    settings = tmp_path / "published/tokenizer_config.json"
    kind = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **kind}))
    first = load_tokenizer(TokenizerConfig(path=str(tmp_path / "published")))
    first.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(TokenizerConfig(path=str(tmp_path / "saved")))
    assert again.legacy is legacy  # pyright: ignore[reportAttributeAccessIssue]
    text = "<s>the film is bad</s>good"
    assert again(text).input_ids == first(text).input_ids


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_weights_do_not_lie_where_the_head_of_their_file_puts_them(family: str, tmp_path: Path) -> None:
    model = tiny_decoder(family, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    places, logits = set(), []
    for note in ("", "x" * 8, "x" * 16):  # other heads, same weights
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt", "note": note})
        places |= {weight.data_ptr() % 64 for weight in load_file(tmp_path / "model.safetensors").values()}
        loaded = load_lm(ModelConfig(path=str(tmp_path)))
        tensors = [*loaded.parameters(), *loaded.buffers()]
        assert {tensor.data_ptr() % 64 for tensor in tensors} == {0}
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in weights.items())
        one_row = {"input_ids": torch.tensor([[5]])}
        if loaded.config.is_encoder_decoder:
            one_row["decoder_input_ids"] = torch.tensor([[7]])
        with torch.no_grad():
            logits.append(loaded.eval()(**one_row).logits)
    assert len(places) > 1, "the files put them at other places"
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_weights_that_share_memory_still_do_where_they_are_moved() -> None:
    memory = torch.zeros(33)
    first, second, third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    first.weight = nn.Parameter(memory[1:17].view(4, 4))
    second.weight = nn.Parameter(memory[1:17].view(4, 4))
    third.weight = nn.Parameter(memory[17:33].view(4, 4))
    align_weights(nn.ModuleList([first, second, third]))
    assert first.weight.data_ptr() == second.weight.data_ptr() != third.weight.data_ptr()
    assert third.weight.data_ptr() % 64 == first.weight.data_ptr() % 64 == 0

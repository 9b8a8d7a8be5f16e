"""What the converter refuses to serve, each with its reason, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, GPT2LMHeadModel

from conch.converters.checkpoints.files import RewardModelFile
from conch.converters.checkpoints.reader import read_checkpoint
from conch.converters.checkpoints.tokenizer import check_template, choose_template
from conch.converters.options import ConversionOptions, ReadOptions
from conch.data.preferences import default_template
from conch.errors import ConversionError
from tests.tiny import char_tokenizer, reward_checkpoint, tiny_gpt2_config


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_read_checkpoint_takes_the_defaults_of_the_model(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(str(reward_checkpoint(tmp_path)))

    assert checkpoint.rules.template == "{text}{eos}"
    assert checkpoint.rules.max_length == 16
    assert checkpoint.rules.reward_names == ("reward",)
    assert checkpoint.rules.mean is None and checkpoint.rules.std is None
    assert checkpoint.model.dtype == torch.float32


def test_read_checkpoint_takes_what_the_trainer_wrote(tmp_path: Path) -> None:
    from_file = {"template": "{text}", "max_length": 12, "reward_names": ["walk"], "mean": 0.1, "std": 0.4}
    checkpoint = read_checkpoint(str(reward_checkpoint(tmp_path, reward_model=from_file)))

    assert (checkpoint.rules.template, checkpoint.rules.max_length) == ("{text}", 12)
    assert (checkpoint.rules.reward_names, checkpoint.rules.mean, checkpoint.rules.std) == (
        ("walk",),
        (0.1,),
        (0.4,),
    )


def test_read_checkpoint_lets_arguments_win(tmp_path: Path) -> None:
    folder = reward_checkpoint(tmp_path, reward_model={"template": "{text}", "max_length": 12})
    checkpoint = read_checkpoint(str(folder), ReadOptions(template="a{text}", max_length=10))

    assert (checkpoint.rules.template, checkpoint.rules.max_length) == ("a{text}", 10)


def test_read_checkpoint_names_several_rewards_after_the_labels(tmp_path: Path) -> None:
    folder = reward_checkpoint(tmp_path, num_labels=2, id2label={0: "helpful", 1: "harmless"})
    assert read_checkpoint(str(folder)).rules.reward_names == ("helpful", "harmless")


@pytest.mark.parametrize(
    ("from_file", "expected"),
    [
        ({"max_lenght": 12}, r"reward_model\.json: (?s:.*)did you mean `max_length`"),
        ({"pooling": "max"}, r"reward_model\.json: (?s:.*)pooling"),
        (
            {"reward_names": ["a", "b"]},
            r"the head has 1 outputs \(num_labels\) but reward_model.json names 2: a, b",
        ),
        ({"reward_names": ["a,b"]}, "hold no comma"),
        ({"template": "{txt}"}, "must hold {text} once"),
        ({"max_length": 17}, "max_length is 17, the model's window is 16"),
        ({"max_length": 0}, "max_length is 0"),
        ({"mean": 0.0, "std": 0.0}, "std is .* must be above 0"),
        ({"mean": [0.0, 1.0]}, "mean has 2 values for 1 rewards"),
    ],
)
def test_read_checkpoint_refuses_a_reward_model_file(
    tmp_path: Path, from_file: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConversionError, match=expected):
        read_checkpoint(str(reward_checkpoint(tmp_path, reward_model=from_file)))


def test_read_checkpoint_refuses_a_reward_model_file_that_is_no_json(tmp_path: Path) -> None:
    (reward_checkpoint(tmp_path) / "reward_model.json").write_text("[1")
    with pytest.raises(ConversionError, match=r"reward_model\.json is not a readable JSON object"):
        read_checkpoint(str(tmp_path))


def test_read_checkpoint_refuses_a_folder_without_tokenizer(tmp_path: Path) -> None:
    folder = reward_checkpoint(tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConversionError, match=r"has no tokenizer files; save"):
        read_checkpoint(str(folder))


def test_read_checkpoint_refuses_a_language_model_whose_head_would_be_random(tmp_path: Path) -> None:
    tokenizer = char_tokenizer("abc")
    GPT2LMHeadModel(tiny_gpt2_config(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match=r"language model \(GPT2LMHeadModel\) without a reward head"):
        read_checkpoint(str(tmp_path))


def test_read_checkpoint_refuses_an_adapter_that_names_no_model(tmp_path: Path) -> None:
    folder = reward_checkpoint(tmp_path / "checkpoint")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ConversionError, match=r"adapter_config\.json .*names no base model.*or give --base_model"
    ):
        read_checkpoint(str(folder))


def test_read_checkpoint_refuses_missing_tensors(tmp_path: Path) -> None:
    edit_weights(reward_checkpoint(tmp_path), lambda weights: weights.pop("transformer.h.1.ln_1.weight"))
    with pytest.raises(ConversionError, match=r"transformer\.h\.1\.ln_1\.weight missing"):
        read_checkpoint(str(tmp_path))


def test_read_checkpoint_refuses_tensors_of_another_shape(tmp_path: Path) -> None:
    edit_json(reward_checkpoint(tmp_path) / "config.json", id2label={"0": "a", "1": "b"})
    with pytest.raises(ConversionError, match=r"score\.weight|cannot be loaded"):
        read_checkpoint(str(tmp_path))


def test_read_checkpoint_refuses_nan_weights(tmp_path: Path) -> None:
    def poison(weights: dict[str, torch.Tensor]) -> None:
        weights["transformer.ln_f.bias"][3] = float("nan")

    edit_weights(reward_checkpoint(tmp_path), poison)
    with pytest.raises(ConversionError, match=r"weight transformer\.ln_f\.bias holds NaN"):
        read_checkpoint(str(tmp_path))


def test_a_model_without_pad_token_is_read_at_its_last_token_and_padded_with_the_tokenizers(
    tmp_path: Path,
) -> None:
    edit_json(reward_checkpoint(tmp_path) / "config.json", pad_token_id=None)
    checkpoint = read_checkpoint(str(tmp_path))
    assert checkpoint.rules.pooling == "last_token"
    assert checkpoint.rules.pad_token_id == checkpoint.tokenizer.pad_token_id
    assert checkpoint.decisions["pad token"].endswith("(tokenizer)")


def test_read_checkpoint_refuses_a_tokenizer_that_is_too_big(tmp_path: Path) -> None:
    reward_checkpoint(tmp_path, letters="abc")
    char_tokenizer("abcdefgh").save_pretrained(tmp_path)
    with pytest.raises(
        ConversionError, match=r"the tokenizer's highest id is 10, but the model embeds ids 0\.\.5"
    ):
        read_checkpoint(str(tmp_path))


def test_read_checkpoint_refuses_what_is_no_model_folder(tmp_path: Path) -> None:
    char_tokenizer("abc").save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="no configuration that transformers knows"):
        read_checkpoint(str(tmp_path))


def test_read_checkpoint_keeps_the_window_of_an_encoder(tmp_path: Path) -> None:
    tokenizer = char_tokenizer("abc")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=20,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    assert read_checkpoint(str(tmp_path)).rules.max_length == 20


def test_default_template_adds_no_eos_where_the_tokenizer_closes_the_text() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = char_tokenizer("abc")
    assert default_template(tokenizer) == "{text}{eos}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    assert default_template(tokenizer) == "{text}"


@pytest.mark.parametrize("single", ["a b $A", "<pad> $A", "<eos> $A"])
def test_default_template_takes_no_token_before_the_text_for_one_behind_it(single: str) -> None:
    """As `[gMASK]<sop>`, or a `<s>` that the tokenizer does not declare."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = char_tokenizer("abcx")
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in single.split()[:-1]]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=tokens)
    assert default_template(tokenizer) == "{text}{eos}"


@pytest.mark.parametrize("template", ["{text}", "{text}{eos}", "Q: {text}{eos}", "{{}}{text}"])
def test_check_template_accepts(template: str) -> None:
    check_template(template, char_tokenizer("abc"))


@pytest.mark.parametrize(
    "template", ["", "{eos}", "{text}{text}", "{text!r}", "{text:>9}", "{0}", "{text.upper}", "{text"]
)
def test_check_template_refuses(template: str) -> None:
    with pytest.raises(ConversionError, match="template"):
        check_template(template, char_tokenizer("abc"))


def test_check_template_refuses_eos_where_the_tokenizer_has_none() -> None:
    tokenizer = char_tokenizer("abc")
    tokenizer.eos_token = None
    with pytest.raises(ConversionError, match="has no eos token"):
        check_template("{text}{eos}", tokenizer)


def test_options_refuse_a_base_model_that_is_not_there() -> None:
    with pytest.raises(ConversionError, match=r"base model folder \./nowhere does not exist"):
        ConversionOptions(base_model="./nowhere")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"keep": -1}, "keep is -1"),
        ({"gpu": -1}, "gpu is -1"),
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"max_queue_delay_us": -1}, "max_queue_delay_us is -1"),
        ({"instances": 0}, "instances is 0"),
        ({"form": "token", "template": "chat"}, "needs --form text"),
    ],
)
def test_options_refuse_what_cannot_be(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConversionError, match=expected):
        ConversionOptions(**settings)


@pytest.mark.parametrize(
    ("requested", "trained", "warns"),
    [
        ("{text}", "{text}{eos}", True),
        ("a{text}", "chat", True),
        ("chat", "Human: {text}{eos}", True),
        ("chat", "{text}{eos}", False),
        ("chat{eos}", "chat", False),
        ("{prompt}{output}", "{text}", False),
        ("{text}", "{text}", False),
        (None, "{text}", False),
        ("{text}", None, False),
    ],
)
def test_a_template_other_than_that_of_training_is_told(
    requested: str | None, trained: str | None, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = char_tokenizer("abcHuman: ")
    tokenizer.chat_template = "{{ messages }}"
    options, from_file = ReadOptions(template=requested), RewardModelFile(template=trained)
    choose_template(options, from_file, tokenizer, "last_token")
    told = f"--template {requested!r} is taken, though reward_model.json says that the model was trained with"
    assert (f"{told} {trained!r}" in caplog.text) is warns and ("though" in caplog.text) is warns


ASKED = [{"role": "user", "content": "a"}]
TODAY = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"
DATED = f"{{{{ bos_token }}}}{TODAY}{{{{ messages }}}}"


def test_a_template_that_writes_todays_date_is_fixed_to_a_day(tmp_path: Path) -> None:
    folder = reward_checkpoint(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(folder)
    checkpoint = read_checkpoint(str(folder), ReadOptions(template="chat", template_date="2024-07-26"))
    assert "26 Jul 2024" in str(checkpoint.tokenizer.apply_chat_template(ASKED, tokenize=False))
    assert checkpoint.decisions["date"] == "2024-07-26 (--template_date)"
    today = read_checkpoint(str(folder), ReadOptions(template="chat"))
    assert date.today().strftime("%d %b %Y") in str(
        today.tokenizer.apply_chat_template(ASKED, tokenize=False)
    )
    why = "of the conversion; the chat template writes today's"
    assert today.decisions["date"] == f"{date.today().isoformat()} ({why})"
    with pytest.raises(ConversionError, match="no day: write YYYY-MM-DD"):
        read_checkpoint(str(folder), ReadOptions(template="chat", template_date="26 Jul 2024"))

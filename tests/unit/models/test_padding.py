"""Which pad token a tokenizer gets, by families' vocabularies in small."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from conch.errors import ConfigError
from conch.models.padding import with_pad_token


@pytest.fixture(autouse=True)
def _heard(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logging.getLogger("conch"), "propagate", True)
    caplog.set_level(logging.INFO)


def byte_level(*special: str, **tokens: str) -> PreTrainedTokenizerBase:
    """As GPT-2, Llama 3 and Qwen have it: a token for every byte, and these special ones."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=core, **tokens)


def byte_fallback(*special: str, **tokens: str) -> PreTrainedTokenizerBase:
    """As Llama 2 and Mistral have it: pieces of words, and bytes for all else, so that <unk> never occurs."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    core.add_special_tokens(["<unk>", "<s>", "</s>", *special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **tokens
    )


END = "<|endoftext|>"
GPT2 = byte_level(END, eos_token=END, bos_token=END, unk_token=END)
NEOX = byte_level(END, "<|padding|>", eos_token=END, bos_token=END)
LLAMA3 = byte_level(
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|eot_id|>"),
    eos_token="<|end_of_text|>",
    bos_token="<|begin_of_text|>",
)
QWEN = byte_level(END, "<|im_end|>", eos_token="<|im_end|>", pad_token=END)
PADS_WITH_EOS = byte_level(END, "<|extratoken_2|>", "<|extratoken_10|>", eos_token=END, pad_token=END)
MISTRAL = byte_fallback()
LLAMA_WITH_PAD = byte_fallback("<pad>", pad_token="<pad>")


@pytest.mark.parametrize(
    ("tokenizer", "policy", "reward_model"),
    [
        (GPT2, END, "<|pad|>"),
        (NEOX, "<|padding|>", "<|padding|>"),
        (LLAMA3, "<|reserved_special_token_0|>", "<|reserved_special_token_0|>"),
        (QWEN, END, END),
        (PADS_WITH_EOS, END, "<|extratoken_2|>"),
        (MISTRAL, "</s>", "<unk>"),
        (LLAMA_WITH_PAD, "<pad>", "<pad>"),
    ],
    ids=["gpt2", "neox", "llama3", "qwen", "pads-with-eos", "mistral", "llama-with-pad"],
)
def test_the_own_pad_token_stays_and_one_without_gets_one(
    tokenizer: PreTrainedTokenizerBase, policy: str, reward_model: str, caplog: pytest.LogCaptureFixture
) -> None:
    own = tokenizer.pad_token
    assert with_pad_token(tokenizer, None, name="m").pad_token == policy
    assert ("pads with" in caplog.text) == (own is None)
    caplog.clear()
    assert with_pad_token(tokenizer, None, name="m", reward_model=True).pad_token == reward_model
    assert (f"pads with {reward_model} here; `tokenizer.pad_token`" in caplog.text) == (own != reward_model)
    assert tokenizer.pad_token == own  # the user's object is as it was


TEXTS: Sequence[str] = ("That is great!", "That is great", "\u00c0 bient\u00f4t \U0001f600", "a\nb")


@pytest.mark.parametrize("tokenizer", [GPT2, MISTRAL], ids=["gpt2", "mistral"])
@pytest.mark.parametrize("text", TEXTS)
def test_no_text_contains_the_pad_token_of_a_reward_model(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    padded = with_pad_token(tokenizer, None, name="m", reward_model=True)
    assert padded.pad_token_id not in padded(text)["input_ids"]
    assert padded(text)["input_ids"] == tokenizer(text)["input_ids"]


WORDS = "L'Ha\u00ff", "wow!!", "a < b <|pad|>"


def saved_and_loaded(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def gpt2() -> PreTrainedTokenizerBase:
    """Of GPT-2's own class, with a merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "!!", END])}
    return GPT2Tokenizer(vocab=vocabulary, merges=[("!", "!")])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("tokenizer", [GPT2, gpt2()], ids=["generic", "gpt2"])
@pytest.mark.parametrize("wanted", [None, "!"])
def test_texts_have_the_same_tokens_once_saved_and_loaded(
    tokenizer: PreTrainedTokenizerBase, wanted: str | None, tmp_path: Path
) -> None:
    padded = with_pad_token(tokenizer, wanted, name="m", reward_model=True)
    loaded = saved_and_loaded(padded, tmp_path)
    for text in WORDS:
        assert padded(text)["input_ids"] == loaded(text)["input_ids"]
    assert (loaded.pad_token, loaded.pad_token_id) == (padded.pad_token, padded.pad_token_id)
    assert len(loaded) == len(tokenizer)
    unpadded = [text for text in WORDS if padded.pad_token not in text]  # pyright: ignore[reportOperatorIssue]
    assert [padded(text)["input_ids"] for text in unpadded] == [
        tokenizer(text)["input_ids"] for text in unpadded
    ]


def test_the_byte_that_no_text_has_keeps_its_id_under_its_new_name() -> None:
    padded = with_pad_token(GPT2, None, name="m", reward_model=True)
    assert padded.pad_token_id == GPT2.convert_tokens_to_ids("\u00ff")
    assert "\u00ff" in GPT2.get_vocab() and "\u00ff" not in padded.get_vocab()


def test_a_byte_that_is_merged_or_whose_new_name_is_taken_keeps_its_name(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = {symbol: index for index, symbol in enumerate([*alphabet, "\u00ff\u00ff", END])}
    for tokenizer in (
        GPT2Tokenizer(vocab=merged, merges=[("\u00ff", "\u00ff")]),  # pyright: ignore[reportArgumentType]
        byte_level("<|pad|>", eos_token="<|pad|>"),
    ):
        padded = with_pad_token(tokenizer, None, name="m", reward_model=True)
        assert padded.pad_token == "\u00ff"
        loaded = saved_and_loaded(padded, tmp_path)
        assert [padded(text)["input_ids"] for text in WORDS] == [loaded(text)["input_ids"] for text in WORDS]


def test_an_ordinary_word_that_the_user_set_as_pad_token_is_registered(tmp_path: Path) -> None:
    tokenizer = gpt2()
    tokenizer.pad_token = "!"
    padded = with_pad_token(tokenizer, None, name="m")
    assert padded("wow!!")["input_ids"] == saved_and_loaded(padded, tmp_path)("wow!!")["input_ids"]


@pytest.mark.parametrize("wanted", ["a", "[nowhere]"])
def test_a_configs_pad_token_does_not_replace_the_tokenizers_own(
    wanted: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert with_pad_token(LLAMA_WITH_PAD, wanted, name="m").pad_token == "<pad>"
    assert (
        f"'m' has a pad token of its own, <pad>, which stays: `tokenizer.pad_token` = {wanted}" in caplog.text
    )


def test_a_configs_pad_token_is_taken_where_there_is_none_or_eos_alone() -> None:
    for tokenizer in (GPT2, PADS_WITH_EOS):
        assert with_pad_token(tokenizer, "b", name="m").pad_token == "b"
        assert with_pad_token(tokenizer, "b", name="m", reward_model=True).pad_token == "b"


def test_a_pad_token_outside_the_vocabulary_is_refused_with_the_way_to_write_one() -> None:
    with pytest.raises(
        ConfigError, match=r"'\[PAD\]' is not in the vocabulary of 'm'.*\"tokenizer\.pad_token='"
    ):
        with_pad_token(GPT2, "[PAD]", name="m")


def test_a_tokenizer_whose_unknown_token_occurs_in_text_keeps_none() -> None:
    core = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1, "</s>": 2}, unk_token="<unk>"))
    words = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    assert with_pad_token(words, None, name="m", reward_model=True).pad_token is None

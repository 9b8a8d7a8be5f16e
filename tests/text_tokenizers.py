"""Tokenizers of the forms that model families have, trained on a few words."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

WORDS = [
    "The movie was great and I liked it.",
    "the film is bad",
    "Answer: four",
    "How are you? Fine!",
    "été €5",
]
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<|turn|>", "<think>"]


def wrapped(tokenizer: Tokenizer, frame: str | None, **settings: Any) -> PreTrainedTokenizerFast:
    """`frame`: of special tokens around a text, as `TemplateProcessing` takes it."""
    if frame is not None:
        places = [(token, tokenizer.token_to_id(token)) for token in SPECIALS]
        tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=places)
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    more = {"additional_special_tokens": ["<|turn|>", "<think>"]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**named, **more, **settings})


def sentencepiece(frame: str | None = "<s> $A") -> PreTrainedTokenizerFast:
    """Like Llama-2's: a space becomes "▁", one is put before a text, and decoding takes the first one off."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=SPECIALS, show_progress=False)  # pyright: ignore[reportCallIssue]
    learned.train_from_iterator(WORDS, trainer)
    model = json.loads(learned.to_str())["model"]
    vocabulary: dict[str, int] = model["vocab"]
    for number in range(256):
        vocabulary[f"<0x{number:02X}>"] = len(vocabulary)
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))  # pyright: ignore[reportCallIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(tokenizer, frame, bos_token="<s>")


def byte_level(frame: str | None = None) -> PreTrainedTokenizerFast:
    """Like GPT-2's, or with a frame of "<s> $A" like Llama-3's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # pyright: ignore[reportCallIssue]
    tokenizer.train_from_iterator(WORDS, trainer)
    return wrapped(tokenizer, frame, bos_token="<s>")


def wordpiece() -> PreTrainedTokenizerFast:
    """Like BERT's: lower case, words apart, a token at either end."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))  # pyright: ignore[reportCallIssue]
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(WORDS, trainer)
    return wrapped(tokenizer, "<s> $A </s>", bos_token="<s>")

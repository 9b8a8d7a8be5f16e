"""A small tokenizer made from the data, for models that start from nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from conch.config import ModelConfig, TokenizerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, EOS = "<|padding|>", "<|endoftext|>"


def tokenizer_for(
    model: ModelConfig, config: TokenizerConfig, texts: Iterable[str]
) -> PreTrainedTokenizerBase:
    """The model's tokenizer; for a model of random weights without one, byte pairs learned from `texts`, as
    many as its vocabulary has room for. The same texts give the same tokenizer."""
    # They load torch, which help and mistyped keys do without.
    from transformers import PreTrainedTokenizerFast

    from conch.models.loading import load_tokenizer

    if model.architecture is None or config.path is not None:
        return load_tokenizer(config, model.path)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=model.architecture["vocab_size"],
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        truncation_side=config.truncation_side,
    )

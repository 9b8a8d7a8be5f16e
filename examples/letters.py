"""A tokenizer of single letters, for examples whose texts are made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def tokenizer_of(letters: str, max_length: int) -> PreTrainedTokenizerFast:
    """One token a letter, and `<pad>`, `<eos>`.

    max_length: of a text, in tokens.
    """
    from transformers import PreTrainedTokenizerFast  # loads torch, which help and mistyped keys do without

    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *letters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=max_length,
    )

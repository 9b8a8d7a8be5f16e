"""Film reviews, and models of them that are small enough for a CPU."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_VOCABULARY = 2000
_WINDOW = 128


def reviews(path: Path) -> list[dict[str, Any]]:
    """Read rows of JSON with a `text` and a `label`, 1 for a kind review, 0 for another."""
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def tokenizer_of(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Learn byte pairs from texts."""
    from transformers import PreTrainedTokenizerFast  # loads torch, which help does without

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def model_of(kind: str, tokenizer: PreTrainedTokenizerFast, **more: Any) -> Any:
    """Make a GPT-2 of random weights.

    kind: its class, "GPT2LMHeadModel".
    """
    import transformers

    shape = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": _WINDOW}
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    config = transformers.GPT2Config(vocab_size=len(tokenizer), **shape, **ids, **more)
    return getattr(transformers, kind)(config)

"""What the benchmarks run on: real dialogues, and a random reward model with a tokenizer made for them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

from conch.errors import ConchError

WINDOW = 1024
VOCABULARY = 8192
_SPECIAL = ["<pad>", "<eos>"]  # get the first ids, in this order


def dialogues(path: Path, count: int) -> list[str]:
    """The first `count` distinct dialogues of a file in Anthropic's HH form, one JSON object a line.

    Raises:
        ConchError: the file cannot be read, is of another form, or holds fewer.
    """
    found: dict[str, None] = {}
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open() as lines:
            for line in lines:
                pair = json.loads(line)
                found.update({pair["chosen"]: None, pair["rejected"]: None})
                if len(found) >= count:
                    return list(found)[:count]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConchError(
            f"{path} does not hold JSON lines with `chosen` and `rejected` ({type(error).__name__}: {error})"
        ) from error
    raise ConchError(f"{path} holds {len(found)} distinct dialogues, {count} were asked for; lower --samples")


def write_checkpoint(folder: Path, texts: list[str], *, layers: int, width: int) -> Path:
    """Save a random GPT-2 classifier, window 1,024 tokens, and a byte-level BPE made from `texts`."""
    tokenizer = byte_pairs(texts)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=WINDOW,
        n_layer=layers,
        n_embd=width,
        n_head=max(1, width // 64),
        bos_token_id=None,
        eos_token_id=_SPECIAL.index("<eos>"),
        pad_token_id=_SPECIAL.index("<pad>"),
    )
    config.num_labels = 1
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_pairs(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `VOCABULARY` tokens made from `texts`, with `<pad>` and `<eos>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", model_max_length=WINDOW
    )

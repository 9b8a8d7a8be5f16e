"""Whole samples for supervised training: token ids with a mask of what the loss counts.

Legend: B samples, T tokens. Samples are padded on the right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from conch.errors import DataError

_PAIR = ("prompt", "completion")


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """token_ids: the whole sample, eos included. loss_mask: True at tokens that the model learns."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]


@dataclass(frozen=True)
class TokenBatch:
    """input_ids, attention_mask (True at real tokens), loss_mask (True at learned tokens): each [B, T]."""

    input_ids: Int[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    loss_mask: Bool[Tensor, "B T"]


def tokenize_samples(
    samples: Sequence[Any], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int | None
) -> list[TokenizedSample]:
    """Tokenise strings (loss on all but the first token) or {"prompt", "completion"} pairs (loss on the
    latter).

    An eos token ends every sample and is learned.

    Raises:
        DataError: there are none, or one is empty, of another form, or longer than `max_tokens`.
    """
    if not samples:
        raise DataError("the list of samples is empty: give at least one sample")
    made = [_tokenize(sample, index, tokenizer) for index, sample in enumerate(samples)]
    for index, sample in enumerate(made):
        if max_tokens is not None and len(sample.token_ids) > max_tokens:
            raise DataError(
                f"sample {index} has {len(sample.token_ids)} tokens, its eos included; the model's window "
                f"holds {max_tokens}: shorten it"
            )
    return made


def collate(
    samples: Sequence[TokenizedSample], pad_token_id: int, device: torch.device | str = "cpu"
) -> TokenBatch:
    """Pad on the right to the longest sample."""
    longest = max(len(sample.token_ids) for sample in samples)
    ids = torch.full((len(samples), longest), pad_token_id, dtype=torch.long)
    attention = torch.zeros(len(samples), longest, dtype=torch.bool)
    loss = torch.zeros(len(samples), longest, dtype=torch.bool)
    for row, sample in enumerate(samples):
        length = len(sample.token_ids)
        ids[row, :length] = torch.tensor(sample.token_ids)
        attention[row, :length] = True
        loss[row, :length] = torch.tensor(sample.loss_mask)
    return TokenBatch(ids.to(device), attention.to(device), loss.to(device))


def _tokenize(sample: Any, index: int, tokenizer: PreTrainedTokenizerBase) -> TokenizedSample:
    if isinstance(sample, str):
        prompt, completion = "", sample
    elif isinstance(sample, Mapping) and all(isinstance(sample.get(key), str) for key in _PAIR):
        prompt, completion = (sample[key] for key in _PAIR)
    else:
        raise DataError(f'sample {index} is neither a string nor a dict of strings "prompt" and "completion"')
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    if not ids:
        what = "sample" if isinstance(sample, str) else "completion of sample"
        raise DataError(f"{what} {index} is empty once tokenised: drop it")
    ids = [*prompt_ids, *ids, tokenizer.eos_token_id]
    loss = [position >= max(1, len(prompt_ids)) for position in range(len(ids))]
    return TokenizedSample(tuple(ids), tuple(loss))

"""Several samples in one row, so that little of a batch is padding.

Legend: B rows, T columns (padded on the right), R = T - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from conch.data.samples import TokenBatch, TokenizedSample
from conch.ops import first_fit


@dataclass(frozen=True)
class PackedBatch(TokenBatch):
    """A `TokenBatch` whose rows hold samples one behind the other; R is T - 1.

    position_ids [B, T]: of each token in its own sample, so that 0 begins another sample; 0 at padding.
    """

    position_ids: Int[Tensor, "B T"]


def collate_packed(
    samples: Sequence[TokenizedSample],
    pad_token_id: int,
    capacity: int,
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """Lay samples into as few rows of at most `capacity` tokens as `first_fit` finds."""
    rows = [[samples[index] for index in row] for row in first_fit(_lengths(samples), capacity)]
    longest = max(2, *(sum(_lengths(row)) for row in rows))
    ids = torch.full((len(rows), longest), pad_token_id, dtype=torch.long)
    positions = torch.zeros_like(ids)
    real, learned = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(rows):
        start = 0
        for sample in row:
            end = start + len(sample.token_ids)
            ids[number, start:end] = torch.tensor(sample.token_ids)
            positions[number, start:end] = torch.arange(end - start)
            real[number, start:end] = True
            # The first token would be predicted from the sample before.
            learned[number, start + 1 : end] = torch.tensor(sample.loss_mask[1:], dtype=torch.bool)
            start = end
    tensors = (ids, real, learned[:, 1:], positions)
    return PackedBatch(*(tensor.to(device) for tensor in tensors))


def _lengths(samples: Sequence[TokenizedSample]) -> list[int]:
    return [len(sample.token_ids) for sample in samples]

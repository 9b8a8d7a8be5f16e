"""Rows that end at lengths drawn beforehand, for models without training, which do not end by themselves.

Imports torch and transformers alone: a process without Conch uses it as well.

Legend: B rows, T tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor


class EndAt(LogitsProcessor):
    """Forbids the end before a row's length is reached, and leaves nothing but the end there.

    The last token of a prompt is a marker that says how long its response is to be: marker `first_marker + n`
    stands for `lengths[n]` tokens, the end included. So a row is known by what it holds, wherever it stands
    in a batch and however it is padded. Markers are the last ids of the vocabulary and are never sampled.
    Without `lengths` no prompt has a marker and no row ends before the limit of the sampler.
    """

    def __init__(self, eos_id: int, first_marker: int = 0, lengths: Sequence[int] = ()) -> None:
        self._eos_id = eos_id
        self._first_marker = first_marker
        self._lengths = torch.tensor(lengths, dtype=torch.long)
        self.reads_history = len(lengths) > 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: [B, T], padded left or not. scores: [B, V]."""
        # Out of place: one side looks at the logits before this as well.
        scores = scores.clone()
        if not len(self._lengths):
            scores[:, self._eos_id] = -torch.inf
            return scores
        lengths = self._lengths.to(input_ids.device)
        is_marker = input_ids >= self._first_marker
        place = is_marker.int().argmax(dim=1)
        marker = input_ids.gather(1, place.unsqueeze(1)).squeeze(1) - self._first_marker
        is_last = input_ids.shape[1] - 1 - place == lengths[marker] - 1
        scores[:, self._first_marker :] = -torch.inf
        scores[~is_last, self._eos_id] = -torch.inf
        scores[is_last] = -torch.inf
        scores[is_last, self._eos_id] = 0.0
        return scores

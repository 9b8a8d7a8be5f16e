"""A served model as one graph over padded token ids, which ONNX and TorchScript can hold."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from conch.converters.triton_models.encoding import is_blank, special_ids
from conch.converters.triton_models.network import ServedModel
from conch.store.manifest import ScoringRules


class Graph(nn.Module):
    """Scores of rows that are padded on either side.

    Whatever stands where the mask is 0 does not matter. Rows are shifted to the left first, since many models
    count positions from the first column and would score a row that is padded on the left like another text
    (GPT-2 was off by 19 on scores of +-20); so it is exact for every architecture, with its own positions.

    model: called with `input_ids`, `attention_mask`, gives scores of rows padded on the right with
        `pad_token_id`.
    """

    def __init__(self, model: nn.Module, pad_token_id: int) -> None:
        super().__init__()
        self.model = model
        self.pad_token_id = pad_token_id

    def forward(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B K"]:
        """Scores float32."""
        length = input_ids.shape[1]
        columns = torch.arange(length, device=input_ids.device)[None, :]
        # argmax gives the first 1 of each row.
        source = columns + attention_mask.argmax(dim=1, keepdim=True)
        source = torch.where(source >= length, source - length, source)
        mask = attention_mask.gather(1, source)
        ids = torch.where(mask != 0, input_ids.gather(1, source), self.pad_token_id)
        return self.model(ids, mask).float()


class StepScores(nn.Module):
    """Scores of a process reward by ids and mask alone: where steps end is found in the ids.

    model: is told where they end.
    """

    is_blank: Tensor

    def __init__(self, model: ServedModel, tokenizer: Any, rules: ScoringRules) -> None:
        super().__init__()
        self.model = model
        self.eos = rules.eos_token_id
        self.separator = rules.separator_ids or (rules.separator_id,)
        special, known = special_ids(tokenizer), set(tokenizer.get_vocab().values())
        ids = range(rules.vocab_size)
        blank = [id in known and is_blank(tokenizer, id, special) for id in ids]
        self.register_buffer("is_blank", torch.tensor(blank))

    def forward(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B K"]:
        """Scores of rows padded on the right."""
        scores, _ = self.model.dense(input_ids, attention_mask, self.step_ends(input_ids, attention_mask))
        return scores

    def step_ends(self, input_ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        """Where steps end: at separators, and at the last token but an eos of a step that none closes."""
        inside, places = mask.bool(), torch.arange(mask.shape[1], device=mask.device)
        ends = inside
        for back, token in enumerate(reversed(self.separator)):
            ends = ends & (input_ids.roll(back, dims=1) == token) & (places >= back)
        last_end = torch.where(ends, places, -1).amax(dim=1, keepdim=True)
        behind = inside & (places > last_end)
        is_open = (last_end < 0) | (behind & ~self.is_blank[input_ids]).any(dim=1, keepdim=True)
        words = behind if self.eos is None else behind & (input_ids != self.eos)
        read = torch.where(words.any(dim=1, keepdim=True), words, behind)
        last = torch.where(read, places, -1).amax(dim=1, keepdim=True)
        return ends | (is_open & (places == last))


def example_rows(vocab_size: int, max_length: int, pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Ids and mask to export with: three rows, padded on both sides, long enough that no size looks constant.

    Exported on a row of one token, Llama failed on every longer one.
    """
    length = max(2, min(11, max_length))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (3, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length // 2 + 1 :] = 0
    mask[1, : length // 2] = 0
    return ids.masked_fill(mask == 0, pad_token_id), mask

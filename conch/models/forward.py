"""Batches for the forward passes of policies and references: packed where the model allows it, else padded.

In a packed row samples stand one after the other, none of which sees another. Responses to the same prompt
share it: the prompt is read once, and each response sees it and itself (as in the prefix trees of serving
engines, Zheng et al. 2023, arXiv:2312.07104). Outputs are equal but for rounding.

Attention that takes lengths instead of masks (flash-attention) cannot share a prompt: all samples stand in
one row then, each with its own prompt, and nothing is padded.

Legend: B samples, T columns (P prompt, padded left, and R response, padded right), N rows of C columns, K
response tokens of all samples, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from conch.log import get_logger
from conch.models.attention import (
    attends_by_lengths,
    attends_by_mask,
    keeps_apart,
    sharing_mask,
    sliding_window,
    takes_positions,
)
from conch.ops import first_fit, logprobs_of_labels

_log = get_logger(__name__)

AttentionMask = Bool[Tensor, "B T"] | Bool[Tensor, "B 1 T T"] | None
"""Which tokens are real, or see each other.

Padded rows: [B, T], True at real tokens, False at padding on either side.
Packed rows: [B, 1, T, T], True at [b, 0, i, j] where token i sees token j.
None: one packed row for attention that takes lengths; each position 0 begins a sample that sees itself alone.
"""

Positions = int | Int[Tensor, " K"]
"""Where the response tokens were chosen: at these positions logits and values are read.

Padded rows: R, for the last R tokens, each of which was chosen at the token before it.
Packed rows: indices into all B * T positions, one for each of the K response tokens of all samples.
"""


Packing = Literal["shared", "one_row", "padded"]
"""Rows that a model reads: packed ones that share prompts, one row without padding, or padded ones."""


class ForwardInputs(NamedTuple):
    """The one argument of a policy's and a reference's forward pass: padded or packed rows.

    It is a named tuple because DeepSpeed and DDP look for a forward pass's tensors in tuples, not in
    dataclasses.

    input_ids: token ids.
    attention_mask: see `AttentionMask`.
    positions: see `Positions`.
    position_ids: of packed rows, counted from 0 in each sample; None for padded rows.
    """

    input_ids: Int[Tensor, "B T"]
    attention_mask: AttentionMask
    positions: Positions
    position_ids: Int[Tensor, "B T"] | None = None


@dataclass(frozen=True)
class ForwardBatch:
    """Inputs of a forward pass, and the way from its outputs back to samples.

    inputs: for policies and references.
    labels: response tokens in the shape of the outputs: [B, R] of padded rows, [1, K] of packed ones.
    response_mask: True at response tokens.
    """

    inputs: ForwardInputs
    labels: Int[Tensor, "N K"]
    response_mask: Bool[Tensor, "B R"]

    def logprobs(self, logits: Float[Tensor, "N K V"], temperature: float) -> Float[Tensor, "B R"]:
        """Log-probs of the response tokens from the logits of a forward pass; 0 where there is no token."""
        return self.unpack(logprobs_of_labels(logits, self.labels, temperature))

    def unpack(self, values: Float[Tensor, "N K"]) -> Float[Tensor, "B R"]:
        """Values of the labels, rearranged by sample; 0 where there is no token."""
        zeros = torch.zeros(self.response_mask.shape, dtype=values.dtype, device=values.device)
        if values.shape != self.response_mask.shape:
            return zeros.masked_scatter(self.response_mask, values)
        return torch.where(self.response_mask, values, zeros)


class BatchPacker:
    """Makes forward batches for one model.

    Runs the model once to find out whether it takes packed rows. Give it the model on the device where it
    will run, before it is wrapped.

    packs: False where the model takes padded rows only.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        self._shares_prompts = takes_packed_rows(lm)
        self.packs = self._shares_prompts or takes_one_row(lm)
        self._window = sliding_window(lm.config)
        if not self.packs:
            _log.info("%s reads padded rows: it does not take packed ones", type(lm).__name__)

    @property
    def kind(self) -> Packing:
        """The rows that `pack` makes."""
        return "shared" if self._shares_prompts else "one_row" if self.packs else "padded"

    def pack(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"], num_response: int
    ) -> ForwardBatch:
        """Make the batch of one forward pass.

        input_ids: prompts, padded left, and `num_response` columns of responses, padded right.
        attention_mask: True at real tokens, which are contiguous in each sample.
        """
        if not self.packs:
            return padded_rows(input_ids, attention_mask, num_response)
        pieces = _pieces(input_ids, attention_mask, num_response, self._shares_prompts)
        # Kernels that take lengths apply a local attention's window themselves.
        if not self._shares_prompts:
            return _packed_rows(input_ids, attention_mask, num_response, [pieces], masked=False)
        capacity = max(piece.length for piece in pieces)
        if self._window is not None and capacity > self._window:
            return padded_rows(input_ids, attention_mask, num_response)
        contents = first_fit([piece.length for piece in pieces], capacity)
        rows = [[pieces[index] for index in row] for row in contents]
        return _packed_rows(input_ids, attention_mask, num_response, rows, masked=True)


def takes_packed_rows(lm: PreTrainedModel) -> bool:
    """True for a model that keeps the samples of a packed row apart by a mask."""
    return attends_by_mask(lm) and _keeps_apart(lm)


def takes_one_row(lm: PreTrainedModel) -> bool:
    """True for a model that keeps the samples of one row apart by their lengths."""
    return attends_by_lengths(lm) and _keeps_apart(lm)


def _keeps_apart(lm: PreTrainedModel) -> bool:
    if not takes_positions(lm):
        return False
    was_training = lm.training
    try:
        return keeps_apart(lm.eval())
    finally:
        lm.train(was_training)


def padded_rows(
    input_ids: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"], num_response: int
) -> ForwardBatch:
    """A padded batch, a row for each sample, without the columns before the longest prompt."""
    used = attention_mask.any(dim=0).long().argmax()
    first = min(int(used), input_ids.shape[1] - num_response - 1)
    return ForwardBatch(
        ForwardInputs(input_ids[:, first:], attention_mask[:, first:], num_response),
        input_ids[:, -num_response:],
        attention_mask[:, -num_response:],
    )


@dataclass(frozen=True)
class _Piece:
    """A prompt and responses to it, which stand together in a packed row.

    sample: a sample that has this prompt.
    prompt_length: tokens of the prompt.
    responses: samples, and how many of their response tokens the model reads: all but the last one, after
        which nothing was chosen.
    """

    sample: int
    prompt_length: int
    responses: list[tuple[int, int]] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.prompt_length + self.response_length

    @property
    def response_length(self) -> int:
        return sum(length for _, length in self.responses)


def _pieces(
    input_ids: Tensor, attention_mask: Tensor, num_response: int, shares_prompts: bool
) -> list[_Piece]:
    """Pieces with all responses.

    The responses to a prompt stand in one piece while they are together no longer than the prompt, or than
    the longest response. Beyond that, attention over the piece costs more than reading the prompt again.

    shares_prompts: False gives each response a piece of its own.
    """
    ids, mask = input_ids.cpu().numpy(), attention_mask.cpu().numpy()
    prompts, responses = mask[:, :-num_response].sum(axis=1), mask[:, -num_response:].sum(axis=1)
    families: dict[bytes | int, list[int]] = {}
    for sample in np.flatnonzero(responses).tolist():
        end = ids.shape[1] - num_response
        prompt = ids[sample, end - prompts[sample] : end].tobytes()
        families.setdefault(prompt if shares_prompts else sample, []).append(sample)
    pieces = []
    for samples in families.values():
        prompt_length = int(prompts[samples[0]])
        longest = max(prompt_length, *(int(responses[sample]) - 1 for sample in samples))
        pieces.append(_Piece(samples[0], prompt_length))
        for sample in samples:
            length = int(responses[sample]) - 1
            if pieces[-1].responses and pieces[-1].response_length + length > longest:
                pieces.append(_Piece(sample, prompt_length))
            pieces[-1].responses.append((sample, length))
    return pieces or [_Piece(0, max(1, int(prompts[0])))]


def _packed_rows(
    input_ids: Tensor, attention_mask: Tensor, num_response: int, rows: list[list[_Piece]], *, masked: bool
) -> ForwardBatch:
    """A packed batch. rows: the pieces of each. masked: False for attention that takes lengths."""
    ids, device = input_ids.cpu().numpy(), input_ids.device
    width = max(sum(piece.length for piece in row) for row in rows)
    # Padding is a family of its own in each column, so that it sees itself: what sees nothing becomes NaN.
    family = np.tile(-np.arange(1, width + 1), (len(rows), 1))
    columns = np.zeros((3, *family.shape), dtype=np.int64)
    indices: dict[int, Any] = {}
    for row, pieces in enumerate(rows):
        start = 0
        for number, piece in enumerate(pieces):
            family[row, start : start + piece.length] = number
            columns[:, row, start : start + piece.length] = _columns(piece, ids, num_response)
            for sample, offsets in _offsets(piece).items():
                indices[sample] = row * width + start + offsets
            start += piece.length
    positions = np.concatenate(
        [np.zeros(0, dtype=np.int64), *(indices[sample] for sample in sorted(indices))]
    )
    packed_ids, position_ids, member, family, positions = (
        torch.from_numpy(each).to(device) for each in (*columns, family, positions)
    )
    response_mask = attention_mask[:, -num_response:]
    mask = sharing_mask(family, member) if masked else None
    return ForwardBatch(
        ForwardInputs(packed_ids, mask, positions, position_ids),
        input_ids[:, -num_response:][response_mask].unsqueeze(0),
        response_mask,
    )


def _columns(piece: _Piece, ids: Any, num_response: int) -> Any:
    """[3, length] of a piece: token id, position id, and member, which is 0 for the prompt."""
    end, prompt_length = ids.shape[1] - num_response, piece.prompt_length
    prompt = np.arange(prompt_length)
    blocks = [(ids[piece.sample, end - prompt_length : end], prompt, np.zeros_like(prompt))]
    for member, (sample, length) in enumerate(piece.responses, start=1):
        offsets = np.arange(length)
        blocks.append(
            (ids[sample, end : end + length], prompt_length + offsets, np.full_like(offsets, member))
        )
    return np.concatenate([np.stack(block) for block in blocks], axis=1)


def _offsets(piece: _Piece) -> dict[int, Any]:
    """Sample -> offsets in the piece at which its response tokens were chosen: that of the prompt's last
    token, and those of its own tokens that are read."""
    offsets, start = {}, piece.prompt_length
    for sample, length in piece.responses:
        offsets[sample] = np.concatenate([[piece.prompt_length - 1], np.arange(start, start + length)])
        start += length
    return offsets

"""The rows that a decoder reads for prompts and responses: packed where the model allows it, else padded.

In a packed row samples stand one after the other, none of which sees another. Responses to the same prompt
share it: the prompt is read once, and each response sees it and itself (as in the prefix trees of serving
engines, Zheng et al. 2023, arXiv:2312.07104). What a model puts out is the same but for rounding.

Attention that takes lengths instead of masks (flash-attention) cannot share a prompt: all samples stand in
one row then, each with its own, and nothing is padded.

Legend: B samples, T columns (P prompt, padded left, and R response, padded right), N rows of C columns, K
response tokens of all samples, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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


class ForwardInputs(NamedTuple):
    """The one argument of a policy's and a reference's forward pass: padded or packed rows.

    It is a tuple because DeepSpeed and DDP look for tensors in tuples, and in no class of ours.

    input_ids: token ids.
    attention_mask: which tokens are real, or see each other.
    positions: where logits and values are read.
    position_ids: of packed rows, each sample counting from 0; None for padded rows.
    """

    input_ids: Int[Tensor, "B T"]
    attention_mask: AttentionMask
    positions: Positions
    position_ids: Int[Tensor, "B T"] | None = None


@dataclass(frozen=True)
class ForwardBatch:
    """What models read, and the way back.

    inputs: arguments of a policy's or reference's forward pass, see `conch.models.policy`. labels: the
    response tokens, [B, R] as the forward pass puts out, or [1, K]. response_mask: True at response tokens.
    """

    inputs: ForwardInputs
    labels: Int[Tensor, "N K"]
    response_mask: Bool[Tensor, "B R"]

    def logprobs(self, logits: Float[Tensor, "N K V"], temperature: float) -> Float[Tensor, "B R"]:
        """Of the response tokens, from a forward pass's logits; see `conch.ops.logprobs_of_labels`."""
        return self.unpack(logprobs_of_labels(logits, self.labels, temperature))

    def unpack(self, values: Float[Tensor, "N K"]) -> Float[Tensor, "B R"]:
        """What a forward pass gave for each label, in the samples' places; 0 where there is no token."""
        nothing = torch.zeros(self.response_mask.shape, dtype=values.dtype, device=values.device)
        if values.shape != self.response_mask.shape:
            return nothing.masked_scatter(self.response_mask, values)
        return torch.where(self.response_mask, values, nothing)


class BatchPacker:
    """Makes the rows for one model; which kind, is found out once. Give it the model on the device where it
    will run, before it is wrapped."""

    def __init__(self, lm: PreTrainedModel) -> None:
        self._shares = takes_packed_rows(lm)
        self.packs = self._shares or takes_one_row(lm)
        self._window = sliding_window(lm.config)
        if not self.packs:
            _log.info("%s reads padded rows: it does not take packed ones", type(lm).__name__)

    def pack(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"], num_response: int
    ) -> ForwardBatch:
        """attention_mask: True at real tokens, which are contiguous in each sample."""
        if not self.packs:
            return padded_rows(input_ids, attention_mask, num_response)
        pieces = _pieces(input_ids, attention_mask, num_response, self._shares)
        if not self._shares:  # kernels that take lengths keep to a local attention's window themselves
            return _packed_rows(input_ids, attention_mask, num_response, [pieces], masked=False)
        capacity = max(piece.length for piece in pieces)
        if self._window is not None and capacity > self._window:
            return padded_rows(input_ids, attention_mask, num_response)
        filled = first_fit([piece.length for piece in pieces], capacity)
        rows = [[pieces[index] for index in row] for row in filled]
        return _packed_rows(input_ids, attention_mask, num_response, rows, masked=True)


def takes_packed_rows(lm: PreTrainedModel) -> bool:
    """Whether the model keeps apart what stands in a row under a mask that says so."""
    return attends_by_mask(lm) and _keeps_apart(lm)


def takes_one_row(lm: PreTrainedModel) -> bool:
    """Whether the model keeps samples apart that stand in one row, told their lengths alone."""
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
    """A row for each sample, without the columns before the longest prompt."""
    used = attention_mask.any(dim=0).long().argmax()
    first = min(int(used), input_ids.shape[1] - num_response - 1)
    return ForwardBatch(
        ForwardInputs(input_ids[:, first:], attention_mask[:, first:], num_response),
        input_ids[:, -num_response:],
        attention_mask[:, -num_response:],
    )


@dataclass(frozen=True)
class _Piece:
    """What stands in a row together: a prompt and responses to it.

    sample: one that has this prompt. responses: samples and how many of their tokens are read; the last one
    of a response is not, for nothing was chosen after it.
    """

    sample: int
    prompt: int
    responses: list[tuple[int, int]] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.prompt + self.read

    @property
    def read(self) -> int:
        return sum(length for _, length in self.responses)


def _pieces(input_ids: Tensor, attention_mask: Tensor, num_response: int, shares: bool) -> list[_Piece]:
    """All responses, those of a prompt together while they are no longer than it or than the longest one:
    beyond that, attention over the whole row would cost more than reading the prompt again.

    shares: whether a prompt may stand once for several responses at all.
    """
    ids, mask = input_ids.cpu().numpy(), attention_mask.cpu().numpy()
    prompts, responses = mask[:, :-num_response].sum(axis=1), mask[:, -num_response:].sum(axis=1)
    families: dict[bytes | int, list[int]] = {}
    for sample in np.flatnonzero(responses).tolist():
        end = ids.shape[1] - num_response
        prompt = ids[sample, end - prompts[sample] : end].tobytes()
        families.setdefault(prompt if shares else sample, []).append(sample)
    pieces = []
    for samples in families.values():
        most = max(int(prompts[samples[0]]), *(int(responses[each]) - 1 for each in samples))
        pieces += _shared(samples, int(prompts[samples[0]]), responses, most)
    return pieces or [_Piece(0, max(1, int(prompts[0])))]


def _shared(samples: Sequence[int], prompt: int, responses: Any, most: int) -> list[_Piece]:
    pieces = [_Piece(samples[0], prompt)]
    for sample in samples:
        read = int(responses[sample]) - 1
        if pieces[-1].responses and pieces[-1].read + read > most:
            pieces.append(_Piece(sample, prompt))
        pieces[-1].responses.append((sample, read))
    return pieces


def _packed_rows(
    input_ids: Tensor, attention_mask: Tensor, num_response: int, filled: list[list[_Piece]], *, masked: bool
) -> ForwardBatch:
    ids, device = input_ids.cpu().numpy(), input_ids.device
    width = max(sum(piece.length for piece in row) for row in filled)
    # Padding is a family of its own in each column, so that it sees itself: what sees nothing becomes NaN.
    family = np.tile(-np.arange(1, width + 1), (len(filled), 1))
    table = np.zeros((3, *family.shape), dtype=np.int64)
    chosen: dict[int, Any] = {}
    for row, pieces in enumerate(filled):
        at = 0
        for number, piece in enumerate(pieces):
            family[row, at : at + piece.length] = number
            table[:, row, at : at + piece.length] = _columns(piece, ids, num_response)
            for sample, places in _chosen(piece).items():
                chosen[sample] = row * width + at + places
            at += piece.length
    places = np.concatenate([np.zeros(0, dtype=np.int64), *(chosen[sample] for sample in sorted(chosen))])
    read, positions, member, family, places = (
        torch.from_numpy(each).to(device) for each in (*table, family, places)
    )
    response_mask = attention_mask[:, -num_response:]
    mask = sharing_mask(family, member) if masked else None
    return ForwardBatch(
        ForwardInputs(read, mask, places, positions),
        input_ids[:, -num_response:][response_mask].unsqueeze(0),
        response_mask,
    )


def _columns(piece: _Piece, ids: Any, num_response: int) -> Any:
    """[3, length] of a piece: token, position, and member, which is 0 for the prompt."""
    end = ids.shape[1] - num_response
    prompt = np.arange(piece.prompt)
    blocks = [(ids[piece.sample, end - piece.prompt : end], prompt, np.zeros_like(prompt))]
    for member, (sample, length) in enumerate(piece.responses, start=1):
        places = np.arange(length)
        blocks.append((ids[sample, end : end + length], piece.prompt + places, np.full_like(places, member)))
    return np.concatenate([np.stack(block) for block in blocks], axis=1)


def _chosen(piece: _Piece) -> dict[int, Any]:
    """Sample -> where in the piece its tokens were chosen: at the prompt's last token, and at each of its own
    that is read."""
    found, at = {}, piece.prompt
    for sample, length in piece.responses:
        found[sample] = np.concatenate([[piece.prompt - 1], np.arange(at, at + length)])
        at += length
    return found

"""Batches for the forward passes of policies and references: packed where the model allows it, else padded.

In a packed row samples stand one after the other, none of which sees another. Responses to the same prompt
share it: the prompt is read once, and each response sees it and itself (as in the prefix trees of serving
engines, Zheng et al. 2023, arXiv:2312.07104). Outputs are equal but for rounding.

How far responses share, and how wide rows are, depends on lengths and the model alone: see `best_layout`.

Attention that takes lengths instead of masks (flash-attention) cannot share a prompt: all samples stand in
one row then, each with its own prompt, and nothing is padded.

Legend: B samples, T columns (P prompt, padded left, and R response, padded right), N rows of C columns, K
response tokens of all samples, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
        self._cost = row_cost(lm)
        self._widest = widest_row(lm)
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
        families = _families(input_ids, attention_mask, num_response, self._shares_prompts)
        # Kernels that take lengths apply a local attention's window themselves.
        if not self._shares_prompts:
            return _packed_rows(input_ids, attention_mask, num_response, [families], masked=False)
        layout = best_layout(families, self._cost, self._widest)
        if layout is None:
            return padded_rows(input_ids, attention_mask, num_response)
        return _packed_rows(input_ids, attention_mask, num_response, layout.rows(families), masked=True)


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
class Piece:
    """A prompt and responses to it, which stand together in a packed row.

    sample: a sample that has this prompt.
    prompt_length: tokens of the prompt.
    responses: samples, and how many of their response tokens the model reads: all but the last one, after
        which nothing was chosen.
    """

    sample: int
    prompt_length: int
    responses: list[tuple[int, int]]

    @property
    def length(self) -> int:
        return self.prompt_length + sum(length for _, length in self.responses)

    @property
    def longest_response(self) -> int:
        return max((length for _, length in self.responses), default=0)


def _families(
    input_ids: Tensor, attention_mask: Tensor, num_response: int, shares_prompts: bool
) -> list[Piece]:
    """Each prompt with all its responses, in the order of the samples; a piece at least.

    shares_prompts: False gives each response a piece of its own.
    """
    ids, mask = input_ids.cpu().numpy(), attention_mask.cpu().numpy()
    prompts = mask[:, :-num_response].sum(axis=1).tolist()
    responses = mask[:, -num_response:].sum(axis=1).tolist()
    end = ids.shape[1] - num_response
    families: dict[bytes | int, Piece] = {}
    for sample, (prompt_length, length) in enumerate(zip(prompts, responses, strict=True)):
        if length:
            key = ids[sample, end - prompt_length : end].tobytes() if shares_prompts else sample
            family = families.setdefault(key, Piece(sample, prompt_length, []))
            family.responses.append((sample, length - 1))
    return list(families.values()) or [Piece(0, max(1, prompts[0]), [])]


# -------------------------------------------------------------------------------------------------- layouts

_ATTENTION_COST = 2
"""Time of a multiplication of attention under a mask, in that of one by a weight.

Measured on a CPU by forward and backward passes over as many tokens in rows of several widths: 0.8 to 1.8 for
D of 64 to 1024."""

_WIDEST_ROW = 4096
"""Columns of a row of several samples, at most: its mask has the square of them."""

_CAPACITIES = 16
"""Capacities that are tried grow by a part in so many."""


@dataclass(frozen=True)
class RowCost:
    """Work of a layer for packed rows, forward or backward, up to a factor.

    A token is multiplied by 12 D^2 weights; its query and its probabilities by D numbers for each column of
    its row.

    hidden_size: D.
    attention: weight of the products of attention.
    """

    hidden_size: int
    attention: int = _ATTENTION_COST

    def of_token(self, width: int) -> int:
        """For a token in a row of so many columns."""
        return 6 * self.hidden_size + self.attention * width

    def of_rows(self, num_rows: int, width: int) -> int:
        """For so many rows, padding included."""
        return num_rows * width * self.of_token(width)


def row_cost(lm: PreTrainedModel) -> RowCost | None:
    """Cost of this model's rows; None where it was not measured, as on a GPU, or the config names no width.

    What costs less takes no more memory either. A token keeps at least 8 D numbers of a layer while it is
    computed, and 16 D for its backward pass; a cell of sdpa's mask 5 bytes; a cell of eager attention a few
    numbers in each head, which therefore is its weight.
    """
    config = lm.config.get_text_config()
    hidden_size = getattr(config, "hidden_size", None)
    if lm.device.type != "cpu" or not isinstance(hidden_size, int):
        return None
    is_eager = lm.config._attn_implementation == "eager"
    num_heads = int(getattr(config, "num_attention_heads", hidden_size)) if is_eager else 0
    return RowCost(hidden_size, max(_ATTENTION_COST, num_heads))


def widest_row(lm: PreTrainedModel) -> int | None:
    """Columns of a packed row that this model's own masks allow; None for any number."""
    config = lm.config.get_text_config()
    # GPT-Neo cuts its causal mask out of one for all positions.
    causal = int(config.max_position_embeddings) if config.model_type == "gpt_neo" else None
    return min((each for each in (sliding_window(lm.config), causal) if each is not None), default=None)


@dataclass(frozen=True)
class RowLayout:
    """Pieces in packed rows.

    pieces: of each piece the number of its family, and of the responses that it takes from there.
    contents: numbers of the pieces in each row.
    width: columns of the widest row.
    """

    pieces: list[tuple[int, int]]
    contents: list[list[int]]
    width: int

    def rows(self, families: Sequence[Piece]) -> list[list[Piece]]:
        """Pieces of each row."""
        firsts, pieces = [0] * len(families), []
        for number, count in self.pieces:
            family, first = families[number], firsts[number]
            responses = family.responses[first : first + count]
            pieces.append(Piece(family.sample, family.prompt_length, responses))
            firsts[number] += count
        return [[pieces[index] for index in row] for row in self.contents]


def best_layout(families: Sequence[Piece], cost: RowCost | None, widest: int | None) -> RowLayout | None:
    """The layout of the least cost, by nothing but lengths; None where no row may be as wide as a sample.

    The first one shares a prompt among responses that are together no longer than the prompt, or than the
    longest response. The others share as far as a row has room, in rows that become wider until no layout of
    that width can be cheaper than the best one so far.

    cost: None takes the first one.
    widest: columns of a row, at most; None for any number.
    """
    limit = widest or sys.maxsize
    pieces, lengths = _cut(families, [max(each.prompt_length, each.longest_response) for each in families])
    best = _fitted(pieces, lengths, max(lengths)) if max(lengths) <= limit else None
    if cost is None:
        return best
    least = sys.maxsize if best is None else cost.of_rows(len(best.contents), best.width)
    total = sum(family.length for family in families)
    narrowest = max(family.prompt_length + family.longest_response for family in families)
    last = min(limit, max(narrowest, min(total, _WIDEST_ROW)))
    for capacity in _capacities(narrowest, last):
        if total * cost.of_token(capacity) >= least:
            break
        pieces, lengths = _cut(families, [capacity - family.prompt_length for family in families])
        if sum(lengths) * cost.of_token(max(lengths)) >= least:
            continue
        layout = _fitted(pieces, lengths, capacity)
        layout_cost = cost.of_rows(len(layout.contents), layout.width)
        if layout_cost < least:
            best, least = layout, layout_cost
    return best


def _capacities(first: int, last: int) -> Iterator[int]:
    """Widths of rows to try, ascending, the last one included; none where the first one is beyond it."""
    capacity = first
    while capacity < last:
        yield capacity
        capacity += max(1, capacity // _CAPACITIES)
    if first <= last:
        yield last


def _cut(families: Sequence[Piece], rooms: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Pieces, see `RowLayout`, as large as the rooms allow; and their lengths.

    rooms: response tokens of a piece, at most, for each family; one response has room always.
    """
    pieces, lengths = [], []
    for number, (family, room) in enumerate(zip(families, rooms, strict=True)):
        count = columns = 0
        for _, length in family.responses:
            if count and columns + length > room:
                pieces.append((number, count))
                lengths.append(family.prompt_length + columns)
                count = columns = 0
            count += 1
            columns += length
        pieces.append((number, count))
        lengths.append(family.prompt_length + columns)
    return pieces, lengths


def _fitted(pieces: list[tuple[int, int]], lengths: Sequence[int], capacity: int) -> RowLayout:
    """The pieces, of these lengths, in rows of at most `capacity` columns."""
    contents = first_fit(lengths, capacity)
    return RowLayout(pieces, contents, max(sum(lengths[index] for index in row) for row in contents))


def _packed_rows(
    input_ids: Tensor, attention_mask: Tensor, num_response: int, rows: list[list[Piece]], *, masked: bool
) -> ForwardBatch:
    """A packed batch. rows: the pieces of each. masked: False for attention that takes lengths."""
    ids, device = input_ids.cpu().numpy(), input_ids.device
    width, end = max(sum(piece.length for piece in row) for row in rows), ids.shape[1] - num_response
    # Runs of tokens: source, number, target, position of the first one, family, member.
    runs: list[tuple[int, ...]] = []
    # Of each sample: its prompt's last token, its first own one, and the number of those that are read.
    chosen: dict[int, tuple[int, int, int]] = {}
    for row, pieces in enumerate(rows):
        column = row * width
        for number, piece in enumerate(pieces):
            length = piece.prompt_length
            source = piece.sample * ids.shape[1] + end
            runs.append((source - length, length, column, 0, number, 0))
            column += length
            last = column - 1
            for member, (sample, num_read) in enumerate(piece.responses, start=1):
                source = sample * ids.shape[1] + end
                runs.append((source, num_read, column, length, number, member))
                chosen[sample] = (last, column, num_read)
                column += num_read
    columns = np.zeros((4, len(rows), width), dtype=np.int64)
    # Padding is a family of its own in each column, so that it sees itself: what sees nothing becomes NaN.
    columns[2] = -np.arange(1, width + 1)
    sources, lengths, targets, positions, families, members = np.array(runs, dtype=np.int64).T
    offsets = _offsets(lengths)
    values = (ids.ravel()[np.repeat(sources, lengths) + offsets], np.repeat(positions, lengths) + offsets)
    values = np.stack([*values, np.repeat(families, lengths), np.repeat(members, lengths)])
    columns.reshape(4, -1)[:, np.repeat(targets, lengths) + offsets] = values
    packed_ids, position_ids, family, member = torch.from_numpy(columns).to(device)
    response_mask = attention_mask[:, -num_response:]
    mask = sharing_mask(family, member) if masked else None
    return ForwardBatch(
        ForwardInputs(packed_ids, mask, torch.from_numpy(_chosen_at(chosen)).to(device), position_ids),
        input_ids[:, -num_response:][response_mask].unsqueeze(0),
        response_mask,
    )


def _chosen_at(chosen: dict[int, tuple[int, int, int]]) -> Any:
    """[K] positions at which response tokens were chosen, in the order of the samples: that of the prompt's
    last token, and those of a sample's own tokens that are read."""
    starts = np.array([chosen[sample] for sample in sorted(chosen)], dtype=np.int64).reshape(-1, 3)
    lasts, firsts, lengths = starts.T
    offsets = _offsets(lengths + 1)
    positions = np.repeat(firsts, lengths + 1) + offsets - 1
    positions[offsets == 0] = lasts
    return positions


def _offsets(lengths: Any) -> Any:
    """0, 1, ... below each of these lengths, one behind the other."""
    return np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)

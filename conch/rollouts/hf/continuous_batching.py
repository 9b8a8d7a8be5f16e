"""Decoding in slots: a row that has ended makes room for the next prompt, and little is computed behind an
end (continuous batching, Yu et al. 2022, "Orca", section 3.2).

A prompt that stands several times among those that are read together is read once for all of them. Keys and
values stand in buffers that are written in place; a slot's lie between its first column and its next one,
under a mask of its own.

Legend: B prompts that are read, S slots, N sampled rows (B or S), W columns, H heads, D their width, V
vocabulary.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, LogitsProcessor, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from conch.models.attention import as_attention_takes_it
from conch.ops import position_ids


class Sampling:
    """Chooses the next tokens from logits.

    processors, then warpers: change the logits, in this order. A processor whose `reads_history` is False is
    content with the last token instead of all that was read; warpers look at logits alone. greedy: take the
    likeliest token.

    wants_history: whether `scores` is to be told all that was read.
    """

    def __init__(
        self, processors: Sequence[LogitsProcessor], warpers: Sequence[LogitsProcessor], *, greedy: bool
    ) -> None:
        self.wants_history = any(getattr(each, "reads_history", True) for each in processors)
        self._processors = [*processors, *warpers]
        self._greedy = greedy

    def scores(self, read: Int[Tensor, "N W"], logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """The log-probs that are sampled from, of the rows of the forward pass just done, in its order.

        read: what stands before, padded left, or the last of it alone (W = 1).
        """
        scores = logits.float()
        for processor in self._processors:
            scores = processor(read, scores)  # pyright: ignore[reportArgumentType]  any integer type will do
        return scores.log_softmax(dim=-1)

    def draw(self, scores: Float[Tensor, "N V"]) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
        """A token for each row, and its log-prob."""
        tokens = scores.argmax(dim=-1) if self._greedy else torch.multinomial(scores.exp(), 1).squeeze(1)
        return tokens, scores.gather(1, tokens.unsqueeze(1)).squeeze(1)


_GPU_STRIDE = 8
"""Steps between two looks at a GPU, each of which waits for it: a row ends 7 tokens late at most, and never
behind the longest that a response may be, where the model may have no position."""

_SPARE_COLUMNS = 64
"""Columns that buffers grow by."""


@dataclass
class Row:
    """One completion. place: of its prompt. given: columns that were filled when it began."""

    place: int
    prompt: tuple[int, ...]
    given: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def next_column(self) -> int:
        """Where its last token is going to be written."""
        return self.given + len(self.ids) - 1


class _Layer(DynamicLayer):
    """Keys and values [S, H, W, D] of one block, as `transformers.Cache` asks its layers for them."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.is_initialized = True
        self._buffers = [keys, values]
        self.place: tuple[Tensor | slice, Tensor | int] | None = None
        self.width = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one token of each slot, and give what it may see."""
        assert self.place is not None
        slots, columns = self.place
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[slots, :, columns] = new[:, :, 0].to(buffer.dtype)
        return self._buffers[0][:, :, : self.width], self._buffers[1][:, :, : self.width]

    def get_seq_length(self) -> int:
        """Columns before the one that is written."""
        return self.width - 1

    def read(self, slots: Tensor, made: Sequence[Tensor], of: Tensor) -> None:
        """Take the keys and values of prompts over into slots."""
        for number, new in enumerate(made):
            self.grow(new.shape[2])
            self._buffers[number][slots, :, : new.shape[2]] = new[of].to(self._buffers[number].dtype)

    def grow(self, width: int) -> None:
        """Make room for that many columns."""
        for number, buffer in enumerate(self._buffers):
            slots, heads, columns, size = buffer.shape
            if width > columns:
                wider = buffer.new_zeros(slots, heads, width + _SPARE_COLUMNS, size)
                wider[:, :, :columns] = buffer
                self._buffers[number] = wider

    def keep(self, slots: Tensor) -> None:
        """Only these slots."""
        self._buffers = [buffer[slots] for buffer in self._buffers]


class ContinuousBatcher:
    """Samples a completion for each prompt, `advance` by `advance`.

    Takes decoders that keep packed rows apart (`conch.models.forward.takes_packed_rows`). Call it in
    evaluation mode, without gradient, always in the same precision.

    num_slots: rows at most that are decoded together. ended: whether a response (its ids so far) has ended.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        prompts: Sequence[tuple[int, ...]],
        *,
        num_slots: int,
        max_new_tokens: int,
        pad_id: int,
        ended: Callable[[list[int]], bool],
    ) -> None:
        self._lm = lm
        self._waiting = deque(enumerate(prompts))
        self._max_new_tokens = max_new_tokens
        self._pad_id = pad_id
        self._ended = ended
        self._rows: list[Row | None] = [None] * min(num_slots, len(prompts))
        self._layers: list[_Layer] = []
        self._unseen: list[tuple[Tensor, Tensor]] = []
        zeros = torch.zeros(len(self._rows), dtype=torch.long, device=lm.device)
        self._start, self._end, self._last = zeros, zeros.clone(), zeros.clone()
        self._is_alive = zeros.bool()
        self._one_logit = "logits_to_keep" in inspect.signature(lm.forward).parameters

    def advance(self, sampling: Sampling) -> list[Row]:
        """Read waiting prompts into free slots, or else add a token to each row; the rows that have ended."""
        free = len(self._rows) - self._num_alive
        # Prompts are read some at a time: alone, one would use as few of the machine's units as a token does.
        if self._waiting and free >= min(len(self._waiting), max(1, len(self._rows) // 8)):
            return self._admit(sampling)
        if not self._waiting and 4 * self._num_alive <= 3 * len(self._rows):
            self._drop_free_slots()
        return self._step(sampling)

    @property
    def _num_alive(self) -> int:
        return sum(row is not None for row in self._rows)

    # ---------------------------------------------------------------------------------------- reading prompts

    def _admit(self, sampling: Sampling) -> list[Row]:
        free = [slot for slot, row in enumerate(self._rows) if row is None]
        places, prompts = zip(*(self._waiting.popleft() for _ in free[: len(self._waiting)]), strict=True)
        read = list(dict.fromkeys(prompts))
        number = {prompt: index for index, prompt in enumerate(read)}
        of = torch.tensor([number[prompt] for prompt in prompts], device=self._lm.device)
        ids, mask = pad_left(read, self._pad_id, self._lm.device)
        logits, width = self._read(ids, mask, free[: len(places)], of)
        for slot, place, prompt in zip(free, places, prompts, strict=False):
            self._rows[slot] = Row(place, prompt, width)
        slots = torch.tensor(free[: len(places)], device=self._lm.device)
        self._start[slots] = width - mask.sum(dim=1)[of]
        self._end[slots], self._is_alive[slots] = width, True
        tokens, logprobs = sampling.draw(
            sampling.scores(ids if sampling.wants_history else ids[:, -1:], logits)[of]
        )
        self._last[slots] = tokens
        return self._look(slots.tolist(), [(tokens, logprobs)])

    def _read(
        self, ids: Int[Tensor, "B W"], mask: Bool[Tensor, "B W"], slots: list[int], of: Int[Tensor, " N"]
    ) -> tuple[Float[Tensor, "B V"], int]:
        """Logits of what follows each prompt, and the columns that prompts take."""
        cache = DynamicCache()
        only_last = {"logits_to_keep": 1} if self._one_logit else {}
        output = self._lm(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=position_ids(mask),
            past_key_values=cache,
            use_cache=True,
            **only_last,
        )
        layers: list[Any] = cache.layers
        for number, layer in enumerate(layers):
            made = layer.keys, layer.values
            if number == len(self._layers):
                self._layers.append(_Layer(*(self._buffer_like(each) for each in made)))
            self._layers[number].read(torch.tensor(slots, device=ids.device), made, of)
        return output.logits[:, -1], ids.shape[1]

    def _buffer_like(self, made: Tensor) -> Tensor:
        _, heads, width, size = made.shape
        columns = width + min(self._max_new_tokens, _SPARE_COLUMNS)
        return made.new_zeros(len(self._rows), heads, columns, size)

    # -------------------------------------------------------------------------------------- adding one token

    def _step(self, sampling: Sampling) -> list[Row]:
        width, place = self._width, self._place()
        for layer in self._layers:
            layer.place, layer.width = place, width
            layer.grow(width)
        columns = torch.arange(width, device=self._lm.device)
        seen = (columns >= self._start.unsqueeze(1)) & (columns <= self._end.unsqueeze(1))
        output = self._lm(
            input_ids=self._last.unsqueeze(1),
            attention_mask=as_attention_takes_it(self._lm, seen[:, None, None]),
            position_ids=(self._end - self._start).unsqueeze(1),
            past_key_values=Cache(layers=[*self._layers]),
            use_cache=True,
        )
        self._end = self._end + self._is_alive
        read = self._history() if sampling.wants_history else self._last.unsqueeze(1)
        tokens, logprobs = sampling.draw(sampling.scores(read, output.logits[:, -1]))
        self._last = tokens
        self._unseen.append((tokens, logprobs))
        if len(self._unseen) < self._stride(sampling):
            return []
        unseen, self._unseen = self._unseen, []
        return self._look(range(len(self._rows)), unseen)

    def _stride(self, sampling: Sampling) -> int:
        """Steps from one look to the next."""
        if sampling.wants_history or not _waits_for(self._last.device):
            return 1
        longest = max(len(row.ids) for row in self._rows if row is not None)
        return min(_GPU_STRIDE, self._max_new_tokens - longest)

    @property
    def _width(self) -> int:
        """Columns that a step looks at, with the one that it writes."""
        return 1 + len(self._unseen) + max(row.next_column for row in self._rows if row is not None)

    def _place(self) -> tuple[Tensor | slice, Tensor | int]:
        """Slots and columns that this step writes. Where all rows stand in one column, as most often, it is a
        slice: a plain copy. Free slots write there, too, where nobody looks."""
        columns = {row.next_column for row in self._rows if row is not None}
        if len(columns) == 1:
            return slice(None), columns.pop() + len(self._unseen)
        return torch.arange(len(self._rows), device=self._lm.device), self._end

    def _history(self) -> Int[Tensor, "S W"]:
        """Of a free slot that of another, so that nobody has to know of free slots."""
        other = next(row for row in self._rows if row is not None)
        rows = [row if row is not None else other for row in self._rows]
        read = [(*row.prompt, *row.ids) for row in rows]
        return pad_left(read, self._pad_id, self._lm.device)[0]

    def _look(self, slots: Sequence[int], unseen: Sequence[tuple[Tensor, Tensor]]) -> list[Row]:
        """Note the tokens of these slots, and free those that have ended."""
        ids = torch.stack([tokens for tokens, _ in unseen]).tolist()
        logprobs = torch.stack([each for _, each in unseen]).tolist()
        finished: list[Row] = []
        for column, slot in enumerate(slots):
            row = self._rows[slot]
            if row is None:
                continue
            for token, logprob in zip(ids, logprobs, strict=True):
                row.ids.append(token[column])
                row.logprobs.append(logprob[column])
                if self._ended(row.ids) or len(row.ids) == self._max_new_tokens:
                    finished.append(row)
                    self._rows[slot] = None
                    break
        self._free([slot for slot in slots if self._rows[slot] is None])
        return finished

    def _free(self, slots: Sequence[int]) -> None:
        """A free slot goes on with the others until it is taken, and sees its first column alone: where a row
        sees nothing some kernels put NaN, of which nothing can be drawn."""
        freed = torch.tensor(slots, dtype=torch.long, device=self._lm.device)
        self._start[freed], self._end[freed], self._is_alive[freed] = 0, 0, False

    def _drop_free_slots(self) -> None:
        kept = [slot for slot, row in enumerate(self._rows) if row is not None]
        self._rows = [self._rows[slot] for slot in kept]
        slots = torch.tensor(kept, device=self._lm.device)
        for layer in self._layers:
            layer.keep(slots)
        self._start, self._end, self._last, self._is_alive = (
            each[slots] for each in (self._start, self._end, self._last, self._is_alive)
        )


def _waits_for(device: torch.device) -> bool:
    """Whether looking at a tensor there waits for work that is under way."""
    return device.type == "cuda"


def pad_left(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Int[Tensor, "B W"], Bool[Tensor, "B W"]]:
    """Token ids, and a mask that is True at real tokens."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in rows])
    lengths = torch.tensor([[len(row)] for row in rows])
    return ids.to(device), (torch.arange(longest) >= longest - lengths).to(device)

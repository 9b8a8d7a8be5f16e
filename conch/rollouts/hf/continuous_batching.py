"""Continuous batching (Yu et al. 2022, "Orca", section 3.2): a sequence that has ended frees its slot for the
next prompt, so that little is computed behind an end.

Equal prompts are prefilled once: where they are prefilled together, and where the next ones wait for a slot,
for which keys, values and first distribution are kept (vLLM's prefix caching does the same). Keys and values
stand in buffers that are written in place. A slot's own lie between its first column and its next one, under
its own mask.

Legend: B distinct prompts that are prefilled in one pass, S slots, N sequences that are sampled (B or S), W
columns, H heads, D their width, V vocabulary.
"""

from __future__ import annotations

import inspect
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, LogitsProcessor, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from conch.models.attention import as_attention_takes_it, model_positions
from conch.ops import position_ids
from conch.rollouts.hf.prefill import pad_left, pass_cost, prefill_passes


class Sampling:
    """Chooses the next tokens from logits.

    processors: change the logits; read all tokens so far, or the last one only where a processor's
        `reads_history` is False.
    warpers: change the logits after that; read no token.
    greedy: takes the likeliest token.

    reads_history: True where a processor reads all tokens so far.
    """

    def __init__(
        self, processors: Sequence[LogitsProcessor], warpers: Sequence[LogitsProcessor], *, greedy: bool
    ) -> None:
        self.reads_history = any(getattr(each, "reads_history", True) for each in processors)
        self._processors = [*processors, *warpers]
        self._greedy = greedy

    def logprobs(self, input_ids: Int[Tensor, "N W"], logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """Log-probs of the distribution that is sampled from.

        Call it right after the forward pass that gave `logits`, with its rows in the same order.

        input_ids: the tokens so far, padded left, or the last one only (W = 1).
        """
        logits = logits.float()
        for processor in self._processors:
            logits = processor(input_ids, logits)  # pyright: ignore[reportArgumentType]  any integers will do
        return logits.log_softmax(dim=-1)

    def draw(
        self, logprobs: Float[Tensor, "N V"], generators: Sequence[torch.Generator | None] | None = None
    ) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
        """Draw a token for each row; gives the tokens and their log-probs.

        generators: one for each row, see `draw_seeded`; None draws from torch's own for all rows together.
        """
        if self._greedy:
            tokens = logprobs.argmax(dim=-1)
        elif generators is None:
            tokens = torch.multinomial(logprobs.exp(), 1).squeeze(1)
        else:
            tokens = draw_seeded(logprobs.exp(), generators)
        return tokens, logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)


def draw_seeded(
    probs: Float[Tensor, "N V"], generators: Sequence[torch.Generator | None]
) -> Int[Tensor, " N"]:
    """Draw a token for each row from a generator of its own: what a row draws depends on no other row.

    A row draws what `torch.multinomial` draws for it alone: the token whose probability over an exponential
    variate is largest.

    generators: None for a row whose token nobody reads.
    """
    noise = torch.ones_like(probs)
    for row, generator in enumerate(generators):
        if generator is not None:
            noise[row].exponential_(generator=generator)
    return (probs / noise).argmax(dim=-1)


def seeded_generator(seed: int, device: torch.device) -> torch.Generator:
    """A generator for one completion."""
    return torch.Generator(device).manual_seed(seed)


_GPU_STRIDE = 8
"""Steps after which a GPU's tokens are read, which waits for the GPU. A slot is freed at most 7 tokens late,
and never behind the longest response, where the model may have no position."""

_SPARE_COLUMNS = 64
"""Columns that buffers grow by."""


@dataclass(frozen=True)
class _Step:
    """Tokens of one step and their log-probs, on the device, and the version of the weights."""

    tokens: Tensor
    logprobs: Tensor
    version: int


_KEPT_SHARE = 8
"""One prompt per so many slots is kept for those that wait: an eighth more memory for prompts, at most."""


@dataclass(frozen=True)
class _ReadPrompt:
    """What prefilling a prompt gave.

    states: of each block keys and values [1, H, W, D], without padding.
    logprobs: [1, V], which the first token is drawn from.
    version: of the weights.
    """

    states: list[tuple[Tensor, Tensor]]
    logprobs: Tensor
    version: int


@dataclass
class SampledSequence:
    """A prompt and its completion so far.

    prompt_index: index of the prompt among all prompts.
    prompt: token ids.
    prompt_columns: columns of the buffers that the prefill filled.
    ids, logprobs: sampled tokens and their log-probs.
    versions: of the weights that each token was sampled from.
    generator: that its tokens are drawn from; None draws from torch's own.
    is_wanted: False once nobody waits for it.
    """

    prompt_index: int
    prompt: tuple[int, ...]
    prompt_columns: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    generator: torch.Generator | None = None
    is_wanted: bool = True

    @property
    def next_column(self) -> int:
        """Column that the next forward pass writes for the last sampled token."""
        return self.prompt_columns + len(self.ids) - 1


class _SlotCache(DynamicLayer):
    """Keys and values [S, H, W, D] of one block, in the interface of `transformers.Cache`.

    write_at: slots and columns that the next forward pass writes.
    width: columns that the next forward pass reads, those that it writes included.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.is_initialized = True
        self._buffers = [keys, values]
        self.write_at: tuple[Tensor | slice, Tensor | int] | None = None
        self.width = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one token of each slot, and give the first `width` columns of keys and values."""
        assert self.write_at is not None
        slots, columns = self.write_at
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[slots, :, columns] = states[:, :, 0].to(buffer.dtype)
        return self._buffers[0][:, :, : self.width], self._buffers[1][:, :, : self.width]

    def get_seq_length(self) -> int:
        """Columns before the one that is written."""
        return self.width - 1

    def copy_prompts(self, slots: Tensor, end: int, states: Sequence[Tensor], prompt_of_slot: Tensor) -> None:
        """Copy prefilled keys and values [B, H, W, D] into the W columns of slots before column `end`.

        prompt_of_slot: for each of `slots`, the row of its prompt.
        """
        self.grow(end)
        for buffer, prefilled in zip(self._buffers, states, strict=True):
            start = end - prefilled.shape[2]
            buffer[slots, :, start:end] = prefilled[prompt_of_slot].to(buffer.dtype)

    def grow(self, width: int) -> None:
        """Widen the buffers to at least `width` columns."""
        for number, buffer in enumerate(self._buffers):
            slots, heads, columns, size = buffer.shape
            if width > columns:
                wider = buffer.new_zeros(slots, heads, width + _SPARE_COLUMNS, size)
                wider[:, :, :columns] = buffer
                self._buffers[number] = wider

    def narrow(self, width: int) -> None:
        """Free the columns from `width` on where that frees half of the buffers: a long sequence has left."""
        for number, buffer in enumerate(self._buffers):
            if buffer.shape[2] > 2 * (width + _SPARE_COLUMNS):
                self._buffers[number] = buffer[:, :, : width + _SPARE_COLUMNS].clone()

    def select(self, slots: Tensor) -> None:
        """Keep these slots only."""
        self._buffers = [buffer[slots] for buffer in self._buffers]

    def add_slots(self, count: int) -> None:
        """Add empty slots behind the others."""
        self._buffers = [
            torch.cat([buffer, buffer.new_zeros(count, *buffer.shape[1:])]) for buffer in self._buffers
        ]


class ContinuousBatcher:
    """Samples a completion for each prompt, `advance` by `advance`.

    Takes decoders that keep packed rows apart (`conch.models.forward.takes_packed_rows`). Call it in
    evaluation mode, without gradient, always in the same precision.

    num_slots: sequences that are decoded together, at most.
    max_new_tokens: longest response.
    has_ended: True for response ids that need no further token.
    seeds: one for each prompt, whose completion is then drawn from a generator of its own; None draws from
        torch's.
    version: gives the version of the model's weights. They may change between two calls of `advance`: keys
        and values of the tokens so far stay as they are, further tokens are sampled from the new weights.
    """

    weights_may_change = True

    def __init__(
        self,
        lm: PreTrainedModel,
        prompts: Sequence[tuple[int, ...]],
        *,
        num_slots: int,
        max_new_tokens: int,
        pad_id: int,
        has_ended: Callable[[list[int]], bool],
        seeds: Sequence[int] | None = None,
        version: Callable[[], int] = lambda: 0,
    ) -> None:
        self._lm = lm
        self._version = version
        self._seeds = None if seeds is None else [*seeds]
        self._waiting = deque(enumerate(prompts))
        self._num_prompts = len(prompts)
        self._num_slots = num_slots
        self._max_new_tokens = max_new_tokens
        self._pad_id = pad_id
        self._has_ended = has_ended
        self._slots: list[SampledSequence | None] = [None] * min(num_slots, len(prompts))
        self._caches: list[_SlotCache] = []
        self._read_prompts: dict[tuple[int, ...], _ReadPrompt] = {}
        self._unread: list[_Step] = []
        zeros = torch.zeros(len(self._slots), dtype=torch.long, device=lm.device)
        self._start, self._end, self._last = zeros, zeros.clone(), zeros.clone()
        self._is_active = zeros.bool()
        self._keeps_logits = "logits_to_keep" in inspect.signature(lm.forward).parameters

    @property
    def is_done(self) -> bool:
        """True once all sequences have ended."""
        return not self._waiting and not self._num_active

    def add(self, prompts: Sequence[tuple[int, ...]], seeds: Sequence[int]) -> None:
        """Sample completions for further prompts, which are numbered on, each from its seed."""
        assert self._seeds is not None, "seeded prompts join seeded ones only"
        self._waiting.extend(enumerate(prompts, start=self._num_prompts))
        self._num_prompts += len(prompts)
        self._seeds.extend(seeds)

    def withdraw(self, which: Callable[[int], bool]) -> list[int]:
        """Sample nothing for those prompts that have not begun, and give their indices.

        which: True for the index of a prompt that is meant.
        """
        withdrawn = [index for index, _ in self._waiting if which(index)]
        self._waiting = deque(entry for entry in self._waiting if not which(entry[0]))
        return withdrawn

    def abandon(self, which: Callable[[int], bool]) -> None:
        """Sample no more for those prompts, whose completions nobody waits for.

        which: True for the index of a prompt that is meant.
        """
        self.withdraw(which)
        for sequence in self._slots:
            if sequence is not None and which(sequence.prompt_index):
                sequence.is_wanted = False

    def advance(self, sampling: Sampling) -> list[SampledSequence]:
        """Prefill waiting prompts into free slots, or else decode one token in each slot.

        Returns:
            The sequences that have ended, as far as that is known yet.
        """
        if self._unread:  # whose columns are the slots as they are, and those sequences'
            return self._decode(sampling)
        self._add_slots()
        free = len(self._slots) - self._num_active
        # Prompts are prefilled some at a time: alone, one would use as few of the machine's units as a token.
        if self._waiting and free >= min(len(self._waiting), max(1, len(self._slots) // 8)):
            return self._prefill(sampling)
        if not self._waiting and 4 * self._num_active <= 3 * len(self._slots):
            self._drop_free_slots()
        return self._decode(sampling)

    @property
    def _num_active(self) -> int:
        return sum(sequence is not None for sequence in self._slots)

    def _generator(self, index: int) -> torch.Generator | None:
        return None if self._seeds is None else seeded_generator(self._seeds[index], self._lm.device)

    def _generators(self, slots: Sequence[int]) -> list[torch.Generator | None] | None:
        """Those of the sequences in `slots`; None where torch's own is drawn from."""
        if self._seeds is None:
            return None
        sequences = [self._slots[slot] for slot in slots]
        return [None if sequence is None else sequence.generator for sequence in sequences]

    # ------------------------------------------------------------------------------------------------ prefill

    def _prefill(self, sampling: Sampling) -> list[SampledSequence]:
        free = [slot for slot, sequence in enumerate(self._slots) if sequence is None]
        indices, prompts = zip(*(self._waiting.popleft() for _ in free[: len(self._waiting)]), strict=True)
        free = free[: len(indices)]
        version = self._version()
        places: dict[tuple[int, ...], list[int]] = {}
        for slot, prompt in zip(free, prompts, strict=True):
            places.setdefault(prompt, []).append(slot)
        known = {
            prompt: read
            for prompt, read in self._read_prompts.items()
            if prompt in places and read.version == version
        }
        self._forget_prompts(version)
        logprobs = {prompt: read.logprobs for prompt, read in known.items()}
        for prompt, read in known.items():
            slots = places[prompt]
            self._fill(slots, len(prompt), read.states, [0] * len(slots), [len(prompt)] * len(slots))
        unread = [prompt for prompt in places if prompt not in known]
        # All end in one column, whichever pass they were in: a step then writes one column, a plain copy.
        longest = max(map(len, unread), default=0)
        for rows in prefill_passes([*map(len, unread)], pass_cost(self._lm.device)):
            logprobs |= self._read([unread[row] for row in rows], places, longest, sampling, version)
        for slot, index, prompt in zip(free, indices, prompts, strict=True):
            columns = len(prompt) if prompt in known else longest
            self._slots[slot] = SampledSequence(index, prompt, columns, generator=self._generator(index))
        # In the order of the slots: what is drawn does not tell which prompts shared a pass.
        first_logprobs = torch.cat([logprobs[prompt] for prompt in prompts])
        tokens, token_logprobs = sampling.draw(first_logprobs, self._generators(free))
        self._last[torch.tensor(free, device=self._lm.device)] = tokens
        return self._read_tokens(free, [_Step(tokens, token_logprobs, version)])

    def _read(
        self,
        prompts: Sequence[tuple[int, ...]],
        places: Mapping[tuple[int, ...], Sequence[int]],
        end: int,
        sampling: Sampling,
        version: int,
    ) -> dict[tuple[int, ...], Float[Tensor, "1 V"]]:
        """Log-probs of the token after each prompt, whose keys and values go into slots, and are kept for
        those that wait with the same prompt.

        prompts: of one pass.
        places: of each prompt, its slots.
        end: column of the slots behind the prompts.
        """
        ids, mask = pad_left(prompts, self._pad_id, self._lm.device)
        logits, states = self._prefill_forward(ids, mask)
        logprobs = sampling.logprobs(ids if sampling.reads_history else ids[:, -1:], logits)
        rows = [row for row, prompt in enumerate(prompts) for _ in places[prompt]]
        slots = [slot for prompt in prompts for slot in places[prompt]]
        self._fill(slots, end, states, rows, [len(prompts[row]) for row in rows])
        logprobs_of = {prompt: logprobs[row : row + 1] for row, prompt in enumerate(prompts)}
        waiting = self._next_prompts()
        for row, prompt in enumerate(prompts):
            if prompt in waiting and len(self._read_prompts) < max(1, self._num_slots // _KEPT_SHARE):
                start = ids.shape[1] - len(prompt)
                own = [(_one(keys, row, start), _one(values, row, start)) for keys, values in states]
                self._read_prompts[prompt] = _ReadPrompt(own, logprobs_of[prompt].clone(), version)
        return logprobs_of

    def _next_prompts(self) -> set[tuple[int, ...]]:
        """Prompts of the slots' next sequences."""
        return {prompt for _, prompt in itertools.islice(self._waiting, self._num_slots)}

    def _forget_prompts(self, version: int) -> None:
        """Drop what was read under other weights, or for sequences that all have begun."""
        waiting = self._next_prompts()
        self._read_prompts = {
            prompt: read
            for prompt, read in self._read_prompts.items()
            if read.version == version and prompt in waiting
        }

    def _fill(
        self,
        slots: Sequence[int],
        end: int,
        states: Sequence[tuple[Tensor, Tensor]],
        rows: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        """Copy prefilled keys and values, padded on the left, into slots, up to column `end`.

        rows, lengths: for each of `slots`, the row of its prompt and the prompt's tokens.
        """
        into = torch.tensor(slots, device=self._lm.device)
        from_rows = torch.tensor(rows, device=self._lm.device)
        for number, pair in enumerate(states):
            if number == len(self._caches):
                self._caches.append(_SlotCache(*(self._new_buffer(each, end) for each in pair)))
            self._caches[number].copy_prompts(into, end, pair, from_rows)
        self._start[into] = end - torch.tensor(lengths, device=self._lm.device)
        self._end[into], self._is_active[into] = end, True

    def _prefill_forward(
        self, ids: Int[Tensor, "B W"], mask: Bool[Tensor, "B W"]
    ) -> tuple[Float[Tensor, "B V"], list[tuple[Tensor, Tensor]]]:
        """Logits of the token after each prompt, and keys and values [B, H, W, D] of each block."""
        cache = DynamicCache()
        last_only = {"logits_to_keep": 1} if self._keeps_logits else {}
        output = self._lm(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=model_positions(self._lm, position_ids(mask)),
            past_key_values=cache,
            use_cache=True,
            **last_only,
        )
        layers: list[Any] = cache.layers
        return output.logits[:, -1], [(layer.keys, layer.values) for layer in layers]

    def _new_buffer(self, states: Tensor, width: int) -> Tensor:
        _, heads, _, size = states.shape
        columns = width + min(self._max_new_tokens, _SPARE_COLUMNS)
        return states.new_zeros(len(self._slots), heads, columns, size)

    # ------------------------------------------------------------------------------------------------- decode

    def _decode(self, sampling: Sampling) -> list[SampledSequence]:
        width, write_at = self._width, self._write_at()
        for cache in self._caches:
            cache.write_at, cache.width = write_at, width
            cache.grow(width)
            cache.narrow(width)
        columns = torch.arange(width, device=self._lm.device)
        visible = (columns >= self._start.unsqueeze(1)) & (columns <= self._end.unsqueeze(1))
        output = self._lm(
            input_ids=self._last.unsqueeze(1),
            attention_mask=as_attention_takes_it(self._lm, visible[:, None, None]),
            position_ids=model_positions(self._lm, (self._end - self._start).unsqueeze(1)),
            past_key_values=Cache(layers=[*self._caches]),
            use_cache=True,
        )
        self._end = self._end + self._is_active
        input_ids = self._history() if sampling.reads_history else self._last.unsqueeze(1)
        generators = self._generators(range(len(self._slots)))
        tokens, logprobs = sampling.draw(sampling.logprobs(input_ids, output.logits[:, -1]), generators)
        self._last = tokens
        self._unread.append(_Step(tokens, logprobs, self._version()))
        if len(self._unread) < self._stride(sampling):
            return []
        unread, self._unread = self._unread, []
        return self._read_tokens(range(len(self._slots)), unread)

    def _stride(self, sampling: Sampling) -> int:
        """Steps after which tokens are read."""
        if sampling.reads_history or not _reading_waits(self._last.device):
            return 1
        longest = max(len(sequence.ids) for sequence in self._slots if sequence is not None)
        return min(_GPU_STRIDE, self._max_new_tokens - longest)

    @property
    def _width(self) -> int:
        """Columns that a step reads, with the one that it writes."""
        next_columns = [sequence.next_column for sequence in self._slots if sequence is not None]
        return 1 + len(self._unread) + max(next_columns)

    def _write_at(self) -> tuple[Tensor | slice, Tensor | int]:
        """Slots and columns that this step writes.

        Where all sequences stand in one column, as most often, slots are a slice, and writing is a plain
        copy. Free slots are written there, too, where nothing reads them.
        """
        columns = {sequence.next_column for sequence in self._slots if sequence is not None}
        if len(columns) == 1:
            return slice(None), columns.pop() + len(self._unread)
        return torch.arange(len(self._slots), device=self._lm.device), self._end

    def _history(self) -> Int[Tensor, "S W"]:
        """Tokens so far of each slot; a free slot shows another's, so that processors meet no empty row."""
        stand_in = next(sequence for sequence in self._slots if sequence is not None)
        sequences = [stand_in if sequence is None else sequence for sequence in self._slots]
        tokens = [(*sequence.prompt, *sequence.ids) for sequence in sequences]
        return pad_left(tokens, self._pad_id, self._lm.device)[0]

    def _read_tokens(self, slots: Sequence[int], unread: Sequence[_Step]) -> list[SampledSequence]:
        """Append sampled tokens to the sequences in `slots`; free the slots of those that have ended.

        unread: each with a token for each of `slots`, in their order.

        Returns:
            The sequences that have ended, less those that nobody waits for, whose slots are freed, too.
        """
        ids = torch.stack([step.tokens for step in unread]).tolist()
        logprobs = torch.stack([step.logprobs for step in unread]).tolist()
        ended: list[SampledSequence] = []
        for column, slot in enumerate(slots):
            sequence = self._slots[slot]
            if sequence is None:
                continue
            if not sequence.is_wanted:
                self._slots[slot] = None
                continue
            for token, logprob, step in zip(ids, logprobs, unread, strict=True):
                sequence.ids.append(token[column])
                sequence.logprobs.append(logprob[column])
                sequence.versions.append(step.version)
                if self._has_ended(sequence.ids) or len(sequence.ids) == self._max_new_tokens:
                    ended.append(sequence)
                    self._slots[slot] = None
                    break
        self._free([slot for slot in slots if self._slots[slot] is None])
        return ended

    def _free(self, slots: Sequence[int]) -> None:
        """Let free slots read their first column only. They are decoded along until they are taken, and a row
        that reads nothing becomes NaN in some kernels, of which nothing can be drawn."""
        freed = torch.tensor(slots, dtype=torch.long, device=self._lm.device)
        self._start[freed], self._end[freed], self._is_active[freed] = 0, 0, False

    def _add_slots(self) -> None:
        """Make room for prompts that joined, up to `num_slots`."""
        missing = len(self._waiting) - (len(self._slots) - self._num_active)
        count = min(self._num_slots - len(self._slots), missing)
        if count <= 0:
            return
        self._slots += [None] * count
        for cache in self._caches:
            cache.add_slots(count)
        self._start, self._end, self._last, self._is_active = (
            torch.cat([each, each.new_zeros(count)])
            for each in (self._start, self._end, self._last, self._is_active)
        )

    def _drop_free_slots(self) -> None:
        active = [slot for slot, sequence in enumerate(self._slots) if sequence is not None]
        self._slots = [self._slots[slot] for slot in active]
        slots = torch.tensor(active, device=self._lm.device)
        for cache in self._caches:
            cache.select(slots)
        self._start, self._end, self._last, self._is_active = (
            each[slots] for each in (self._start, self._end, self._last, self._is_active)
        )


def _one(states: Tensor, row: int, start: int) -> Tensor:
    """A copy of one row from a column on, that does not keep the others in memory."""
    return states[row : row + 1, :, start:].clone()


def _reading_waits(device: torch.device) -> bool:
    """True where reading a tensor waits for work that is under way."""
    return device.type == "cuda"

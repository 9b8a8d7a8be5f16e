"""Sample completions with a transformers model in the trainer's own process.

Legend: B prompts of a chunk, P prompt tokens (padded left), R response tokens (padded right), T = P + R,
V vocabulary.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig as HFGenerationConfig
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from conch.config import GenerationConfig
from conch.models.packing import sliding_window
from conch.models.rows import takes_packed_rows
from conch.rollouts.finish import FinishWatcher, Harvest, LogprobRecorder
from conch.rollouts.slots import SlotDecoder, pad_left
from conch.types import Completion, FinishReason, OnFinished, Prompt, Rollout

Decode = Callable[[Sequence[int]], str]

# transformers itself drops a mask that hides nothing, and then warns that there is none.
logging.getLogger("transformers.modeling_utils").addFilter(
    lambda record: "passing in an `attention_mask`" not in record.getMessage()
)


class HFEngine:
    """A `RolloutEngine` in the trainer's own process.

    lm: called for each chunk, so that it may be the unwrapped module of a trainer. version: gives the number
    of updates the policy has seen. autocast: the precision context of training. processors: opened around
    each chunk; what it yields changes the logits before temperature, top-k and top-p do. Sampling draws from
    torch's global generator: seed it per rank.
    """

    def __init__(
        self,
        lm: Callable[[], PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        config: GenerationConfig,
        *,
        version: Callable[[], int],
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        processors: Callable[[], AbstractContextManager[Sequence[LogitsProcessor]]] = lambda: nullcontext(()),
    ) -> None:
        self._lm = lm
        self._tokenizer = tokenizer
        self._config = config
        self._version = version
        self._autocast = autocast
        self._processors = processors
        self._pad_id = int(tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]
        self._eos_id = int(tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]
        self._keeps_apart: bool | None = None
        self._stop = StopStrings(config.stop, self._decode, 0) if config.stop else None

    def generate(
        self, prompts: Sequence[Prompt], *, greedy: bool = False, on_finished: OnFinished | None = None
    ) -> Iterator[list[Rollout]]:
        """See `RolloutEngine.generate`. What is sampled does not depend on `on_finished`.

        Decoders that can be decoded in slots are (`conch.rollouts.slots`), `chunk_size` rows at a time, each
        of which makes room for the next prompt when it ends; for others `transformers.generate` samples chunk
        by chunk.
        """
        size = self._config.chunk_size
        if self._takes_slots(prompts):
            yield from self._generate_in_slots(prompts, greedy, on_finished)
            return
        for start in range(0, len(prompts), size):
            chunk = prompts[start : start + size]
            harvest = Harvest(chunk, self._completion, self._version(), start, on_finished)
            self._generate_chunk(harvest, greedy, watched=on_finished is not None)
            yield harvest.rollouts()

    # ---------------------------------------------------------------------------------------------- in slots

    def _takes_slots(self, prompts: Sequence[Prompt]) -> bool:
        lm = self._lm()
        if self._keeps_apart is None:
            self._keeps_apart = takes_packed_rows(lm)
        window = sliding_window(lm.config)
        if not self._keeps_apart or window is None or not prompts:
            return self._keeps_apart
        return max(len(each.token_ids) for each in prompts) + self._config.max_new_tokens <= window

    def _generate_in_slots(
        self, prompts: Sequence[Prompt], greedy: bool, on_finished: OnFinished | None
    ) -> Iterator[list[Rollout]]:
        decoder = SlotDecoder(
            self._lm(),
            [prompt.token_ids for prompt in prompts],
            num_slots=self._config.chunk_size,
            max_new_tokens=self._config.max_new_tokens,
            pad_id=self._pad_id,
            ended=self._has_ended,
        )
        made: dict[int, Rollout] = {}
        size = self._config.chunk_size
        for start in range(0, len(prompts), size):
            places = range(start, min(start + size, len(prompts)))
            self._decode_until(places, decoder, prompts, made, greedy, on_finished)
            yield [made.pop(place) for place in places]

    @torch.no_grad()
    def _decode_until(
        self,
        places: Sequence[int],
        decoder: SlotDecoder,
        prompts: Sequence[Prompt],
        made: dict[int, Rollout],
        greedy: bool,
        on_finished: OnFinished | None,
    ) -> None:
        """Until all of `places` are in `made`, which gets whatever ends meanwhile."""
        with _sampling_mode(self._lm()), self._autocast(), self._processors() as processors:
            pick = partial(_pick, [*processors, *self._warpers(greedy)], greedy)
            while not all(place in made for place in places):
                rows = decoder.advance(pick, wants_history=bool(processors))
                fresh = {
                    row.place: Rollout(
                        prompts[row.place], self._completion(row.ids, row.logprobs), self._version()
                    )
                    for row in rows
                }
                made |= fresh
                if fresh and on_finished is not None:
                    on_finished(fresh)

    def _has_ended(self, ids: list[int]) -> bool:
        return ids[-1] == self._eos_id or (self._stop is not None and self._stop.in_ids(ids))

    # ---------------------------------------------------------------------------------------- chunk by chunk

    @torch.no_grad()
    def _generate_chunk(self, harvest: Harvest, greedy: bool, watched: bool) -> None:
        lm = self._lm()
        rows = [prompt.token_ids for prompt in harvest.prompts]
        input_ids, attention_mask = pad_left(rows, self._pad_id, lm.device)
        # What comes out begins with the prompt; beside an encoder, with the decoder's start token.
        num_given = 1 if lm.config.is_encoder_decoder else input_ids.shape[1]
        recorder, stopping = LogprobRecorder(), self._stopping(num_given)
        if watched:
            stopping = StoppingCriteriaList(
                [FinishWatcher(harvest, recorder, stopping, self._eos_id, num_given)]
            )
        with _sampling_mode(lm), self._autocast(), self._processors() as processors:
            sequences = lm.generate(  # pyright: ignore[reportCallIssue]  typed as a Tensor attribute
                input_ids,
                attention_mask=attention_mask.long(),
                generation_config=self._generation_config(lm, greedy),
                logits_processor=LogitsProcessorList([*processors, *self._warpers(greedy), recorder]),
                stopping_criteria=stopping,
            )
        assert isinstance(sequences, Tensor)
        responses = sequences[:, num_given:]
        harvest.take(range(len(responses)), responses, recorder.logprobs(responses))

    def _generation_config(self, lm: PreTrainedModel, greedy: bool) -> HFGenerationConfig:
        # Temperature, top-k and top-p are switched off here, for `_warpers` applies them.
        shaping = {} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return HFGenerationConfig(
            max_new_tokens=self._config.max_new_tokens,
            do_sample=not greedy,
            eos_token_id=self._eos_id,
            pad_token_id=self._pad_id,
            decoder_start_token_id=getattr(lm.config, "decoder_start_token_id", None),
            **shaping,
        )

    def _warpers(self, greedy: bool) -> list[LogitsProcessor]:
        """What turns logits into the distribution that is sampled from, in the order of `transformers`."""
        config, warpers = self._config, []
        if not greedy and config.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(config.temperature))
        if not greedy and config.top_k > 0:
            warpers.append(TopKLogitsWarper(config.top_k))
        if not greedy and config.top_p < 1.0:
            warpers.append(TopPLogitsWarper(config.top_p))
        return warpers

    def _stopping(self, num_given: int) -> StoppingCriteriaList:
        if not self._config.stop:
            return StoppingCriteriaList()
        return StoppingCriteriaList([StopStrings(self._config.stop, self._decode, num_given)])

    def _completion(self, ids: list[int], logprobs: list[float]) -> Completion:
        ids, reason = cut_at_end(ids, self._eos_id, self._config.stop, self._decode)
        return Completion(self._decode(ids), tuple(ids), tuple(logprobs[: len(ids)]), reason)

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


class StopStrings(StoppingCriteria):
    """Ends a row once its response contains a stop string.

    Unlike the criterion of `transformers`, it does not count one that begins in the prompt. It reads text
    without special tokens, as `Completion.text` has it.
    """

    def __init__(self, stop: Sequence[str], decode: Decode, num_given: int) -> None:
        self._stop = stop
        self._decode = decode
        self._num_given = num_given
        # A character takes at most four byte tokens; the rest is for special tokens, which have no text.
        self._window = 4 * max(map(len, stop)) + 8

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  BoolTensor is the CPU's alone
        self, input_ids: Int[Tensor, "B T"], scores: Any, **_kwargs: Any
    ) -> Bool[Tensor, " B"]:
        """True for rows that are to end."""
        del scores
        responses = input_ids[:, self._num_given :].tolist()
        return torch.tensor([self.in_ids(row) for row in responses], device=input_ids.device)

    def in_ids(self, ids: list[int]) -> bool:
        """Whether the text of a response has a stop string."""
        # A look at the tail first: decoding all of a long response at each of its tokens would be quadratic.
        near = contains_any(self._decode(ids[-self._window :]), self._stop)
        return near and contains_any(self._decode(ids), self._stop)


def _pick(
    processors: Sequence[LogitsProcessor], greedy: bool, history: Tensor | None, logits: Float[Tensor, "N V"]
) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
    """Tokens, and their log-probs under the distribution that they were drawn from."""
    scores = logits.float()
    for processor in processors:
        scores = processor(history, scores)  # pyright: ignore[reportArgumentType]  our own need no history
    logprobs = scores.log_softmax(dim=-1)
    tokens = logprobs.argmax(dim=-1) if greedy else torch.multinomial(logprobs.exp(), 1).squeeze(1)
    return tokens, logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)


def contains_any(text: str, strings: Sequence[str]) -> bool:
    """True where one of `strings` stands in `text`."""
    return any(string in text for string in strings)


def cut_at_end(
    ids: list[int], eos_token_id: int, stop: Sequence[str], decode: Decode
) -> tuple[list[int], FinishReason]:
    """Drop what follows the first eos (kept) or the first stop string (cut off), and say why the text ends.

    A token that holds the beginning of a stop string goes with it, so ids and text stay aligned.
    """
    reason: FinishReason = "length"
    if eos_token_id in ids:
        ids, reason = ids[: ids.index(eos_token_id) + 1], "eos"
    text = decode(ids)
    if not contains_any(text, stop):
        return ids, reason
    start = min(text.find(string) for string in stop if string in text)
    keep = bisect_left(range(len(ids)), True, key=lambda n: contains_any(decode(ids[:n]), stop))
    while keep > 0 and len(decode(ids[:keep])) > start:
        keep -= 1
    return ids[:keep], "stop"


@contextmanager
def _sampling_mode(lm: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and none of what the checkpoint says about sampling (a repetition penalty, say):
    `generate` would take from there whatever is not set explicitly."""
    was_training, of_checkpoint = lm.training, lm.generation_config
    lm.eval()
    lm.generation_config = HFGenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = of_checkpoint
        lm.train(was_training)

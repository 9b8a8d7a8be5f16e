"""Sample completions with a transformers model in the trainer's own process.

Completions are handed over while the others of their chunk are still being sampled.

Legend: B prompts of a chunk, P prompt tokens (padded left), R response tokens so far (padded right),
T = P + R, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from conch.models.attention import sliding_window
from conch.models.forward import takes_packed_rows
from conch.rollouts.hf.continuous_batching import ContinuousBatcher, Sampling, pad_left
from conch.rollouts.stopping import StopCondition
from conch.types import Completion, OnFinished, Prompt, Rollout

# transformers itself drops a mask that hides nothing, and then warns that there is none.
logging.getLogger("transformers.modeling_utils").addFilter(
    lambda record: "passing in an `attention_mask`" not in record.getMessage()
)


class HFEngine:
    """A `RolloutEngine` in the trainer's own process.

    lm: called for each chunk, so that it may be the unwrapped module of a trainer. version: gives the number
    of updates the policy has seen. autocast: the precision context of training. processors: opened around
    each chunk; what it yields changes the logits before temperature, top-k and top-p do, and may be told the
    last token alone instead of all that was read where its `reads_history` is False. Sampling draws from
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
        self._config = config
        self._version = version
        self._autocast = autocast
        self._processors = processors
        self._ending = StopCondition(tokenizer, config.stop)
        self._pad_id = int(tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]
        self._keeps_apart: bool | None = None

    def generate(
        self, prompts: Sequence[Prompt], *, greedy: bool = False, on_finished: OnFinished | None = None
    ) -> Iterator[list[Rollout]]:
        """See `RolloutEngine.generate`. What is sampled does not depend on `on_finished`.

        Decoders that can be decoded in slots are (`conch.rollouts.hf.continuous_batching`), `chunk_size` rows
        at a time, each of which makes room for the next prompt when it ends; for others
        `transformers.generate` samples chunk by chunk.
        """
        size = self._config.chunk_size
        if self._takes_slots(prompts):
            yield from self._generate_in_slots(prompts, greedy, on_finished)
            return
        for start in range(0, len(prompts), size):
            chunk = prompts[start : start + size]
            harvest = RolloutCollector(chunk, self._ending.completion, self._version(), start, on_finished)
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
        decoder = ContinuousBatcher(
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
        decoder: ContinuousBatcher,
        prompts: Sequence[Prompt],
        made: dict[int, Rollout],
        greedy: bool,
        on_finished: OnFinished | None,
    ) -> None:
        """Until all of `places` are in `made`, which gets whatever ends meanwhile."""
        with _sampling_mode(self._lm()), self._autocast(), self._processors() as processors:
            sampling = Sampling(processors, self._warpers(greedy), greedy=greedy)
            while not all(place in made for place in places):
                rows = decoder.advance(sampling)
                fresh = {
                    row.place: Rollout(
                        prompts[row.place], self._ending.completion(row.ids, row.logprobs), self._version()
                    )
                    for row in rows
                }
                made |= fresh
                if fresh and on_finished is not None:
                    on_finished(fresh)

    def _has_ended(self, ids: list[int]) -> bool:
        return ids[-1] == self._ending.eos_id or self._ending.reached(ids)

    # ---------------------------------------------------------------------------------------- chunk by chunk

    @torch.no_grad()
    def _generate_chunk(self, harvest: RolloutCollector, greedy: bool, watched: bool) -> None:
        lm = self._lm()
        rows = [prompt.token_ids for prompt in harvest.prompts]
        input_ids, attention_mask = pad_left(rows, self._pad_id, lm.device)
        # What comes out begins with the prompt; beside an encoder, with the decoder's start token.
        num_given = 1 if lm.config.is_encoder_decoder else input_ids.shape[1]
        recorder, stopping = LogprobRecorder(), self._stopping(num_given)
        if watched:
            stopping = StoppingCriteriaList(
                [FinishWatcher(harvest, recorder, stopping, self._ending.eos_id, num_given)]
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
            eos_token_id=self._ending.eos_id,
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
        if not self._ending.watches:
            return StoppingCriteriaList()
        return StoppingCriteriaList([StopStrings(self._ending, num_given)])


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


_GPU_STRIDE = 8
"""Steps between two looks at a GPU, each of which waits for it: a completion is told of 7 late at most."""


class RolloutCollector:
    """The rollouts of one chunk, each made once: when it is found to have ended, or at the end.

    complete: turns sampled ids (what follows the end included) and their log-probs into a completion.
    start: the number of the chunk's first prompt, by which `on_finished` knows it.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        complete: Callable[[list[int], list[float]], Completion],
        version: int,
        start: int,
        on_finished: OnFinished | None,
    ) -> None:
        self.prompts = prompts
        self._complete = complete
        self._version = version
        self._start = start
        self._on_finished = on_finished
        self._made: dict[int, Rollout] = {}

    def take(
        self, rows: Iterable[int], responses: Int[Tensor, "B R"], logprobs: Float[Tensor, "B R"]
    ) -> None:
        """These rows have ended; those that were taken before are passed over."""
        fresh = [row for row in rows if row not in self._made]
        if not fresh:
            return
        ids, columns = responses[fresh].tolist(), logprobs[fresh].tolist()
        for row, *sampled in zip(fresh, ids, columns, strict=True):
            self._made[row] = Rollout(self.prompts[row], self._complete(*sampled), self._version)
        if self._on_finished is not None:
            self._on_finished({self._start + row: self._made[row] for row in fresh})

    def misses(self, rows: Iterable[int]) -> bool:
        """True where one of these rows was not taken yet."""
        return not self._made.keys() >= set(rows)

    def rollouts(self) -> list[Rollout]:
        """All of them, in the order of their prompts."""
        return [self._made[row] for row in range(len(self.prompts))]


class LogprobRecorder(LogitsProcessor):
    """Notes the log-probability of each sampled id under the distribution it was drawn from.

    Stands last among the processors, where the logits are those that are sampled from. Keeps [B, V] of one
    step; all R of them would take more memory than the model where the vocabulary is large.
    """

    def __init__(self) -> None:
        self._columns: list[Float[Tensor, "B 1"]] = []
        self._pending: Float[Tensor, "B V"] | None = None

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """Called before each sampling; the last of `input_ids` was drawn from the scores before these."""
        self.take(input_ids[:, -1:])
        self._pending = scores.float().log_softmax(dim=-1)
        return scores

    def take(self, sampled: Int[Tensor, "B 1"]) -> None:
        """Note what was drawn from the latest scores; a second call for the same ones does nothing."""
        if self._pending is not None:
            self._columns.append(self._pending.gather(-1, sampled))
        self._pending = None

    def logprobs(self, ids: Int[Tensor, "B R"]) -> Float[Tensor, "B R"]:
        """Log-probabilities of the response `ids` that came out; behind a row's end they mean nothing."""
        if len(self._columns) < ids.shape[1]:
            self.take(ids[:, -1:])
        return torch.cat(self._columns, dim=-1)[:, : ids.shape[1]]


class StopStrings(StoppingCriteria):
    """Ends a row once its response contains a stop string.

    num_given: tokens of `input_ids` that come before the responses.
    """

    def __init__(self, ending: StopCondition, num_given: int) -> None:
        self._ending = ending
        self._num_given = num_given

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  BoolTensor is the CPU's alone
        self, input_ids: Int[Tensor, "B T"], scores: Any, **_kwargs: Any
    ) -> Bool[Tensor, " B"]:
        """True for rows that are to end."""
        del scores
        responses = input_ids[:, self._num_given :].tolist()
        return torch.tensor([self._ending.reached(row) for row in responses], device=input_ids.device)


class FinishWatcher(StoppingCriteria):
    """Hands rows to a harvest as they end, by the end-of-sequence token or by `inner`.

    inner: the criteria that end rows beside eos and the limit of length, which `generate` itself looks after.
    """

    def __init__(
        self,
        harvest: RolloutCollector,
        recorder: LogprobRecorder,
        inner: StoppingCriteriaList,
        eos_id: int,
        num_given: int,
    ) -> None:
        self._harvest = harvest
        self._recorder = recorder
        self._inner = inner
        self._eos_id = eos_id
        self._num_given = num_given
        self._ended: Bool[Tensor, " B"] | None = None

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  BoolTensor is the CPU's alone
        self, input_ids: Int[Tensor, "B T"], scores: Any, **kwargs: Any
    ) -> Bool[Tensor, " B"]:
        """What `inner` says: True for rows that are to end."""
        stopped = self._inner(input_ids, scores, **kwargs)  # pyright: ignore[reportArgumentType]
        ended = stopped | (input_ids[:, -1] == self._eos_id)
        self._ended = ended if self._ended is None else self._ended | ended
        step = input_ids.shape[1] - self._num_given
        if not input_ids.is_cuda or step % _GPU_STRIDE == 0:
            self._look(input_ids, self._ended)
        return stopped

    def _look(self, input_ids: Int[Tensor, "B T"], ended: Bool[Tensor, " B"]) -> None:
        self._recorder.take(input_ids[:, -1:])
        rows = [row for row, done in enumerate(ended.tolist()) if done]
        if self._harvest.misses(rows):
            responses = input_ids[:, self._num_given :]
            self._harvest.take(rows, responses, self._recorder.logprobs(responses))

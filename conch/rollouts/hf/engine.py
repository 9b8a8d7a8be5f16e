"""Sample completions with a transformers model in the trainer's own process.

Completions are reported as they end, while others of their chunk are still being sampled.

Legend: B prompts of a chunk, P prompt tokens (padded left), R response tokens so far (padded right),
T = P + R, V vocabulary, E end ids.
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
from conch.models.policy import decoder_start, flush_left, plain_generation
from conch.rollouts.hf.continuous_batching import (
    ContinuousBatcher,
    Sampling,
    draw_seeded,
    seeded_generator,
)
from conch.rollouts.hf.decoding import Decoding, decoding_of
from conch.rollouts.hf.prefill import pad_left
from conch.rollouts.hf.under_way import ChunkQueue, UnderWay
from conch.rollouts.protocol import version_runs
from conch.rollouts.stopping import StopCondition, with_end_ids
from conch.types import Completion, OnFinished, Prompt, Rollout

# transformers itself drops a mask that hides nothing, and then warns that there is none.
logging.getLogger("transformers.modeling_utils").addFilter(
    lambda record: "passing in an `attention_mask`" not in record.getMessage()
)


class HFEngine:
    """A `RolloutEngine` in the trainer's own process, with the policy itself.

    Sampling draws from torch's global generator: seed it per rank.

    lm: gives the policy, called for each chunk; it may be the unwrapped module of a trainer.
    version: gives the number of updates that the policy has seen.
    autocast: precision context of training.
    processors: opened around each chunk; yields what changes the logits before temperature, top-k and top-p
        do. A processor whose `reads_history` is False may be given the last token only.
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
        self._stop_condition = StopCondition(
            tokenizer,
            with_end_ids(config, lm(), tokenizer),
            encoder_decoder=bool(lm().config.is_encoder_decoder),
        )
        self._pad_id = int(tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]
        self._takes_packed_rows: bool | None = None
        self._decoding: Decoding | None = None

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        greedy: bool = False,
        on_finished: OnFinished | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Iterator[list[Rollout]]:
        """See `RolloutEngine.generate`. What is sampled does not depend on `on_finished`.

        Decoders that keep packed rows apart are batched continuously, in `chunk_size` slots
        (`conch.rollouts.hf.continuous_batching`); for others `transformers.generate` samples chunk by chunk.

        seeds: one for each prompt: its completion is the one that this engine samples for the prompt alone
            after `torch.manual_seed`, but for rounding. None draws from torch's generator.
        """
        size = self._config.chunk_size
        if self._can_batch_continuously(prompts):
            yield from self._generate_continuously(prompts, greedy, on_finished, seeds)
            return
        for start in range(0, len(prompts), size):
            chunk = range(start, min(start + size, len(prompts)))
            rollouts = self._sample_chunk(chunk, prompts, seeds, greedy, on_finished)
            yield [rollouts[index] for index in chunk]

    # ------------------------------------------------------------------------------------ continuous batching

    def _can_batch_continuously(self, prompts: Sequence[Prompt]) -> bool:
        """True where the model keeps packed rows apart and its sliding window, if any, covers every row."""
        lm = self._lm()
        if self._takes_packed_rows is None:
            self._takes_packed_rows = takes_packed_rows(lm)
        window = sliding_window(lm.config)
        if not self._takes_packed_rows or window is None or not prompts:
            return self._takes_packed_rows
        return max(len(prompt.token_ids) for prompt in prompts) + self._config.max_new_tokens <= window

    def _generate_continuously(
        self,
        prompts: Sequence[Prompt],
        greedy: bool,
        on_finished: OnFinished | None,
        seeds: Sequence[int] | None,
    ) -> Iterator[list[Rollout]]:
        size = self._config.chunk_size
        batcher = self._batcher(prompts, seeds)
        rollouts: dict[int, Rollout] = {}
        for start in range(0, len(prompts), size):
            chunk = range(start, min(start + size, len(prompts)))
            self._advance_until(chunk, batcher, prompts, rollouts, greedy, on_finished)
            yield [rollouts.pop(index) for index in chunk]

    def _batcher(self, prompts: Sequence[Prompt], seeds: Sequence[int] | None) -> ContinuousBatcher:
        return ContinuousBatcher(
            self._lm(),
            [prompt.token_ids for prompt in prompts],
            num_slots=self._config.chunk_size,
            max_new_tokens=self._config.max_new_tokens,
            pad_id=self._pad_id,
            has_ended=self._stop_condition.ends,
            seeds=seeds,
            version=self._version,
        )

    def takes_joining(self, prompts: Sequence[Prompt]) -> bool:
        """True where these prompts may join others that are being sampled."""
        return self._can_batch_continuously(prompts)

    @torch.no_grad()
    def generate_joined(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        between: Callable[[UnderWay], None],
        *,
        greedy: bool,
        on_finished: OnFinished,
    ) -> None:
        """Sample completions for seeded prompts, and for others that come meanwhile.

        between: called after each step, a token of each slot or a chunk; may add prompts, where
            `takes_joining` holds of the first ones, as it must of those, withdraw some that have not begun,
            or change the model's weights where `UnderWay.weights_may_change`.
        on_finished: gets each completion once, with the versions of the weights that its tokens were sampled
            from.
        """
        if not self._can_batch_continuously(prompts):
            self._generate_joined_chunks(prompts, seeds, between, greedy, on_finished)
            return
        batcher = self._batcher(prompts, seeds)
        under_way = UnderWay(prompts, batcher)
        with _sampling_mode(self._lm()), self._autocast(), self._processors() as processors:
            sampling = Sampling(processors, self._warpers(greedy), greedy=greedy)
            while not batcher.is_done:
                ended = self._advance(batcher, sampling, under_way.prompts)
                if ended:
                    on_finished(ended)
                between(under_way)

    def _generate_joined_chunks(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        between: Callable[[UnderWay], None],
        greedy: bool,
        on_finished: OnFinished,
    ) -> None:
        chunks = ChunkQueue(seeds)
        under_way = UnderWay(prompts, chunks)
        while chunk := chunks.take(self._config.chunk_size):
            self._sample_chunk(chunk, under_way.prompts, chunks.seeds, greedy, on_finished)
            between(under_way)

    def _advance(
        self, batcher: ContinuousBatcher, sampling: Sampling, prompts: Sequence[Prompt]
    ) -> dict[int, Rollout]:
        """Sample a token of each slot, or read prompts; gives what has ended by its prompt's index."""
        ended: dict[int, Rollout] = {}
        for sequence in batcher.advance(sampling):
            completion = self._stop_condition.completion(sequence.prompt, sequence.ids, sequence.logprobs)
            runs = version_runs(sequence.versions[: len(completion.token_ids)])
            ended[sequence.prompt_index] = Rollout(
                prompts[sequence.prompt_index],
                completion,
                sequence.versions[0],
                runs,
            )
        return ended

    @torch.no_grad()
    def _advance_until(
        self,
        chunk: Sequence[int],
        batcher: ContinuousBatcher,
        prompts: Sequence[Prompt],
        rollouts: dict[int, Rollout],
        greedy: bool,
        on_finished: OnFinished | None,
    ) -> None:
        """Sample until all indices of `chunk` are in `rollouts`, which also gets whatever ends meanwhile."""
        with _sampling_mode(self._lm()), self._autocast(), self._processors() as processors:
            sampling = Sampling(processors, self._warpers(greedy), greedy=greedy)
            while not all(index in rollouts for index in chunk):
                ended = self._advance(batcher, sampling, prompts)
                rollouts |= ended
                if ended and on_finished is not None:
                    on_finished(ended)

    # ----------------------------------------------------------------------------------------- chunk by chunk

    def _sample_chunk(
        self,
        chunk: Sequence[int],
        prompts: Sequence[Prompt],
        seeds: Sequence[int] | None,
        greedy: bool,
        on_finished: OnFinished | None,
    ) -> dict[int, Rollout]:
        """Rollouts of the prompts with these indices."""
        rollouts: dict[int, Rollout] = {}
        for indices in self._sampled_together(chunk, prompts):
            rows = [prompts[index] for index in indices]
            complete, version = self._stop_condition.completion, self._version()
            collector = RolloutCollector(rows, complete, version, indices, on_finished)
            row_seeds = None if seeds is None else [seeds[index] for index in indices]
            self._generate_chunk(collector, greedy, row_seeds, early=on_finished is not None)
            rollouts |= zip(indices, collector.rollouts(), strict=True)
        return rollouts

    def _sampled_together(self, chunk: Sequence[int], prompts: Sequence[Prompt]) -> list[list[int]]:
        """Indices of the prompts of a chunk that stand in one batch: all of them, but for a model that sees
        padding before a prompt those of one length."""
        if self._decoding is None:
            with _sampling_mode(self._lm()):
                self._decoding = decoding_of(self._lm())
        if self._decoding.pads:
            return [[*chunk]]
        by_length: dict[int, list[int]] = {}
        for index in chunk:
            by_length.setdefault(len(prompts[index].token_ids), []).append(index)
        return [*by_length.values()]

    @torch.no_grad()
    def _generate_chunk(
        self, collector: RolloutCollector, greedy: bool, seeds: Sequence[int] | None, early: bool
    ) -> None:
        """Sample one chunk with `transformers.generate`.

        seeds: one for each row; None draws from torch's generator.
        early: report completions before the chunk's end.
        """
        lm = self._lm()
        rows = [prompt.token_ids for prompt in collector.prompts]
        input_ids, attention_mask = pad_left(rows, self._pad_id, lm.device)
        # The output begins with the prompt; with what the decoder reads first where there is an encoder.
        response_start, start_ids = input_ids.shape[1], {}
        if lm.config.is_encoder_decoder:
            input_ids, attention_mask = flush_left(input_ids, attention_mask)
            start_ids = {"decoder_input_ids": decoder_start(lm, len(rows))}
            response_start = start_ids["decoder_input_ids"].shape[1]
        recorder, stopping = LogprobRecorder(), StoppingCriteriaList()
        seeded = [] if seeds is None or greedy else [SeededDraw(seeds, lm.device)]
        if self._stop_condition.has_stop_strings:
            stopping.append(StopStrings(self._stop_condition, response_start))
        if early:
            end_ids = torch.tensor(sorted(self._stop_condition.end_ids), device=lm.device)
            stopping = StoppingCriteriaList(
                [FinishWatcher(collector, recorder, stopping, end_ids, response_start)]
            )
        with _sampling_mode(lm), self._autocast(), self._processors() as processors:
            sequences = lm.generate(  # pyright: ignore[reportCallIssue]  typed as a Tensor attribute
                input_ids,
                attention_mask=attention_mask.long(),
                **start_ids,
                generation_config=self._generation_config(lm, takes_likeliest=greedy or bool(seeded)),
                logits_processor=LogitsProcessorList(
                    [*processors, *self._warpers(greedy), recorder, *seeded]
                ),
                stopping_criteria=stopping,
            )
        assert isinstance(sequences, Tensor)
        responses = sequences[:, response_start:]
        collector.add(range(len(responses)), responses, recorder.logprobs(responses))

    def _generation_config(self, lm: PreTrainedModel, takes_likeliest: bool) -> HFGenerationConfig:
        # Temperature, top-k and top-p are switched off here, for `_warpers` applies them.
        shaping = {} if takes_likeliest else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return HFGenerationConfig(
            max_new_tokens=self._config.max_new_tokens,
            do_sample=not takes_likeliest,
            eos_token_id=sorted(self._stop_condition.end_ids),
            pad_token_id=self._pad_id,
            decoder_start_token_id=getattr(lm.config, "decoder_start_token_id", None),
            use_cache=self._decoding is None or self._decoding.caches,
            **shaping,
        )

    def _warpers(self, greedy: bool) -> list[LogitsProcessor]:
        """Temperature, top-k and top-p, in the order of `transformers`; none where the choice is greedy."""
        config, warpers = self._config, []
        if not greedy and config.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(config.temperature))
        if not greedy and config.top_k > 0:
            warpers.append(TopKLogitsWarper(config.top_k))
        if not greedy and config.top_p < 1.0:
            warpers.append(TopPLogitsWarper(config.top_p))
        return warpers


@contextmanager
def _sampling_mode(lm: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, without the checkpoint's own sampling settings."""
    was_training = lm.training
    lm.eval()
    try:
        with plain_generation(lm):
            yield
    finally:
        lm.train(was_training)


_GPU_STRIDE = 8
"""Steps after which a GPU's tokens are read, which waits for the GPU: an end is seen at most 7 steps late."""


class RolloutCollector:
    """Makes the rollouts of one chunk, each once: when its end is seen, or at the end of the chunk.

    complete: makes a completion of a prompt's ids, sampled ids, those behind the end included, and the
        latter's log-probs.
    version: of the policy.
    indices: of the chunk's prompts among all prompts, as `on_finished` counts them.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        complete: Callable[[Sequence[int], list[int], list[float]], Completion],
        version: int,
        indices: Sequence[int],
        on_finished: OnFinished | None,
    ) -> None:
        self.prompts = prompts
        self._complete = complete
        self._version = version
        self._indices = indices
        self._on_finished = on_finished
        self._rollouts: dict[int, Rollout] = {}

    def add(self, rows: Iterable[int], responses: Int[Tensor, "B R"], logprobs: Float[Tensor, "B R"]) -> None:
        """Make rollouts of rows that have ended; rows that were added before are skipped."""
        new = [row for row in rows if row not in self._rollouts]
        if not new:
            return
        ids, columns = responses[new].tolist(), logprobs[new].tolist()
        for row, *sampled in zip(new, ids, columns, strict=True):
            prompt = self.prompts[row]
            self._rollouts[row] = Rollout(prompt, self._complete(prompt.token_ids, *sampled), self._version)
        if self._on_finished is not None:
            self._on_finished({self._indices[row]: self._rollouts[row] for row in new})

    def lacks(self, rows: Iterable[int]) -> bool:
        """True where one of these rows was not added yet."""
        return not self._rollouts.keys() >= set(rows)

    def rollouts(self) -> list[Rollout]:
        """All rollouts, in the order of their prompts."""
        return [self._rollouts[row] for row in range(len(self.prompts))]


class LogprobRecorder(LogitsProcessor):
    """Records the log-prob of each sampled id under the distribution that it was drawn from.

    Stands last among the processors, where logits are those that are sampled from. Keeps [B, V] of one step:
    all R steps would take more memory than the model where the vocabulary is large.
    """

    def __init__(self) -> None:
        self._columns: list[Float[Tensor, "B 1"]] = []
        self._pending: Float[Tensor, "B V"] | None = None

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """Called before each sampling; the last of `input_ids` was drawn from the previous call's scores."""
        self.record(input_ids[:, -1:])
        self._pending = scores.float().log_softmax(dim=-1)
        return scores

    def record(self, sampled: Int[Tensor, "B 1"]) -> None:
        """Record the ids drawn from the latest scores; a second call for the same scores does nothing."""
        if self._pending is not None:
            self._columns.append(self._pending.gather(-1, sampled))
        self._pending = None

    def logprobs(self, ids: Int[Tensor, "B R"]) -> Float[Tensor, "B R"]:
        """Log-probs of the response `ids`; behind a row's end they mean nothing."""
        if len(self._columns) < ids.shape[1]:
            self.record(ids[:, -1:])
        return torch.cat(self._columns, dim=-1)[:, : ids.shape[1]]


class SeededDraw(LogitsProcessor):
    """Draws each row's token from a generator of its own: gives that token the highest score.

    Stands behind all other processors, before a choice of the likeliest token.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [seeded_generator(seed, device) for seed in seeds]

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """Zeros, and 1 at the drawn tokens."""
        del input_ids
        tokens = draw_seeded(scores.softmax(dim=-1), self._generators)
        return torch.zeros_like(scores).scatter(1, tokens.unsqueeze(1), 1.0)


class StopStrings(StoppingCriteria):
    """Ends a row once its response contains a stop string.

    response_start: column of `input_ids` at which the responses start.
    """

    def __init__(self, stop_condition: StopCondition, response_start: int) -> None:
        self._stop_condition = stop_condition
        self._response_start = response_start

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  BoolTensor is the CPU's alone
        self, input_ids: Int[Tensor, "B T"], scores: Any, **_kwargs: Any
    ) -> Bool[Tensor, " B"]:
        """True for rows that are to end."""
        del scores
        responses = input_ids[:, self._response_start :].tolist()
        ended = [self._stop_condition.reached(row) for row in responses]
        return torch.tensor(ended, device=input_ids.device)


class FinishWatcher(StoppingCriteria):
    """Adds rows to a collector as they end, by an end id or by `inner`.

    inner: criteria that end rows beside end ids and the limit of length, which `generate` itself applies.
    end_ids: tokens that end a row.
    response_start: column of `input_ids` at which the responses start.
    """

    def __init__(
        self,
        collector: RolloutCollector,
        recorder: LogprobRecorder,
        inner: StoppingCriteriaList,
        end_ids: Int[Tensor, " E"],
        response_start: int,
    ) -> None:
        self._collector = collector
        self._recorder = recorder
        self._inner = inner
        self._end_ids = end_ids
        self._response_start = response_start
        self._ended: Bool[Tensor, " B"] | None = None

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  BoolTensor is the CPU's alone
        self, input_ids: Int[Tensor, "B T"], scores: Any, **kwargs: Any
    ) -> Bool[Tensor, " B"]:
        """Result of `inner`: True for rows that are to end."""
        stopped = self._inner(input_ids, scores, **kwargs)  # pyright: ignore[reportArgumentType]
        ended = stopped | torch.isin(input_ids[:, -1], self._end_ids)
        self._ended = ended if self._ended is None else self._ended | ended
        step = input_ids.shape[1] - self._response_start
        if not input_ids.is_cuda or step % _GPU_STRIDE == 0:
            self._collect(input_ids, self._ended)
        return stopped

    def _collect(self, input_ids: Int[Tensor, "B T"], ended: Bool[Tensor, " B"]) -> None:
        self._recorder.record(input_ids[:, -1:])
        rows = [row for row, has_ended in enumerate(ended.tolist()) if has_ended]
        if self._collector.lacks(rows):
            responses = input_ids[:, self._response_start :]
            self._collector.add(rows, responses, self._recorder.logprobs(responses))

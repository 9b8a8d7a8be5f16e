"""Completions handed over while the others of their chunk are still being sampled.

Legend: B prompts of a chunk, R response tokens so far, T = given tokens + R, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList

from conch.rollouts.ending import Ending
from conch.types import Completion, OnFinished, Prompt, Rollout

_GPU_STRIDE = 8
"""Steps between two looks at a GPU, each of which waits for it: a completion is told of 7 late at most."""


class Harvest:
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

    def __init__(self, ending: Ending, num_given: int) -> None:
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
        harvest: Harvest,
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

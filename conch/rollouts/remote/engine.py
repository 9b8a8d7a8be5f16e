"""Sample completions on vLLM servers, any of which may die and come back meanwhile."""

from __future__ import annotations

import contextlib
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from conch.config import GenerationConfig
from conch.errors import ConchError, RolloutError, RolloutUnavailableError
from conch.rollouts.base import check_lengths, draw_seeds, in_order
from conch.rollouts.protocol import CompletionReply, GenerateRequest
from conch.rollouts.remote.batches import (
    PromptBatch,
    batch_size,
    even_blocks,
    missing_part,
    split_prompts,
)
from conch.rollouts.remote.client import StaleWeightsError
from conch.rollouts.remote.lease import WeightLease
from conch.rollouts.remote.pool import ServerPool, ServerState, least_busy
from conch.types import Completion, OnFinished, Prompt, Rollout

_WAIT_S = 0.5
"""Longest wait for a completion before servers are looked after again."""


@dataclass(frozen=True)
class _RequestEnd:
    """The end of a request.

    tokens: what the request had added to the server's pending tokens.
    error: None where all of its completions have come.
    """

    server: ServerState
    batch: PromptBatch
    tokens: int
    error: ConchError | None


@dataclass(frozen=True)
class _CompletionEvent:
    """A completion that has come. index: among all that are to be sampled."""

    server: ServerState
    index: int
    reply: CompletionReply


_Event = _RequestEnd | _CompletionEvent


class RemoteEngine:
    """A `RolloutEngine` over servers. Seeds are drawn from torch's global generator.

    version: gives the number of updates that the policy has seen.
    deadline_s: longest time without a new completion from any server.
    """

    def __init__(
        self,
        pool: ServerPool,
        tokenizer: PreTrainedTokenizerBase,
        config: GenerationConfig,
        *,
        version: Callable[[], int],
        deadline_s: float,
    ) -> None:
        self._pool = pool
        self._config = config
        self._eos_id = int(tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]
        self._version = version
        self._deadline_s = deadline_s

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        greedy: bool = False,
        on_finished: OnFinished | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Iterator[list[Rollout]]:
        """See `RolloutEngine.generate`. All prompts are requested at once, whatever the chunks they come in.

        seeds: of each prompt's completion; None draws them.

        Raises:
            ConfigError: a prompt is longer than the servers' `max_model_len` leaves room for.
            RolloutError: no server answers before the deadline, or one answers with other weights.
        """
        with self._pool.lease(self._version()) as lease:
            servers = self._pool.push_weights(lease)
            check_lengths(prompts, self._config, self._pool.max_model_len)
            seeds = draw_seeds(len(prompts)) if seeds is None else seeds
            places = range(len(prompts))
            if self._pool.requests_per_server == 1:
                batches = even_blocks(prompts, places, seeds, len(servers))
            else:
                size = batch_size(prompts, len(servers), self._pool.requests_per_server)
                batches = split_prompts(prompts, places, seeds, size)
            sampling = _Sampling(self._pool, self._config, self._eos_id, lease, greedy, self._deadline_s)
            finished = sampling.rollouts(prompts, batches)
            yield from in_order(prompts, finished, self._config.chunk_size, on_finished)


class _Sampling:
    """The requests of one call of `generate`."""

    def __init__(
        self,
        pool: ServerPool,
        config: GenerationConfig,
        eos_id: int,
        lease: WeightLease,
        greedy: bool,
        deadline_s: float,
    ) -> None:
        self._pool = pool
        self._config = config
        self._eos_id = eos_id
        self._lease = lease
        self._weights = lease.weights
        self._greedy = greedy
        self._deadline_s = deadline_s
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._waiting: deque[PromptBatch] = deque()
        self._missing: set[int] = set()
        self._under_way: list[tuple[ServerState, PromptBatch, int]] = []
        self._stale_replies = 0

    def rollouts(
        self, prompts: Sequence[Prompt], batches: Sequence[PromptBatch]
    ) -> Iterator[dict[int, Rollout]]:
        """Yield rollouts by their prompts' indices as they end, one for each prompt, whatever servers do."""
        self._waiting.extend(batches)
        self._missing = {index for batch in batches for column in batch.indices for index in column}
        last_completion_s = time.monotonic()
        try:
            while self._missing:
                self._send_waiting()
                ended = self._receive(prompts)
                if ended:
                    last_completion_s = time.monotonic()
                    yield ended
                elif time.monotonic() - last_completion_s > self._deadline_s:
                    raise RolloutUnavailableError(
                        f"{len(self._missing)} completions are missing, and no server sent one for "
                        f"`rollout.deadline_s` = {self._deadline_s:g}"
                    )
        finally:
            # A request ends after its last completion, when nobody waits any more.
            while self._under_way:
                self._discharge(*self._under_way[-1])

    def _send_waiting(self) -> None:
        """Send waiting batches to servers that have room; probe those that are away."""
        for server in self._pool.servers:
            self._pool.recover(server, self._lease)
        while self._waiting:
            able = [server for server in self._pool.servers if server.holds(self._weights)]
            server = least_busy(able, self._waiting[0].num_completions)
            if server is None:
                return
            batch = self._waiting.popleft()
            tokens = batch.max_tokens(self._config.max_new_tokens)
            server.pending_tokens += tokens
            server.pending_completions += batch.num_completions
            self._under_way.append((server, batch, tokens))
            self._pool.threads.submit(self._request, server, batch, tokens)

    def _request(self, server: ServerState, batch: PromptBatch, tokens: int) -> None:
        """In a thread: request a batch, and queue what the server answers."""
        request = GenerateRequest(
            weights=self._weights,
            generation=self._config,
            greedy=self._greedy,
            eos_id=self._eos_id,
            prompts=tuple(batch.requests),
        )
        error: ConchError | None = None
        count = 0
        try:
            for reply in server.client.completions(request):
                if self._lease.has_ended:
                    break
                index = batch.indices[reply.prompt_index][reply.seed_index]
                self._events.put(_CompletionEvent(server, index, reply))
                count += 1
            if count < batch.num_completions:
                error = RolloutUnavailableError(f"{server.client.address} broke off")
        except ConchError as failure:
            error = failure
        except IndexError:
            error = RolloutError(f"{server.client.address} sent a completion that nobody asked for")
        self._events.put(_RequestEnd(server, batch, tokens, error))

    def _receive(self, prompts: Sequence[Prompt]) -> dict[int, Rollout]:
        """Rollouts that have come since the last call, after waiting a moment for the first."""
        ended: dict[int, Rollout] = {}
        for event in self._queued_events():
            if isinstance(event, _RequestEnd):
                self._close_request(event)
                continue
            self._check_version(event.server, event.reply)
            if event.index in self._missing:
                self._missing.remove(event.index)
                reply = event.reply
                completion = Completion(reply.text, reply.token_ids, reply.logprobs, reply.finish_reason)
                ended[event.index] = Rollout(prompts[event.index], completion, reply.version)
        return ended

    def _queued_events(self) -> Iterator[_Event]:
        with contextlib.suppress(queue.Empty):
            yield self._events.get(timeout=_WAIT_S)
            while True:
                yield self._events.get_nowait()

    def _check_version(self, server: ServerState, reply: CompletionReply) -> None:
        if reply.version != self._weights.version:
            raise RolloutError(
                f"{server.client.address} answered with version {reply.version} of the policy, "
                f"{self._weights.version} was asked for: give each run servers of its own"
            )

    def _close_request(self, end: _RequestEnd) -> None:
        """Take a request off its server's account, and queue again what it did not bring."""
        server, batch, error = end.server, end.batch, end.error
        self._discharge(server, batch, end.tokens)
        if error is None:
            return
        if not isinstance(error, RolloutUnavailableError):
            raise error
        if isinstance(error, StaleWeightsError):
            self._count_stale(error)
        self._pool.mark_lost(server, error)
        rest = missing_part(batch, self._missing)
        if rest is not None:
            self._waiting.appendleft(rest)

    def _discharge(self, server: ServerState, batch: PromptBatch, tokens: int) -> None:
        """Take a request off its server's account, which outlives this call."""
        self._under_way.remove((server, batch, tokens))
        server.pending_tokens -= tokens
        server.pending_completions -= batch.num_completions

    def _count_stale(self, error: StaleWeightsError) -> None:
        """Give up after many refusals: sending the weights again helps a restarted server, but not one that
        another run uses, too."""
        self._stale_replies += 1
        if self._stale_replies > 3 * self._pool.requests_per_server * len(self._pool.servers):
            raise RolloutError(f"{error}, again and again: give each run servers of its own") from error

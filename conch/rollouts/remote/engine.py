"""Sample completions with vLLM servers, any of which may die and come back while they are asked."""

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
from conch.rollouts.protocol import CompletionReply, GenerateRequest, PromptRequest
from conch.rollouts.remote.client import AstrayError
from conch.rollouts.remote.lease import WeightLease
from conch.rollouts.remote.pool import Server, ServerPool, least_busy
from conch.types import Completion, OnFinished, Prompt, Rollout

_PORTIONS = 4
"""Requests that a server's part of the prompts is cut into: so a quick one can take from a slow one's."""

_WAKE_S = 0.5


@dataclass(eq=False)
class Portion:
    """What one request asks for. places: of the completions, by prompt and by seed of that prompt."""

    wanted: list[PromptRequest]
    places: list[list[int]]

    @property
    def rows(self) -> int:
        """Completions."""
        return sum(len(column) for column in self.places)


@dataclass(frozen=True)
class _Ended:
    """A request is over. error: None where all of its completions came."""

    server: Server
    portion: Portion
    tokens: int
    error: ConchError | None


_Event = _Ended | tuple[Server, int, CompletionReply]
"""A completion comes with its place."""


class ServedEngine:
    """A `RolloutEngine` over servers. Seeds are drawn from torch's global generator.

    version: gives the number of updates the policy has seen.
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
        self, prompts: Sequence[Prompt], *, greedy: bool = False, on_finished: OnFinished | None = None
    ) -> Iterator[list[Rollout]]:
        """See `RolloutEngine.generate`. All prompts are asked for at once, whatever the chunks they come in.

        Raises:
            ConfigError: a prompt is longer than the servers' `max_model_len` leaves room for.
            RolloutError: no server answers before the deadline, or one answers with other weights.
        """
        with self._pool.lease(self._version()) as lease:
            servers = self._pool.ready(lease)
            check_lengths(prompts, self._config, self._pool.max_model_len)
            seeds = draw_seeds(len(prompts))
            size = max(1, -(-len(prompts) // (len(servers) * _PORTIONS)))
            work = _Work(self._pool, self._config, self._eos_id, lease, greedy, self._deadline_s)
            finished = work.finished(prompts, cut(prompts, range(len(prompts)), seeds, size))
            yield from in_order(prompts, finished, self._config.chunk_size, on_finished)


class _Work:
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
        self._stamp = lease.stamp
        self._greedy = greedy
        self._deadline_s = deadline_s
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._waiting: deque[Portion] = deque()
        self._missing: set[int] = set()
        self._astray = 0

    def finished(
        self, prompts: Sequence[Prompt], portions: Sequence[Portion]
    ) -> Iterator[dict[int, Rollout]]:
        """Rollouts as they end, each prompt's once, whatever becomes of the servers."""
        self._waiting.extend(portions)
        self._missing = {place for each in portions for column in each.places for place in column}
        heard = time.monotonic()
        while self._missing:
            self._launch()
            landed = self._landed(prompts)
            if landed:
                heard = time.monotonic()
                yield landed
            elif time.monotonic() - heard > self._deadline_s:
                raise RolloutUnavailableError(
                    f"{len(self._missing)} completions are missing, and no server sent one for "
                    f"`rollout.deadline_s` = {self._deadline_s:g}"
                )

    def _launch(self) -> None:
        """Ask for what waits, as far as servers have room; look after those that are away."""
        for server in self._pool.servers:
            self._pool.revive(server, self._lease)
        while self._waiting:
            able = [server for server in self._pool.servers if server.holds(self._stamp)]
            server = least_busy(able, self._waiting[0].rows)
            if server is None:
                return
            portion = self._waiting.popleft()
            tokens = self._tokens(portion)
            server.tokens += tokens
            server.rows += portion.rows
            self._pool.threads.submit(self._ask, server, portion, tokens)

    def _tokens(self, portion: Portion) -> int:
        """The most that it can come to."""
        return sum(
            len(column) * (len(wanted.token_ids) + self._config.max_new_tokens)
            for wanted, column in zip(portion.wanted, portion.places, strict=True)
        )

    def _ask(self, server: Server, portion: Portion, tokens: int) -> None:
        """In a thread: put what a server says where `finished` reads it."""
        asked = GenerateRequest(
            stamp=self._stamp,
            generation=self._config,
            greedy=self._greedy,
            eos_id=self._eos_id,
            wanted=tuple(portion.wanted),
        )
        error: ConchError | None = None
        count = 0
        try:
            for line in server.link.completions(asked):
                if self._lease.is_over:
                    break
                self._events.put((server, portion.places[line.prompt][line.sample], line))
                count += 1
            if count < portion.rows:
                error = RolloutUnavailableError(f"{server.link.address} broke off")
        except ConchError as failure:
            error = failure
        except IndexError:
            error = RolloutError(f"{server.link.address} sent a completion that nobody asked for")
        self._events.put(_Ended(server, portion, tokens, error))

    def _landed(self, prompts: Sequence[Prompt]) -> dict[int, Rollout]:
        """What has come since the last look, after waiting a moment for the first."""
        landed: dict[int, Rollout] = {}
        for event in self._news():
            if isinstance(event, _Ended):
                self._settle(event)
                continue
            server, place, line = event
            self._check_version(server, line)
            if place in self._missing:
                self._missing.remove(place)
                landed[place] = Rollout(prompts[place], _completion(line), line.version)
        return landed

    def _news(self) -> Iterator[_Event]:
        with contextlib.suppress(queue.Empty):
            yield self._events.get(timeout=_WAKE_S)
            while True:
                yield self._events.get_nowait()

    def _check_version(self, server: Server, line: CompletionReply) -> None:
        if line.version != self._stamp.version:
            raise RolloutError(
                f"{server.link.address} answered with version {line.version} of the policy, "
                f"{self._stamp.version} was asked for: give each run servers of its own"
            )

    def _settle(self, ended: _Ended) -> None:
        """Take a request off its server's account; what did not come is asked for again."""
        server, portion, error = ended.server, ended.portion, ended.error
        server.tokens -= ended.tokens
        server.rows -= portion.rows
        if error is None:
            return
        if not isinstance(error, RolloutUnavailableError):
            raise error
        if isinstance(error, AstrayError):
            self._count_astray(error)
        self._pool.lost(server, error)
        rest = without(portion, self._missing)
        if rest is not None:
            self._waiting.appendleft(rest)

    def _count_astray(self, error: AstrayError) -> None:
        """A server that was restarted is given its weights again; one that another run uses too, in vain."""
        self._astray += 1
        if self._astray > 3 * _PORTIONS * len(self._pool.servers):
            raise RolloutError(f"{error}, again and again: give each run servers of its own") from error


def cut(prompts: Sequence[Prompt], places: Sequence[int], seeds: Sequence[int], size: int) -> list[Portion]:
    """Requests of about `size` completions. Equal prompts in a row are asked for as one, with several seeds,
    and stay together: a server computes what they share once."""
    portions = [Portion([], [])]
    last: tuple[int, ...] | None = None
    for place, seed in zip(places, seeds, strict=True):
        ids = prompts[place].token_ids
        if ids == last:
            wanted = portions[-1].wanted[-1]
            portions[-1].wanted[-1] = PromptRequest(token_ids=ids, seeds=(*wanted.seeds, seed))
            portions[-1].places[-1].append(place)
            continue
        if portions[-1].rows >= size:
            portions.append(Portion([], []))
        portions[-1].wanted.append(PromptRequest(token_ids=ids, seeds=(seed,)))
        portions[-1].places.append([place])
        last = ids
    return [portion for portion in portions if portion.wanted]


def without(portion: Portion, missing: set[int]) -> Portion | None:
    """What of a request has not come yet, with the seeds that it had; None where nothing is missing."""
    rest = Portion([], [])
    for wanted, column in zip(portion.wanted, portion.places, strict=True):
        kept = [(place, seed) for place, seed in zip(column, wanted.seeds, strict=True) if place in missing]
        if kept:
            rest.places.append([place for place, _ in kept])
            rest.wanted.append(
                PromptRequest(token_ids=wanted.token_ids, seeds=tuple(seed for _, seed in kept))
            )
    return rest if rest.wanted else None


def _completion(line: CompletionReply) -> Completion:
    return Completion(line.text, line.token_ids, line.logprobs, line.finish_reason)

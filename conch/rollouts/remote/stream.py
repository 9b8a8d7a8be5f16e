"""Sample groups of completions on servers while the trainer computes.

One thread dispatches what is submitted, oldest first, and takes in what comes; each request to a server has a
thread of its own. New weights are sent in the pool's threads, from a copy.
"""

from __future__ import annotations

import bisect
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from conch.config import GenerationConfig
from conch.errors import ConchError, RolloutError, RolloutUnavailableError, first_line
from conch.log import get_logger
from conch.rollouts.base import check_lengths
from conch.rollouts.protocol import CompletionReply, GenerateRequest, Health
from conch.rollouts.remote.batches import PromptBatch, even_blocks, missing_part
from conch.rollouts.remote.client import StaleWeightsError
from conch.rollouts.remote.lease import WeightLease
from conch.rollouts.remote.pool import ServerPool, ServerState
from conch.types import Completion, Prompt, Rollout

_log = get_logger(__name__)

_WAIT_S = 0.5
"""Longest wait for a completion before servers are looked after again."""

_ORDER_S = 0.05
"""Pause between two requests to a server, so that the older one arrives first."""

_LOOK_S = 1.0
"""Pause between two looks at a server. A request to one that was started anew, unnoticed, would wait there
for weights that nobody sends."""

_MAX_LOSSES = 10
"""Servers in a row that may be lost over a block of prompts, before one of its completions has come."""

_POLL_S = 0.01


@dataclass(frozen=True, eq=False)
class GroupRequest:
    """One group to sample.

    number: of the group, by this rank.
    prompt: what all of its completions answer.
    seeds: one for each completion.
    version: lowest version of the weights that may sample it.
    """

    number: int
    prompt: Prompt
    seeds: tuple[int, ...]
    version: int


@dataclass(frozen=True)
class _Wanted:
    """A completion that is to come. place: in its group."""

    number: int
    place: int
    prompt: Prompt
    version: int


@dataclass(eq=False)
class _Block:
    """What one request asks for.

    age: place among all blocks, by submission.
    version: lowest version of the weights.
    losses: servers in a row that were lost over it.
    """

    age: int
    batch: PromptBatch
    version: int
    losses: int = 0


@dataclass(eq=False)
class _Request:
    """A block that is under way. missing: indices of the completions that have not come."""

    server: ServerState
    block: _Block
    missing: set[int]
    sent_s: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class _RequestEnd:
    """The end of a request. error: None where all of its completions have come."""

    request: _Request
    error: ConchError | None


@dataclass(frozen=True)
class _CompletionEvent:
    """A completion that has come. index: among all that are to come."""

    request: _Request
    index: int
    reply: CompletionReply


class _Wake:
    """Something else has changed."""


_Event = _RequestEnd | _CompletionEvent | _Wake


class GroupStream:
    """Samples groups on servers while the trainer computes; one on each rank.

    pool: the servers.
    deadline_s: longest time without a completion while some are to come.
    goes_on: see `WeightUpdate`.
    on_completion: told, in the stream's thread, the number of a group, a place in it and the rollout, once
        for each.
    on_failure: told once, in the stream's thread, what ended the stream.
    """

    def __init__(
        self,
        pool: ServerPool,
        generation: GenerationConfig,
        eos_id: int,
        *,
        deadline_s: float,
        goes_on: bool,
        on_completion: Callable[[int, int, Rollout], None],
        on_failure: Callable[[ConchError], None],
    ) -> None:
        self._pool = pool
        self._generation = generation
        self._eos_id = eos_id
        self._deadline_s = deadline_s
        self._goes_on = goes_on
        self._on_completion, self._on_failure = on_completion, on_failure
        self._newest: WeightLease | None = None
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._lock = threading.Lock()
        """Of what follows, which the threads of trainer, stream and watchdog read."""
        self._submitted: list[list[GroupRequest]] = []
        self._waiting: list[_Block] = []
        self._under_way: list[_Request] = []
        self._wanted: dict[int, _Wanted] = {}
        self._num_wanted = 0
        self._num_blocks = 0
        self._stale_replies = 0
        self._progress_s = time.monotonic()
        self._failure: ConchError | None = None
        self._is_closed = False
        self._needs_same_weights = False
        self._last_healths: dict[ServerState, Health] = {}
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------------------------- the trainer's thread

    def hand_over(self, version: int) -> None:
        """Copy the weights, which ZeRO-3 must have gathered, and have them sent; returns at once.

        A version that no server was sent yet is skipped. A rank that sends none notes the version.
        """
        old = self._newest
        if old is not None:
            self._newest = None
            old.end()  # first, so that its memory can be used again
        self._newest = self._pool.snapshot(version, goes_on=self._goes_on)
        self._events.put(_Wake())

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Check that prompts fit the servers, before any is sampled.

        Raises:
            ConfigError: a prompt is longer than the servers' `max_model_len` leaves room for.
            RolloutUnavailableError: no server answers.
        """
        if self._pool.max_model_len is None:  # nobody has asked a server yet
            self._pool.check()
        check_lengths(prompts, self._generation, self._pool.max_model_len)

    def submit(self, requests: Sequence[GroupRequest]) -> None:
        """Have groups sampled; returns at once.

        Raises:
            ConfigError: a prompt is longer than the servers' `max_model_len` leaves room for.
        """
        check_lengths([each.prompt for each in requests], self._generation, self._pool.max_model_len)
        with self._lock:
            self._submitted.append(list(requests))
        self._events.put(_Wake())

    def wait_for_weights(self) -> None:
        """Return once every live server holds the last weights handed over.

        Raises:
            ConchError: the stream has failed, or no server came to hold them before the deadline.
        """
        assert self._newest is not None, "no weights were handed over"
        weights, end = self._newest.weights, time.monotonic() + self._deadline_s
        self._needs_same_weights = True
        self._events.put(_Wake())
        try:
            while True:
                if self._failure is not None:
                    raise self._failure
                live = [server for server in self._pool.servers if server.health is not None]
                if live and all(server.holds(weights) for server in live):
                    return
                if time.monotonic() > end:
                    raise RolloutUnavailableError(
                        f"servers did not come to hold version {weights.version} of the weights within "
                        f"{self._deadline_s:g} s: {'; '.join(self._words_of_servers())}"
                    )
                time.sleep(_POLL_S)
        finally:
            self._needs_same_weights = False

    def idle(self) -> tuple[float, float]:
        """Busy seconds and clock seconds of all servers between what they said of themselves before the last
        call and since."""
        busy_s = clock_s = 0.0
        for server in self._pool.servers:
            health, last = server.health, self._last_healths.get(server)
            if health is None:
                continue
            if last is not None and last.clock_s <= health.clock_s:  # else it has been started anew
                busy_s += health.busy_s - last.busy_s
                clock_s += health.clock_s - last.clock_s
            self._last_healths[server] = health
        return busy_s, clock_s

    def describe(self) -> list[str]:
        """Who waits for what, in words: a line for each server, and one for what none was asked for yet."""
        lines = self._words_of_servers()
        with self._lock:
            numbers = {
                self._wanted[index].number
                for block in self._waiting
                for column in block.batch.indices
                for index in column
                if index in self._wanted
            }
            numbers |= {each.number for group in self._submitted for each in group}
        if numbers:
            lines.append(f"{_groups(numbers)} wait for a server")
        return lines

    @property
    def num_samplers(self) -> int:
        """Servers, those that are away included."""
        return len(self._pool.servers)

    def stacks(self) -> str:
        """Stacks of all threads of those samplers that tell them."""
        told: list[str] = []
        for server in self._pool.servers:
            try:
                told.append(server.client.stacks())
            except ConchError as error:
                told.append(f"no stacks: {error}")
        return "\n".join(told)

    def close(self) -> None:
        """End the threads; waits for no completion. Servers run on."""
        self._is_closed = True
        self._events.put(_Wake())
        if threading.current_thread() is not self._thread:
            self._thread.join()
        if self._newest is not None:
            self._newest.end()

    # ----------------------------------------------------------------------------------- the stream's thread

    def _run(self) -> None:
        try:
            while not self._is_closed:
                self._look_after_servers()
                pause_s = self._send_waiting()
                self._receive(pause_s)
                self._check_deadline()
        except ConchError as error:
            self._fail(error)
        except Exception as error:
            _log.error("sampling beside training failed", exc_info=True)
            failure = RolloutError(f"sampling beside training failed: {first_line(error)}")
            failure.__cause__ = error
            self._fail(failure)

    def _fail(self, error: ConchError) -> None:
        self._failure = error
        self._on_failure(error)

    def _look_after_servers(self) -> None:
        """Look at all servers from time to time, more often at those that are away, and send the newest
        weights to those that hold others."""
        newest = self._newest
        if newest is None:
            return
        for server in self._pool.servers:
            waits = self._pool.sends_weights or self._needs_same_weights or server.health is None
            if waits or time.monotonic() > server.probed_s + _LOOK_S:
                probe = self._pool.recover(server, newest, look_s=_LOOK_S)
                if probe is not None:
                    probe.add_done_callback(lambda _probe: self._events.put(_Wake()))

    def _send_waiting(self) -> float:
        """Send waiting blocks, oldest first, to servers that have room; the longest pause until the next."""
        live = [server for server in self._pool.servers if server.health is not None]
        if not live:
            return _WAIT_S
        with self._lock:
            for requests in self._submitted:
                self._waiting += self._blocks_of(requests, len(live))
            self._submitted.clear()
        while self._waiting:
            able = [server for server in live if self._has_room(server)]
            server = min(able, key=self._pending_tokens, default=None)
            if server is None:
                return _WAIT_S
            latest_s = max((each.sent_s for each in self._requests_of(server)), default=0.0)
            early_s = latest_s + _ORDER_S - time.monotonic()
            if early_s > 0:
                return early_s
            self._send(server)
        return _WAIT_S

    def _blocks_of(self, requests: Sequence[GroupRequest], count: int) -> Iterator[_Block]:
        """A block for each of `count` servers, and more only where versions differ."""
        for version, alike in groupby(requests, lambda request: request.version):
            first = self._num_wanted
            prompts, seeds = list[Prompt](), list[int]()
            for group in alike:
                for place, seed in enumerate(group.seeds):
                    self._wanted[self._num_wanted] = _Wanted(group.number, place, group.prompt, version)
                    self._num_wanted += 1
                    prompts.append(group.prompt)
                    seeds.append(seed)
            for batch in even_blocks(prompts, range(first, self._num_wanted), seeds, count):
                self._num_blocks += 1
                yield _Block(self._num_blocks, batch, version)

    def _requests_of(self, server: ServerState) -> list[_Request]:
        return [request for request in self._under_way if request.server is server]

    def _has_room(self, server: ServerState) -> bool:
        """True where all that the server was asked for is sampled at once: what comes next does not wait long
        there, while another server might begin it."""
        health = server.health  # a probe may find it away at any time
        missing = sum(len(request.missing) for request in self._requests_of(server))
        return health is not None and missing <= health.max_num_seqs

    def _pending_tokens(self, server: ServerState) -> int:
        """Most tokens that the server's requests under way can still come to."""
        return sum(
            len(self._wanted[index].prompt.token_ids) + self._generation.max_new_tokens
            for request in self._requests_of(server)
            for index in request.missing
            if index in self._wanted
        )

    def _send(self, server: ServerState) -> None:
        with self._lock:
            block = self._waiting.pop(0)
            request = _Request(server, block, {index for column in block.batch.indices for index in column})
            self._under_way.append(request)
        # A daemon: a server that says nothing must not keep this process from ending.
        threading.Thread(target=self._request, args=(request,), name="stream-request", daemon=True).start()

    def _receive(self, pause_s: float) -> None:
        """Take in what has come since the last call, after waiting so long for the first."""
        for event in self._queued_events(pause_s):
            if isinstance(event, _CompletionEvent):
                self._take(event)
            elif isinstance(event, _RequestEnd):
                self._close_request(event)

    def _queued_events(self, pause_s: float) -> Iterator[_Event]:
        with contextlib.suppress(queue.Empty):
            yield self._events.get(timeout=pause_s)
            while True:
                yield self._events.get_nowait()

    def _take(self, event: _CompletionEvent) -> None:
        """Tell of a completion, where it is the first of its place."""
        address, reply = event.request.server.client.address, event.reply
        with self._lock:
            event.request.missing.discard(event.index)
            wanted = self._wanted.get(event.index)
        if wanted is None:
            return
        if reply.version < wanted.version:
            raise RolloutError(
                f"{address} answered with version {reply.version} of the policy, {wanted.version} or a later "
                "one was asked for: give each run servers of its own"
            )
        runs = reply.version_runs
        if runs and (sum(count for _, count in runs) != len(reply.token_ids) or runs[0][0] != reply.version):
            raise RolloutError(
                f"{address} says that versions {runs} sampled a completion of {len(reply.token_ids)} tokens "
                f"that version {reply.version} began: it runs another release of Conch"
            )
        with self._lock:
            del self._wanted[event.index]
        event.request.block.losses = self._stale_replies = 0
        self._progress_s = time.monotonic()
        completion = Completion(reply.text, reply.token_ids, reply.logprobs, reply.finish_reason)
        self._on_completion(
            wanted.number, wanted.place, Rollout(wanted.prompt, completion, reply.version, runs)
        )

    def _close_request(self, end: _RequestEnd) -> None:
        """Queue again, before all that is younger, what a request did not bring."""
        request, error = end.request, end.error
        block = request.block
        rest = missing_part(block.batch, self._wanted.keys())
        with self._lock:
            self._under_way.remove(request)
            if error is not None and rest is not None:
                again = _Block(block.age, rest, block.version, block.losses + 1)
                bisect.insort(self._waiting, again, key=lambda each: each.age)
        if error is None:
            return
        if not isinstance(error, RolloutUnavailableError):
            raise error
        if isinstance(error, StaleWeightsError):
            self._stale_replies += 1
        if self._stale_replies > 3 * len(self._pool.servers):
            raise RolloutError(f"{error}, again and again: give each run servers of its own") from error
        if rest is not None and block.losses + 1 > _MAX_LOSSES:
            raise RolloutError(
                f"{_MAX_LOSSES} servers in a row were lost before one completion of "
                f"{_groups(self._numbers(request))} came, lately: {error}"
            ) from error
        self._pool.mark_lost(request.server, error)

    def _check_deadline(self) -> None:
        with self._lock:
            numbers = {wanted.number for wanted in self._wanted.values()}
            numbers |= {each.number for group in self._submitted for each in group}
        if not numbers:
            self._progress_s = time.monotonic()
        elif time.monotonic() - self._progress_s > self._deadline_s:
            raise RolloutUnavailableError(
                f"completions of {_groups(numbers)} are missing, and no server sent one for "
                f"{self._deadline_s:g} s: {'; '.join(self._words_of_servers())}"
            )

    # ----------------------------------------------------------------------------------- a request's thread

    def _request(self, request: _Request) -> None:
        """Request a block, and queue what the server answers."""
        block, client = request.block, request.server.client
        error: ConchError | None = None
        count = 0
        try:
            message = GenerateRequest(
                weights=self._pool.weight_version(block.version),
                or_later=True,
                generation=self._generation,
                greedy=False,
                eos_id=self._eos_id,
                prompts=tuple(block.batch.requests),
            )
            for reply in client.completions(message):
                if self._is_closed:
                    return
                index = block.batch.indices[reply.prompt_index][reply.seed_index]
                self._events.put(_CompletionEvent(request, index, reply))
                count += 1
            if count < block.batch.num_completions:
                error = RolloutUnavailableError(f"{client.address} broke off")
        except ConchError as failure:
            error = failure
        except IndexError:
            error = RolloutError(f"{client.address} sent a completion that nobody asked for")
        except Exception as failure:
            error = RolloutError(f"a request to {client.address} failed: {first_line(failure)}")
            error.__cause__ = failure
        self._events.put(_RequestEnd(request, error))

    # ----------------------------------------------------------------------------------------------- words

    def _numbers(self, request: _Request) -> set[int]:
        """Groups that a request has not brought whole."""
        return {self._wanted[index].number for index in request.missing if index in self._wanted}

    def _words_of_servers(self) -> list[str]:
        now_s, newest = time.monotonic(), self._newest
        lines: list[str] = []
        for server in self._pool.servers:
            health = server.health
            if health is None:
                words = "is away"
            elif health.weights is None:
                words = "holds no weights"
            else:
                words = f"holds version {health.weights.version}"
            if server.probe is not None and not server.probe.done() and newest is not None:
                words += f", is looked at and sent version {newest.weights.version}"
            with self._lock:
                requests = self._requests_of(server)
                numbers = {number for request in requests for number in self._numbers(request)}
                first_s = min((request.sent_s for request in requests), default=now_s)
            if numbers:
                words += f", samples {_groups(numbers)}, asked for {now_s - first_s:.0f} s ago"
            lines.append(f"{server.client.address} {words}")
        return lines


def _groups(numbers: set[int]) -> str:
    """Numbers of groups, in words."""
    first, last = min(numbers), max(numbers)
    return f"group {first}" if first == last else f"{len(numbers)} of groups {first} to {last}"

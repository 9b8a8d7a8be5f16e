"""The replicas of one model: which are healthy, how much each has to do, which gets the next request.

Whether a replica gets requests: a circuit breaker (Nygard, "Release It!", 2nd ed. 2018, section 5.3).

closed: it gets requests.
open: it gets none until a probe is due. The health checker sends the probe, which is the half-open state: a
    score closes the breaker, anything else opens it for longer.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from conch.log import rank
from conch.rewards.client.transport import Failure, ModelInfo, NamedServer

IN_A_ROW = 5
WINDOW = 20
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
# While no replica replies and samples wait, little is lost by asking often: a refused connection costs 1 ms.
_FIRST_URGENT_PAUSE_S = 0.1
_LONGEST_URGENT_PAUSE_S = 2.0


class CircuitBreaker:
    """The state of one replica.

    Opens at once on a failure that concerns every request (`Failure.is_down`); on others after `IN_A_ROW`, or
    when half of the last `WINDOW` requests failed.

    cause: the latest failure; None if there was none since it closed.
    failures: number in a row.
    """

    def __init__(self) -> None:
        self.cause: Failure | None = None
        self.failures = 0
        self._is_closed = True
        self._outcomes: deque[bool] = deque(maxlen=WINDOW)
        self._probes = 0

    @property
    def is_closed(self) -> bool:
        """Whether the replica gets requests."""
        return self._is_closed

    def record_success(self) -> None:
        """Count a request with a reply."""
        self.failures = 0
        self._outcomes.append(True)

    def record_failure(self, failure: Failure) -> None:
        """Count a request without a reply; may open the breaker."""
        self.cause = failure
        self.failures += 1
        self._outcomes.append(False)
        if not self._is_closed:
            return
        half_failed = len(self._outcomes) == WINDOW and self._outcomes.count(False) * 2 >= WINDOW
        if failure.is_down or self.failures >= IN_A_ROW or half_failed:
            self._is_closed = False

    def record_probe_failure(self, failure: Failure) -> None:
        """Open the breaker for longer."""
        self.cause = failure
        self._is_closed = False
        self._probes += 1

    def close(self) -> None:
        """Close the breaker: the probe was scored."""
        self._is_closed = True
        self.cause = None
        self.failures = self._probes = 0
        self._outcomes.clear()

    def pause_s(self, *, urgent: bool) -> float:
        """Seconds until the next probe: doubling, with a random part so that ranks do not probe together.

        urgent: samples wait and no replica replies.
        """
        first, longest = (
            (_FIRST_URGENT_PAUSE_S, _LONGEST_URGENT_PAUSE_S) if urgent else (_FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        )
        return min(longest, first * 2 ** min(self._probes, 10)) * random.uniform(0.5, 1.0)


def backoff_s(attempts: int) -> float:
    """Seconds before a request that failed `attempts` times is repeated.

    Random, up to 0.1, 0.2, ... 2 s, so that ranks that failed together do not come back together.
    """
    longest = min(_LONGEST_URGENT_PAUSE_S, _FIRST_URGENT_PAUSE_S * 2 ** min(attempts - 1, 10))
    return random.uniform(0, longest)


ServerT = TypeVar("ServerT", bound=NamedServer)


@dataclass(eq=False, slots=True)
class ReplicaState(Generic[ServerT]):
    """One replica as the client sees it.

    transport: the connection to it, such as the `Transport` of a reward model.
    info: description of its model; None until it was reached for the first time: it gets no rows before.
    contents: version -> content hash, of every version that has replied.
    breaker_opened: set when its breaker opens.
    in_flight: requests under way.
    tokens: tokens in the requests under way.
    turn: number of its latest request, to take turns.
    busy_until: time of the loop before which it wants no request.
    """

    transport: ServerT
    breaker: CircuitBreaker = field(default_factory=CircuitBreaker)
    info: ModelInfo | None = None
    contents: dict[str, str] = field(default_factory=dict)
    breaker_opened: asyncio.Event = field(default_factory=asyncio.Event)
    in_flight: int = 0
    tokens: int = 0
    turn: int = 0
    busy_until: float = float("-inf")

    @property
    def name(self) -> str:
        """The replica in messages."""
        return self.transport.name

    @property
    def is_usable(self) -> bool:
        """Whether it may get rows."""
        return self.info is not None and self.breaker.is_closed

    @property
    def permanent_failure(self) -> Failure | None:
        """Failure that waiting alone does not cure (another model, a refused secret), else None."""
        cause = None if self.is_usable else self.breaker.cause
        return None if cause is None or cause.retryable else cause


@dataclass(eq=False, slots=True)
class _Waiter(Generic[ServerT]):
    avoid: Collection[ReplicaState[ServerT]]
    replica: asyncio.Future[ReplicaState[ServerT] | None]


class Pool(Generic[ServerT]):
    """Grants places for requests: at most `max_in_flight` a replica, the least loaded first.

    name: all replicas together, in messages.
    model: the replicas' model, in results.
    starved: set while a waiter waits and no replica is usable, so that probes are sent sooner.
    most_in_flight: most requests under way at once; a reader may set it back.
    """

    def __init__(self, name: str, transports: Sequence[ServerT], max_in_flight: int) -> None:
        self.name = name
        self.model = transports[0].model
        # Each rank begins with another replica, or the first would get the first request of all of them.
        first = rank() % len(transports)
        self.replicas = [ReplicaState(each) for each in (*transports[first:], *transports[:first])]
        self.starved = asyncio.Event()
        self.most_in_flight = 0
        self._max_in_flight = max_in_flight
        self._retries: deque[_Waiter[ServerT]] = deque()
        self._first_attempts: deque[_Waiter[ServerT]] = deque()
        self._turns = 0

    @property
    def in_flight(self) -> int:
        """Requests under way at all replicas."""
        return sum(replica.in_flight for replica in self.replicas)

    def usable(self, *, but: Collection[ReplicaState[ServerT]] = ()) -> list[ReplicaState[ServerT]]:
        """Replicas that may get rows, except `but`."""
        return [replica for replica in self.replicas if replica.is_usable and replica not in but]

    def idle(self) -> int:
        """Number of usable replicas without a request."""
        return sum(replica.in_flight == 0 for replica in self.usable())

    def permanent_failure(self) -> Failure | None:
        """The failure that makes waiting useless (every replica has a permanent one), else None."""
        failures = [replica.permanent_failure for replica in self.replicas]
        return None if None in failures else failures[0]

    async def acquire(
        self, timeout_s: float, *, avoid: Collection[ReplicaState[ServerT]] = (), is_retry: bool = False
    ) -> ReplicaState[ServerT] | None:
        """Wait for a place; None after `timeout_s`, or at once where waiting is useless. Then `release` it.

        avoid: replicas to take only if there is no other usable one.
        is_retry: goes before first attempts.
        """
        waiter = _Waiter(avoid, asyncio.get_running_loop().create_future())
        queue = self._retries if is_retry else self._first_attempts
        queue.append(waiter)
        # A timer that sets the result, rather than `wait_for`, which may lose a place granted as it cancels.
        timer = asyncio.get_running_loop().call_later(max(0.0, timeout_s), _set_once, waiter.replica, None)
        try:
            self.grant_waiting()
            return await waiter.replica
        except asyncio.CancelledError:
            if waiter.replica.done() and (replica := waiter.replica.result()) is not None:
                self.release(replica)
            raise
        finally:
            timer.cancel()
            if waiter in queue:
                queue.remove(waiter)
            self._update_starved()

    def release(self, replica: ReplicaState[ServerT]) -> None:
        """Give a place back."""
        replica.in_flight -= 1
        self.grant_waiting()

    def defer(self, replica: ReplicaState[ServerT], seconds: float) -> None:
        """Give a replica no request for so many seconds: it has too much to do."""
        loop = asyncio.get_running_loop()
        replica.busy_until = max(replica.busy_until, loop.time() + seconds)
        loop.call_at(replica.busy_until + 1e-3, self.grant_waiting)  # a timer may come a clock's tick early

    def grant_waiting(self) -> None:
        """Grant places to waiters; must be called whenever a replica changes its state."""
        waiting_is_useless = self.permanent_failure() is not None
        for waiter in list(self._waiting()):
            if waiting_is_useless:
                _set_once(waiter.replica, None)
            elif (replica := self._least_loaded(waiter.avoid)) is not None:
                self._turns += 1
                replica.turn = self._turns
                replica.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                _set_once(waiter.replica, replica)
        self._update_starved()

    def _waiting(self) -> Iterator[_Waiter[ServerT]]:
        for queue in (self._retries, self._first_attempts):
            yield from (waiter for waiter in queue if not waiter.replica.done())

    def _least_loaded(self, avoid: Collection[ReplicaState[ServerT]]) -> ReplicaState[ServerT] | None:
        preferred = self.usable(but=avoid) or self.usable()
        now = asyncio.get_running_loop().time()
        free = [
            replica
            for replica in preferred
            if replica.in_flight < self._max_in_flight and replica.busy_until <= now
        ]
        # One that fails fast always has free places: among equals it comes last, until its breaker opens.
        return min(free, key=lambda each: (each.in_flight, each.breaker.failures, each.turn), default=None)

    def _update_starved(self) -> None:
        if any(True for _ in self._waiting()) and not self.usable():
            self.starved.set()
        else:
            self.starved.clear()


def _set_once(
    future: asyncio.Future[ReplicaState[ServerT] | None], replica: ReplicaState[ServerT] | None
) -> None:
    if not future.done():
        future.set_result(replica)

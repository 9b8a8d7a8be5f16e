"""The replicas of one model: who is healthy, how much each has to do, who gets the next request.

When to leave a replica alone: a circuit breaker (Nygard, "Release It!", 2nd ed. 2018, section 5.3).

closed: it is asked. open: it is not, until a probe is due. Whoever owns the breaker sends the probe, which is
the half-open state: a score closes the breaker, anything else opens it for longer.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from conch.log import rank
from conch.rewards.client.transport import Failure, ModelInfo, Transport

IN_A_ROW = 5
WINDOW = 20
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
# While no replica answers and samples wait, little is lost by asking often: a refused connection costs 1 ms.
_FIRST_URGENT_PAUSE_S = 0.1
_LONGEST_URGENT_PAUSE_S = 2.0


class CircuitBreaker:
    """The state of one replica.

    Opens at once on a failure that concerns every request (`Failure.is_down`); on others after `IN_A_ROW`, or
    when half of the last `WINDOW` requests failed.

    cause: the latest failure; None if there was none since it closed.
    failures: in a row.
    """

    def __init__(self) -> None:
        self.cause: Failure | None = None
        self.failures = 0
        self._is_closed = True
        self._recent: deque[bool] = deque(maxlen=WINDOW)
        self._probes = 0

    @property
    def is_closed(self) -> bool:
        """Whether the replica may be asked."""
        return self._is_closed

    def succeeded(self) -> None:
        """A request was answered."""
        self.failures = 0
        self._recent.append(True)

    def failed(self, failure: Failure) -> None:
        """A request was not."""
        self.cause = failure
        self.failures += 1
        self._recent.append(False)
        if not self._is_closed:
            return
        if failure.is_down or self.failures >= IN_A_ROW or self._half_failed():
            self._is_closed = False

    def probe_failed(self, failure: Failure) -> None:
        """Nor was the probe: left alone for longer."""
        self.cause = failure
        self._is_closed = False
        self._probes += 1

    def close(self) -> None:
        """The probe was scored."""
        self._is_closed = True
        self.cause = None
        self.failures = self._probes = 0
        self._recent.clear()

    def pause_s(self, *, urgent: bool) -> float:
        """Seconds until the next probe: doubling, with a random part so that ranks do not probe together.

        urgent: samples wait and no replica answers.
        """
        first, longest = (
            (_FIRST_URGENT_PAUSE_S, _LONGEST_URGENT_PAUSE_S) if urgent else (_FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        )
        return min(longest, first * 2 ** min(self._probes, 10)) * random.uniform(0.5, 1.0)

    def _half_failed(self) -> bool:
        return len(self._recent) == WINDOW and self._recent.count(False) * 2 >= WINDOW


def backoff_s(attempts: int) -> float:
    """Seconds before a request that failed `attempts` times is repeated: anything up to 0.1, 0.2, ... 2 s, so
    that ranks that failed together do not come back together."""
    longest = min(_LONGEST_URGENT_PAUSE_S, _FIRST_URGENT_PAUSE_S * 2 ** min(attempts - 1, 10))
    return random.uniform(0, longest)


@dataclass(eq=False, slots=True)
class ReplicaState:
    """One replica as the client sees it.

    info: None until it was reached for the first time; it is not asked before.
    contents: version -> content hash, of every version that answered.
    lost: set when its breaker opens.
    in_flight: requests under way; tokens: in those. used: number of its latest request, to take turns.
    """

    replica: Transport
    breaker: CircuitBreaker = field(default_factory=CircuitBreaker)
    info: ModelInfo | None = None
    contents: dict[str, str] = field(default_factory=dict)
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    in_flight: int = 0
    tokens: int = 0
    used: int = 0

    @property
    def is_usable(self) -> bool:
        """Whether it may be asked for scores."""
        return self.info is not None and self.breaker.is_closed

    @property
    def lasting_fault(self) -> Failure | None:
        """Why it is not usable, if waiting alone does not cure it: another model, a refused secret."""
        cause = None if self.is_usable else self.breaker.cause
        return None if cause is None or cause.retryable else cause


@dataclass(eq=False, slots=True)
class _Waiter:
    avoid: Collection[ReplicaState]
    granted: asyncio.Future[ReplicaState | None]


class Pool:
    """Gives out places for requests: at most `max_in_flight` a replica, the least loaded first.

    name: how messages call the replicas together. model: theirs.
    wanted: set while somebody waits and no replica is usable, so that probes are sent sooner.
    most_in_flight: most requests under way at once; whoever reads it may set it back.
    """

    def __init__(self, name: str, replicas: Sequence[Transport], max_in_flight: int) -> None:
        self.name = name
        self.model = replicas[0].model
        # Each rank begins with another replica, or the first would get the first request of all of them.
        turn = rank() % len(replicas)
        self.links = [ReplicaState(replica) for replica in (*replicas[turn:], *replicas[:turn])]
        self.wanted = asyncio.Event()
        self.most_in_flight = 0
        self._max_in_flight = max_in_flight
        self._retries: deque[_Waiter] = deque()
        self._fresh: deque[_Waiter] = deque()
        self._given = 0

    @property
    def in_flight(self) -> int:
        """Requests under way at all replicas."""
        return sum(link.in_flight for link in self.links)

    def usable(self, *, but: Collection[ReplicaState] = ()) -> list[ReplicaState]:
        """Replicas that may be asked."""
        return [link for link in self.links if link.is_usable and link not in but]

    def idle(self) -> int:
        """Usable replicas that have nothing to do."""
        return sum(link.in_flight == 0 for link in self.usable())

    def hopeless(self) -> Failure | None:
        """Why no replica will answer, whatever time they are given; None if one may."""
        lasting = [link.lasting_fault for link in self.links]
        return None if None in lasting else lasting[0]

    async def acquire(
        self, timeout_s: float, *, avoid: Collection[ReplicaState] = (), is_retry: bool = False
    ) -> ReplicaState | None:
        """Wait for a place; None after `timeout_s`, or at once where waiting is of no use. Then `release` it.

        avoid: replicas to take only if there is no other usable one.
        is_retry: goes before whoever is not.
        """
        waiter = _Waiter(avoid, asyncio.get_running_loop().create_future())
        queue = self._retries if is_retry else self._fresh
        queue.append(waiter)
        # A timer that answers, rather than `wait_for`, which may lose a place that is granted as it cancels.
        timer = asyncio.get_running_loop().call_later(max(0.0, timeout_s), _answer, waiter.granted, None)
        try:
            self.serve()
            return await waiter.granted
        except asyncio.CancelledError:
            if waiter.granted.done() and (link := waiter.granted.result()) is not None:
                self.release(link)
            raise
        finally:
            timer.cancel()
            if waiter in queue:
                queue.remove(waiter)
            self._note_wanted()

    def release(self, link: ReplicaState) -> None:
        """Give a place back."""
        link.in_flight -= 1
        self.serve()

    def serve(self) -> None:
        """Grant what can be granted; to be called whenever a replica changes its state."""
        is_hopeless = self.hopeless() is not None
        for waiter in list(self._waiting()):
            if is_hopeless:
                _answer(waiter.granted, None)
            elif (link := self._choose(waiter.avoid)) is not None:
                self._grant(waiter, link)
        self._note_wanted()

    def _waiting(self) -> Iterator[_Waiter]:
        for queue in (self._retries, self._fresh):
            yield from (waiter for waiter in queue if not waiter.granted.done())

    def _grant(self, waiter: _Waiter, link: ReplicaState) -> None:
        self._given += 1
        link.used = self._given
        link.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        _answer(waiter.granted, link)

    def _choose(self, avoid: Collection[ReplicaState]) -> ReplicaState | None:
        preferred = self.usable(but=avoid) or self.usable()
        free = [link for link in preferred if link.in_flight < self._max_in_flight]
        # One that fails fast always has free places: among equals it comes last, until its breaker opens.
        return min(free, key=lambda link: (link.in_flight, link.breaker.failures, link.used), default=None)

    def _note_wanted(self) -> None:
        if any(True for _ in self._waiting()) and not self.usable():
            self.wanted.set()
        else:
            self.wanted.clear()


def _answer(future: asyncio.Future[ReplicaState | None], link: ReplicaState | None) -> None:
    if not future.done():
        future.set_result(link)

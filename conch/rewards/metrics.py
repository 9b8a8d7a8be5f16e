"""What a scorer measures of its source.

How much of the time that rewards take passes while the trainer does something else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from conch.rewards.base import ClientStats, CountsTraffic, ReportsStats, RewardSource, ServerTimes
from conch.types import Metrics, RewardResult


class ScorerMetrics:
    """Metrics of one rank, from one gather to the next. overlap: to be told of time that was waited."""

    def __init__(self, source: RewardSource) -> None:
        self.overlap = OverlapTimer()
        self._source = source
        self._sent = 0
        self._traffic_before = self._traffic()
        self._times: Future[ServerTimes] | None = None

    def sent(self, future: Future[Any]) -> None:
        """A request was made of the source just now."""
        self._sent += 1
        self.overlap.track(future)

    def measure(self, results: Sequence[RewardResult]) -> Metrics:
        """This rank's figures of the time since the last call.

        reward/latency_p50_s, reward/latency_p99_s: from a sample's request to its reply, seconds.
        reward/wait_s: seconds that `gather` was blocked.
        reward/hidden_fraction: of the time in which rewards were under way (any number of them; pauses of an
            outage included), the share in which the trainer was not blocked. 1 where they took no time.
        reward/failed_fraction: share of samples without a score.
        reward/degraded_fraction: share that an ensemble scored without all of its members.
        reward/requests, reward/retries: requests sent since the gather before, and how many repeated another.
        reward/deduplicated: samples that needed no request, since an equal one was under way or known.
        reward/in_flight: most requests under way at once since the gather before.
        reward/queue_s, reward/compute_s: seconds that a request waited in the server, and was computed there:
            the server's means over all clients' requests between the two gathers before this one.
        """
        latencies = sorted(result.latency_s for result in results)
        wait_s, hidden = self.overlap.read()
        return {
            "reward/latency_p50_s": _percentile(latencies, 0.50),
            "reward/latency_p99_s": _percentile(latencies, 0.99),
            "reward/wait_s": wait_s,
            "reward/hidden_fraction": hidden,
            "reward/degraded_fraction": sum(result.ok and result.detail != "" for result in results)
            / max(1, len(results)),
            "reward/failed_fraction": sum(not result.ok for result in results) / max(1, len(results)),
            **self._measure_traffic(),
            **self._measure_servers(),
        }

    def _measure_traffic(self) -> Metrics:
        before, now = self._traffic_before, self._traffic()
        self._traffic_before = now
        return {
            "reward/requests": float(now.requests - before.requests),
            "reward/retries": float(now.retries - before.retries),
            "reward/deduplicated": float(now.deduplicated - before.deduplicated),
            "reward/in_flight": float(now.most_in_flight),
        }

    def _traffic(self) -> ClientStats:
        if isinstance(self._source, ReportsStats):
            return self._source.traffic()
        if isinstance(self._source, CountsTraffic):
            return ClientStats(self._source.requests, self._source.retries)
        return ClientStats(self._sent)

    def _measure_servers(self) -> Metrics:
        """What the servers told since the gather before: the trainer does not wait for statistics."""
        times = ServerTimes()
        if isinstance(self._source, ReportsStats):
            if self._times is not None and self._times.done() and self._times.exception() is None:
                times = self._times.result()
            if self._times is None or self._times.done():
                self._times = self._source.server_times()
        return {
            "reward/queue_s": times.queue_s / max(1, times.requests),
            "reward/compute_s": times.compute_s / max(1, times.requests),
        }


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest rank; 0 for no values."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


class OverlapTimer:
    """Measures from one `read` to the next. `track` may be called in one thread, futures end in any.

    Rewards are under way from a request to its answer; several at once count once, not several times.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0
        self._since = 0.0
        self._busy_s = 0.0
        self._blocked_s = 0.0

    def track(self, future: Future[Any]) -> None:
        """A request was sent just now; it is under way until `future` is done."""
        with self._lock:
            if self._under_way == 0:
                self._since = time.monotonic()
            self._under_way += 1
        future.add_done_callback(self._done)

    def block(self, seconds: float, *, idle: bool = False) -> None:
        """The trainer stood still for rewards. idle: with none under way, as between two attempts."""
        with self._lock:
            self._blocked_s += seconds
            self._busy_s += seconds if idle else 0.0

    def read(self) -> tuple[float, float]:
        """Seconds that the trainer was blocked, and the share of the rewards' time that it was not: 1 for
        rewards that took no time. What is measured next starts at 0."""
        with self._lock:
            now = time.monotonic()
            busy = self._busy_s + (now - self._since if self._under_way else 0.0)
            blocked = self._blocked_s
            self._busy_s = self._blocked_s = 0.0
            self._since = now
        return blocked, max(0.0, 1 - blocked / busy) if busy > 0 else 1.0

    def _done(self, _future: Future[Any]) -> None:
        with self._lock:
            self._under_way -= 1
            if self._under_way == 0:
                self._busy_s += time.monotonic() - self._since

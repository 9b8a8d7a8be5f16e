"""Metrics of a run's rewards: latencies, failures, requests, and how much of scoring is hidden."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from conch.rewards.base import ClientStats, RewardSource, ServerTimes
from conch.types import Metrics, RewardResult


class ScorerMetrics:
    """Metrics of one rank, from one gather to the next.

    overlap: the timer that the scorer tells of time spent waiting.
    """

    def __init__(self, source: RewardSource) -> None:
        self.overlap = OverlapTimer()
        self._source = source
        self._lock = threading.Lock()
        self._submits = 0
        self._last_stats = self.stats()
        self._server_times: Future[ServerTimes] | None = None

    def record_submit(self, future: Future[Any]) -> None:
        """Count a request to the source, under way until `future` is done; from any thread."""
        with self._lock:
            self._submits += 1
        self.overlap.track(future)

    def stats(self) -> ClientStats:
        """Counts of the source; of one that has none, the number of submits."""
        return self._source.stats() or ClientStats(requests=self._submits)

    def measure(self, results: Sequence[RewardResult], stats: ClientStats) -> Metrics:
        """This rank's figures of the time since the last call.

        stats: a snapshot taken just now.

        Returns:
            reward/latency_p50_s, reward/latency_p99_s: from a sample's request to its reply, seconds.
            reward/wait_s: seconds that `gather` was blocked.
            reward/hidden_fraction: of the time in which rewards were under way (any number of them; pauses of
                an outage included), the share in which the trainer was not blocked; 1 if they took no time.
            reward/failed_fraction: share of samples without a score.
            reward/degraded_fraction: share that an ensemble scored without all of its members.
            reward/requests, reward/retries: requests since the last gather, and those that repeat another.
            reward/deduplicated: samples without a request, since an equal one was under way or in the cache.
            reward/in_flight: most requests under way at once since the last gather.
            reward/queue_s, reward/compute_s: seconds that a request waited in the server, and was computed
                there: the server's means over all clients' requests between the two gathers before this one.
            and what the source has of its own: see `RewardSource.metrics`.
        """
        latencies = sorted(result.latency_s for result in results)
        samples = max(1, len(results))
        wait_s, hidden = self.overlap.read()
        last, self._last_stats = self._last_stats, stats
        server = self._latest_server_times()
        return {
            "reward/latency_p50_s": _percentile(latencies, 0.50),
            "reward/latency_p99_s": _percentile(latencies, 0.99),
            "reward/wait_s": wait_s,
            "reward/hidden_fraction": hidden,
            "reward/degraded_fraction": sum(result.ok and result.detail != "" for result in results)
            / samples,
            "reward/failed_fraction": sum(not result.ok for result in results) / samples,
            "reward/requests": float(stats.requests - last.requests),
            "reward/retries": float(stats.retries - last.retries),
            "reward/deduplicated": float(stats.deduplicated - last.deduplicated),
            "reward/in_flight": float(stats.most_in_flight),
            "reward/queue_s": server.queue_s / max(1, server.requests),
            "reward/compute_s": server.compute_s / max(1, server.requests),
            **self._source.metrics(),
        }

    def _latest_server_times(self) -> ServerTimes:
        """Statistics that arrived since the last gather: the trainer does not wait for them."""
        pending = self._server_times
        if pending is not None and not pending.done():
            return ServerTimes()
        self._server_times = self._source.server_statistics()
        return ServerTimes() if pending is None or pending.exception() is not None else pending.result()


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest rank; 0 for no values."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


class OverlapTimer:
    """Measures from one `read` to the next. `track` may be called in any thread, futures end in any.

    Rewards are under way from a request to its reply; several at once count once, not several times.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0
        self._since = 0.0
        self._busy_s = 0.0
        self._blocked_s = 0.0

    def track(self, future: Future[Any]) -> None:
        """Count a request as under way from now until `future` is done."""
        with self._lock:
            if self._under_way == 0:
                self._since = time.monotonic()
            self._under_way += 1
        future.add_done_callback(self._end)

    def block(self, seconds: float, *, idle: bool = False) -> None:
        """Add time in which the trainer stood still for rewards.

        idle: with none under way, as between two attempts.
        """
        with self._lock:
            self._blocked_s += seconds
            self._busy_s += seconds if idle else 0.0

    def read(self) -> tuple[float, float]:
        """Return the blocked seconds and the hidden share of the rewards' time, and start anew.

        The share is 1 for rewards that took no time.
        """
        with self._lock:
            now = time.monotonic()
            busy = self._busy_s + (now - self._since if self._under_way else 0.0)
            blocked = self._blocked_s
            self._busy_s = self._blocked_s = 0.0
            self._since = now
        return blocked, max(0.0, 1 - blocked / busy) if busy > 0 else 1.0

    def _end(self, _future: Future[Any]) -> None:
        with self._lock:
            self._under_way -= 1
            if self._under_way == 0:
                self._busy_s += time.monotonic() - self._since

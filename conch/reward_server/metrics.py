"""What a reward server measures, for Prometheus; docs/reward_server.md explains each name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from conch.types import RewardResult

PROCESSES_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Variable with the folder in which several processes of a server keep their figures; it must be set before
prometheus_client is imported."""

REFUSED = "refused"
"""In place of a form's name."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Seconds: from a function that is quick to the deadline.
_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)


disable_created_metrics()  # a second series for each, of when it began


class Meter:
    """Counts requests and samples.

    Names of forms and statuses are few and ours: nothing that a client sends becomes a label.
    """

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._requests = Counter(
            "conch_reward_requests", "Requests answered", ("form", "code"), registry=registry
        )
        self._samples = Counter(
            "conch_reward_samples", "Samples by what became of them", ("reward", "status"), registry=registry
        )
        self._seconds = Histogram(
            "conch_reward_request_seconds",
            "Seconds from a request's whole body to its answer",
            ("form",),
            buckets=_BUCKETS,
            registry=registry,
        )
        self._waiting = Gauge(
            "conch_reward_waiting",
            "Samples under way",
            ("reward",),
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._ready = Gauge(
            "conch_reward_ready",
            "1 where the reward answers",
            ("reward",),
            registry=registry,
            multiprocess_mode="livemin",
        )
        self._registry = registry
        self._looks: list[Callable[[], None]] = []

    def watch(self, reward: str, waiting: Callable[[], int], is_ready: Callable[[], bool]) -> None:
        """Look at these whenever somebody asks for the figures."""

        def look() -> None:
            self._waiting.labels(reward).set(waiting())
            self._ready.labels(reward).set(is_ready())

        self._looks.append(look)

    def count(self, form: str, code: int, seconds: float) -> None:
        """Count an answer. code: of HTTP."""
        self._requests.labels(form, str(code)).inc()
        self._seconds.labels(form).observe(seconds)

    def count_refused(self, code: int) -> None:
        """Count a request that was not let in, so that nobody knows its form. code: of HTTP."""
        self._requests.labels(REFUSED, str(code)).inc()

    def count_samples(self, reward: str, results: Sequence[RewardResult]) -> None:
        """Count what became of samples."""
        for result in results:
            self._samples.labels(reward, result.status.value).inc()

    def text(self) -> bytes:
        """All figures, of all processes of this server, in the text format of Prometheus."""
        for look in self._looks:
            look()
        if PROCESSES_FOLDER not in os.environ:
            return generate_latest(self._registry)
        whole = CollectorRegistry()
        MultiProcessCollector(whole)
        return generate_latest(whole)

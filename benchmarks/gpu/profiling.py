"""Where a phase's time goes: seconds, the share of it in which nothing ran, and what ran longest.

On a GPU what runs are kernels, copies and fills, as CUPTI saw them; nothing of the host is recorded, so that
the profiler slows the host little. On a CPU they are torch's operators, those that no other one has called.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile

_TOP = 6


class Span(NamedTuple):
    """Something that ran, from one nanosecond to another."""

    name: str
    start: int
    end: int


def busy_ns(spans: Iterable[Span]) -> int:
    """Nanoseconds in which at least one of them ran."""
    total, until = 0, 0
    for span in sorted(spans, key=lambda each: each.start):
        start = max(span.start, until)
        if span.end > start:
            total += span.end - start
            until = span.end
    return total


def outermost(spans: Iterable[Span]) -> list[Span]:
    """Those that began while none of the others ran: of calls inside calls, the outer ones."""
    kept: list[Span] = []
    for span in sorted(spans, key=lambda each: (each.start, -each.end)):
        if not kept or span.start >= kept[-1].end:
            kept.append(span)
    return kept


def longest(spans: Iterable[Span], seconds: float, count: int = _TOP) -> list[dict[str, Any]]:
    """Names that took most of `seconds` in all, with their calls."""
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for span in spans:
        totals[span.name][0] += span.end - span.start
        totals[span.name][1] += 1
    ranked = sorted(totals.items(), key=lambda item: -item[1][0])[:count]
    return [
        {"name": name, "seconds": ns / 1e9, "share": ns / 1e9 / seconds, "calls": calls}
        for name, (ns, calls) in ranked
    ]


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device != "cpu":
        torch.cuda.synchronize()


class Recorder:
    """Records what runs between `start` and `stop`, which code calls that cannot stand in a `with`.

    figures: of the phase, once it has ended.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._on_gpu = device != "cpu"
        activity = ProfilerActivity.CUDA if self._on_gpu else ProfilerActivity.CPU
        self._profile = profile(activities=[activity])
        self._began = 0.0
        self.figures: dict[str, Any] = {}

    def start(self) -> None:
        """Begin; earlier work of the GPU is waited for."""
        synchronize(self._device)
        self._profile.__enter__()
        synchronize(self._device)
        self._began = time.perf_counter()

    def stop(self) -> None:
        """End, once the GPU has done what it was given."""
        synchronize(self._device)
        seconds = time.perf_counter() - self._began
        self._profile.__exit__(None, None, None)
        self.figures = figures_of(self._spans(), seconds)

    def _spans(self) -> list[Span]:
        assert self._profile.profiler is not None
        # The raw events: torch's own digest of them takes longer than the phases where there are many.
        events = self._profile.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
        kind = DeviceType.CUDA if self._on_gpu else DeviceType.CPU
        spans = [
            Span(event.name(), event.start_ns(), event.end_ns())
            for event in events
            if event.device_type() == kind and not event.is_user_annotation()
        ]
        return spans if self._on_gpu else outermost(spans)


def figures_of(spans: Sequence[Span], seconds: float) -> dict[str, Any]:
    """Of one phase that took `seconds`."""
    busy = busy_ns(spans) / 1e9
    return {
        "seconds": seconds,
        "busy_s": busy,
        "idle_share": _idle_share(busy, seconds, len(spans)),
        "launches": len(spans),
        "top": longest(spans, seconds),
    }


def _idle_share(busy: float, seconds: float, launches: int) -> float | None:
    # Where nothing at all was seen, the profiler may not work here: that is no idle GPU.
    return max(0.0, 1 - busy / seconds) if launches else None


def profiled(phases: Mapping[str, Callable[[], None]], device: str) -> dict[str, dict[str, Any]]:
    """Run phases in their order, each recorded by itself."""
    found: dict[str, dict[str, Any]] = {}
    for name, run in phases.items():
        recorder = Recorder(device)
        recorder.start()
        run()
        recorder.stop()
        found[name] = recorder.figures
    return found


def whole(phases: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Seconds, busy seconds and idle share of all phases together; no share where nothing was seen."""
    seconds = sum(each["seconds"] for each in phases.values())
    busy = sum(each["busy_s"] for each in phases.values())
    launches = sum(each["launches"] for each in phases.values())
    return {"seconds": seconds, "busy_s": busy, "idle_share": _idle_share(busy, seconds, launches)}

"""What a service tells those who listen: metrics of updates and changes of state, the latest of them."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

_KEPT = 1000


@dataclass(frozen=True, slots=True)
class ServiceEvent:
    """One thing to tell.

    number: counts from 1, within one process of the service.
    kind: `metrics` or `state`.
    data: JSON values.
    """

    number: int
    kind: str
    data: dict[str, Any]


class EventLog:
    """The latest events, for any number of listeners and from any thread."""

    def __init__(self) -> None:
        self._events: deque[ServiceEvent] = deque(maxlen=_KEPT)
        self._lock = threading.Lock()
        self._last = 0

    @property
    def last(self) -> int:
        """Number of the latest event."""
        return self._last

    def add(self, kind: str, data: dict[str, Any]) -> None:
        """Add an event."""
        with self._lock:
            self._last += 1
            self._events.append(ServiceEvent(self._last, kind, data))

    def after(self, number: int) -> list[ServiceEvent]:
        """Events with larger numbers that are still kept, in order."""
        with self._lock:
            return [event for event in self._events if event.number > number]

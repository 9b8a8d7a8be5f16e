"""What the parts of one client count together; `Traffic` is its snapshot."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counts:
    """As in `Traffic`."""

    requests: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    deduplicated: int = 0
    replica_faults: int = 0

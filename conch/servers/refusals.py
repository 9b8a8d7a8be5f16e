"""What the answers of our servers share where they refuse."""

from __future__ import annotations

import math


def retry_after(seconds: float) -> str:
    """The value of a Retry-After header (RFC 9110, section 10.2.3): whole seconds, rounded up, at least 1,
    since a client that is told 0 comes back at once."""
    return str(max(1, math.ceil(seconds)))

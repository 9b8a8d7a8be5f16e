"""What the answers of our servers share where they refuse."""

from __future__ import annotations

import math
from typing import Any

_REFUSALS = {
    400: "What the server can never do, or cannot read.",
    401: "No secret, or another than the server's.",
    408: "The request did not come in within its time.",
    409: "The server does not hold these weights.",
    413: "The request is larger than the server's `max_request_mb`.",
    503: "The server has failed, or stops; another one may help.",
}


def documented_refusals(*more: int) -> dict[int | str, dict[str, Any]]:
    """Return the refusals of an address that `conch.servers.listening` guards, as FastAPI documents them.

    more: statuses that are its own, beside those of the port.
    """
    return {status: {"description": _REFUSALS[status]} for status in sorted({401, 408, 413, *more})}


def retry_after(seconds: float) -> str:
    """The value of a Retry-After header (RFC 9110, section 10.2.3): whole seconds, rounded up, at least 1,
    since a client that is told 0 comes back at once."""
    return str(max(1, math.ceil(seconds)))

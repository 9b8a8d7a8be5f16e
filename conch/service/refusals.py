"""What a client is refused with: a status of HTTP and a sentence."""

from __future__ import annotations

from conch.errors import ServiceError

BAD_REQUEST, NOT_FOUND, CONFLICT, GONE, UNPROCESSABLE = 400, 404, 409, 410, 422
BUSY, INTERNAL, UNAVAILABLE = 429, 500, 503


class RefusedError(ServiceError):
    """A request that is not done, and changes nothing.

    status: of HTTP.
    retry_after_s: when to ask again, in seconds; None where that does not help.
    """

    def __init__(self, status: int, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.retry_after_s = retry_after_s

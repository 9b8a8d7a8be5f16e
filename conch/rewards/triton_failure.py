"""What a failed call to a Triton server means: whether asking again helps, and what becomes of the samples.

gRPC's status codes alone do not tell: UNAVAILABLE covers a server that restarts, a wrong host name and a
refused certificate; INTERNAL covers one bad row and a model process that died.
"""

from __future__ import annotations

from tritonclient.utils import InferenceServerException

from conch.rewards.replica import Failure
from conch.serving.triton_channel import is_lasting
from conch.types import RewardStatus

_MESSAGE_LIMIT = 300
_NO_SUCH_HOST = ("errors resolving", "dns resolution failed", "name resolution")
# A model that raises fails its whole request with INTERNAL; one that refuses a row, with INVALID_ARGUMENT.
# A request that is too large for the server may fit in halves.
_MAYBE_ONE_ROW = ("INTERNAL", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED")
_TURNED_AWAY = ("UNAUTHENTICATED", "PERMISSION_DENIED")
_PASSING = ("UNAVAILABLE", "ABORTED", "CANCELLED")
# What gRPC says of a connection that broke in mid-reply, under whatever code.
_BROKEN_CONNECTION = ("rst_stream", "stream removed", "socket closed", "connection reset", "goaway")
_NOBODY_THERE = ("failed to connect", "connection refused", "no route to host", "network is unreachable")
_DEAD_MODEL_PROCESS = ("stub process", "is not healthy")


def classify(error: InferenceServerException) -> Failure:
    """The meaning of what tritonclient raised."""
    code = _code(error)
    message = _first_line(error.message() or "no message")
    lowered = message.lower()
    detail = f"{message} [{code}]"
    if code == "DEADLINE_EXCEEDED":
        return Failure(RewardStatus.TIMEOUT, "no reply in time", retryable=True)
    if code == "NOT_FOUND":  # a model that is being reloaded comes back, so waiting for it makes sense
        return Failure(RewardStatus.UNAVAILABLE, detail, is_down=True)
    if code in _TURNED_AWAY or (code == "UNAVAILABLE" and (is_unknown_host(error) or is_lasting(error))):
        return Failure(RewardStatus.UNAVAILABLE, detail, is_down=True)
    if code in _PASSING or any(text in lowered for text in _BROKEN_CONNECTION):
        is_down = any(text in lowered for text in _NOBODY_THERE)
        return Failure(RewardStatus.UNAVAILABLE, detail, retryable=True, is_down=is_down)
    if code == "INTERNAL" and all(text in lowered for text in _DEAD_MODEL_PROCESS):
        return Failure(RewardStatus.UNAVAILABLE, detail, retryable=True, is_down=True)
    return Failure(
        RewardStatus.INVALID,
        detail,
        maybe_one_row=code in _MAYBE_ONE_ROW,
        elsewhere=code != "INVALID_ARGUMENT",
    )


def is_unknown_host(error: InferenceServerException) -> bool:
    """Whether the host's name could not be resolved."""
    lowered = (error.message() or "").lower()
    return _code(error) == "UNAVAILABLE" and any(text in lowered for text in _NO_SUCH_HOST)


def _code(error: InferenceServerException) -> str:
    return (error.status() or "client").removeprefix("StatusCode.")


def _first_line(message: str) -> str:
    return message.strip().split("\n", 1)[0][:_MESSAGE_LIMIT]

"""What a failed call to a Triton server means: whether asking again helps, and what becomes of the samples.

gRPC's status codes alone do not tell: UNAVAILABLE covers a server that restarts, a wrong host name and a
refused certificate; INTERNAL covers one bad row and a model process that died.
"""

from __future__ import annotations

from dataclasses import dataclass

from tritonclient.utils import InferenceServerException

from conch.serving.triton_channel import is_lasting
from conch.types import RewardStatus

_MESSAGE_LIMIT = 300
_NO_SUCH_HOST = ("errors resolving", "dns resolution failed", "name resolution")
# A model that raises fails its whole request with INTERNAL; one that refuses a row, with INVALID_ARGUMENT.
_MAYBE_ONE_ROW = ("INTERNAL", "INVALID_ARGUMENT")
_DEAD_MODEL_PROCESS = ("stub process", "is not healthy")


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed call.

    status: what a sample's result says if this is the last word.
    retryable: the same request may well succeed later.
    maybe_one_row: one bad row may have failed the batch, so each row deserves to be asked alone.
    no_such_host: the host's name could not be resolved.
    detail: for a person.
    """

    status: RewardStatus
    detail: str
    retryable: bool = False
    maybe_one_row: bool = False
    no_such_host: bool = False


def classify(error: InferenceServerException) -> Failure:
    """The meaning of what tritonclient raised."""
    code = (error.status() or "client").removeprefix("StatusCode.")
    message = _first_line(error.message() or "no message")
    lowered = message.lower()
    detail = f"{message} [{code}]"
    if code == "UNAVAILABLE":
        no_such_host = any(text in lowered for text in _NO_SUCH_HOST)
        retryable = not (no_such_host or is_lasting(error))
        return Failure(RewardStatus.UNAVAILABLE, detail, retryable=retryable, no_such_host=no_such_host)
    if code == "DEADLINE_EXCEEDED":
        return Failure(RewardStatus.TIMEOUT, "no reply in time", retryable=True)
    if code == "NOT_FOUND":  # a model that is being reloaded comes back, so waiting for it makes sense
        return Failure(RewardStatus.UNAVAILABLE, detail)
    if code == "INTERNAL" and all(text in lowered for text in _DEAD_MODEL_PROCESS):
        return Failure(RewardStatus.UNAVAILABLE, detail, retryable=True)
    return Failure(RewardStatus.INVALID, detail, maybe_one_row=code in _MAYBE_ONE_ROW)


def _first_line(message: str) -> str:
    return message.strip().split("\n", 1)[0][:_MESSAGE_LIMIT]

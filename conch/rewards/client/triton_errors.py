"""Meaning of a failed call to a Triton server: whether a retry helps, and the samples' status.

gRPC's status codes alone do not tell: UNAVAILABLE covers a server that restarts, a wrong host name and a
refused certificate; INTERNAL covers one bad row and a model process that died.

Checks of a Triton server before long work starts, each with its own clear error.
"""

from __future__ import annotations

import difflib
from typing import Any

from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from conch.addresses import Endpoint
from conch.errors import RewardError, RewardUnavailableError, first_line
from conch.rewards.client.transport import Failure
from conch.triton.channel import Access, explain_refusal, is_lasting, is_plain_hangup
from conch.types import RewardStatus

_MESSAGE_LIMIT = 300
_NO_SUCH_HOST = ("errors resolving", "dns resolution failed", "name resolution")
# A model that raises fails its whole request with INTERNAL; one that refuses a row, with INVALID_ARGUMENT.
# A request that is too large for the server may fit in halves.
_MAYBE_ONE_ROW = ("INTERNAL", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED")
_ACCESS_DENIED = ("UNAUTHENTICATED", "PERMISSION_DENIED")
_TRANSIENT = ("UNAVAILABLE", "ABORTED", "CANCELLED")
# What gRPC says of a connection that broke in mid-reply, under whatever code.
_BROKEN_CONNECTION = ("rst_stream", "stream removed", "socket closed", "connection reset", "goaway")
_NOTHING_LISTENS = ("failed to connect", "connection refused", "no route to host", "network is unreachable")
_DEAD_MODEL_PROCESS = ("stub process", "is not healthy")


def classify(error: InferenceServerException) -> Failure:
    """Return the failure that an error of tritonclient stands for."""
    code = _code(error)
    message = first_line(error.message() or "no message")[:_MESSAGE_LIMIT]
    lowered = message.lower()
    detail = f"{message} [{code}]"
    if code == "DEADLINE_EXCEEDED":
        return Failure(RewardStatus.TIMEOUT, "no reply in time", retryable=True)
    if code == "NOT_FOUND":  # a model that is being reloaded comes back, so waiting for it makes sense
        return Failure(RewardStatus.UNAVAILABLE, detail, is_down=True)
    if code in _ACCESS_DENIED or (code == "UNAVAILABLE" and (is_unknown_host(error) or is_lasting(error))):
        return Failure(RewardStatus.UNAVAILABLE, detail, is_down=True)
    if code in _TRANSIENT or any(text in lowered for text in _BROKEN_CONNECTION):
        is_down = any(text in lowered for text in _NOTHING_LISTENS)
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


async def require_server(
    client: InferenceServerClient, endpoint: Endpoint, timeout_s: float, access: Access
) -> None:
    """Raise RewardUnavailableError unless a Triton server answers at the address."""
    try:
        await client.is_server_live(client_timeout=timeout_s)
    except InferenceServerException as error:
        raise _no_server(error, endpoint, timeout_s, access) from error


async def require_model(
    client: InferenceServerClient, endpoint: Endpoint, timeout_s: float, access: Access
) -> None:
    """Raise RewardUnavailableError unless the server has the model and says it is ready."""
    try:
        if await client.is_model_ready(endpoint.model, client_timeout=timeout_s):
            return
    except InferenceServerException as error:
        if error.status() != "StatusCode.NOT_FOUND":
            raise _no_server(error, endpoint, timeout_s, access) from error
    raise RewardUnavailableError(await _not_ready_reason(client, endpoint, timeout_s))


def _no_server(
    error: InferenceServerException, endpoint: Endpoint, timeout_s: float, access: Access
) -> RewardError:
    failure = classify(error)
    lowered = failure.detail.lower()
    if is_unknown_host(error):
        return RewardUnavailableError(
            f"cannot resolve the host name `{endpoint.host}` of reward `{endpoint}`"
        )
    if "connection refused" in lowered:
        return RewardUnavailableError(
            f"nothing listens at {endpoint.address} (reward `{endpoint}`): start it or fix the address"
        )
    # In plain text a hang-up has many reasons, told below; with TLS, or where Triton says so, it has one.
    refusal = explain_refusal(error, access)
    if refusal is not None and not is_plain_hangup(error, access):
        return RewardUnavailableError(f"{endpoint.address} turns reward `{endpoint}` away: {refusal}")
    if failure.status is RewardStatus.TIMEOUT:
        return RewardUnavailableError(
            f"{endpoint.address} did not answer within {timeout_s:g} s (reward `{endpoint}`)"
        )
    if not failure.status.is_infrastructure or "socket closed" in lowered or "http/2" in lowered:
        return RewardUnavailableError(
            f"what listens at {endpoint.address} does not speak Triton's gRPC, whose usual port is 8001 "
            f"(8000 is its HTTP port), or it speaks TLS (give reward.auth.tls.ca): {failure.detail}"
        )
    return RewardUnavailableError(f"the server at {endpoint.address} cannot be used: {failure.detail}")


async def _not_ready_reason(client: InferenceServerClient, endpoint: Endpoint, timeout_s: float) -> str:
    subject = f"model `{endpoint.model}`"
    try:
        index: Any = await client.get_model_repository_index(client_timeout=timeout_s)
    except InferenceServerException:  # servers may keep their list of models to themselves, ours do
        return await _not_loaded_reason(client, endpoint, timeout_s)
    models = list(index.models)
    states = [(model.state, model.reason) for model in models if model.name == endpoint.model]
    if not states:
        names = ", ".join(sorted({model.name for model in models})) or "no model at all"
        return f"{subject} is not in the server at {endpoint.address}; there is: {names}"
    state, reason = states[-1]
    if not state:
        return f"{subject} is in the store of the server at {endpoint.address} but not loaded: load it first"
    return f"{subject} is not ready at {endpoint.address}: {state}{f', {reason}' if reason else ''}"


async def _not_loaded_reason(client: InferenceServerClient, endpoint: Endpoint, timeout_s: float) -> str:
    """Where the list of the store is closed: the statistics name what is loaded."""
    subject = f"model `{endpoint.model}`"
    try:
        statistics: Any = await client.get_inference_statistics(client_timeout=timeout_s)
    except InferenceServerException:
        return (
            f"{subject} is not ready at {endpoint.address}, or not there; the server does not list its "
            "models: ask who runs it, or on its machine `conch serve status`"
        )
    names = sorted({model.name for model in statistics.model_stats} - {endpoint.model})
    if not names:
        return f"{subject} is not ready at {endpoint.address}, or not there; no other model is loaded"
    near = difflib.get_close_matches(endpoint.model, names, n=1)
    hint = f"; did you mean {endpoint.address}/{near[0]}?" if near else ""
    return f"{subject} is not loaded at {endpoint.address}; there is: {', '.join(names)}{hint}"

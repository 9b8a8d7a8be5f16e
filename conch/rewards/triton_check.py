"""The questions that are asked of a Triton server before long work starts, each with its own clear error."""

from __future__ import annotations

from typing import Any

from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from conch.errors import RewardError, RewardUnavailableError
from conch.rewards.endpoint import Endpoint
from conch.rewards.triton_failure import classify, is_unknown_host
from conch.serving.triton_channel import Access, explain_refusal, is_plain_hangup
from conch.types import RewardStatus


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
    raise RewardUnavailableError(await _why_not_ready(client, endpoint, timeout_s))


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
            f"(8000 is its HTTP port), or it speaks TLS (give reward.tls.ca): {failure.detail}"
        )
    return RewardUnavailableError(f"the server at {endpoint.address} cannot be used: {failure.detail}")


async def _why_not_ready(client: InferenceServerClient, endpoint: Endpoint, timeout_s: float) -> str:
    subject = f"model `{endpoint.model}`"
    try:
        index: Any = await client.get_model_repository_index(client_timeout=timeout_s)
    except InferenceServerException:  # servers may keep their list of models to themselves
        return (
            f"{subject} is not ready at {endpoint.address}, or not there; the server does not list its models"
        )
    models = list(index.models)
    states = [(model.state, model.reason) for model in models if model.name == endpoint.model]
    if not states:
        there = ", ".join(sorted({model.name for model in models})) or "no model at all"
        return f"{subject} is not in the server at {endpoint.address}; there is: {there}"
    state, reason = states[-1]
    if not state:
        return f"{subject} is in the store of the server at {endpoint.address} but not loaded: load it first"
    return f"{subject} is not ready at {endpoint.address}: {state}{f', {reason}' if reason else ''}"

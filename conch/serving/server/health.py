"""Readiness: golden samples score right. Triton's own flags stay green when a model's process is dead."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from conch.errors import ServerStartError, ServingError, first_line
from conch.store.manifest import GoldenSample
from conch.store.store import StoredModel
from conch.triton.channel import Access, explain_refusal, is_lasting, open_client
from conch.triton.client import read_steps, request_inputs
from conch.triton.contract import OUTPUT

_POLL_S = 0.05
_CALL_TIMEOUT_S = 2.0
_SCORE_TIMEOUT_S = 60.0
# Extensions of every release of Triton's protocol version 2 since the first that was tested.
_NEEDED_EXTENSIONS = {"model_configuration", "statistics"}


def wait_until_ready(
    url: str,
    models: Sequence[StoredModel],
    access: Access,
    *,
    is_alive: Callable[[], bool],
    deadline: float,
) -> None:
    """Return once the server is up and every model scores its golden samples right.

    is_alive: whether the server's process runs.
    deadline: seconds on the clock of `time.monotonic`.

    Raises:
        ServerStartError: the server died, was not ready in time, refuses us, is of another kind, or a score
            is wrong.
    """
    with open_client(url, access) as client:
        while problem := _startup_problem(client, models, access):
            if not is_alive():
                raise ServerStartError("tritonserver died before it was ready")
            if time.monotonic() > deadline:
                raise ServerStartError(
                    f"the server at {url} was not ready in time ({problem}); give it longer, or see its log"
                )
            time.sleep(_POLL_S)
        check_version(client)
        for model in models:
            check_golden(client, model)


def check_version(client: triton.InferenceServerClient) -> None:
    """Raise ServerStartError unless the server speaks the protocol that we do."""
    try:
        metadata: Any = client.get_server_metadata(client_timeout=_SCORE_TIMEOUT_S)
    except InferenceServerException as error:
        raise ServerStartError(f"the server does not say what it is: {error.message()}") from error
    missing = sorted(_NEEDED_EXTENSIONS - set(metadata.extensions))
    if metadata.name != "triton" or not metadata.version.startswith("2.") or missing:
        lacks = f", without {', '.join(missing)}" if missing else ""
        name, version = metadata.name or "nameless", metadata.version or "of unknown version"
        raise ServerStartError(
            f"the server is {name} {version}{lacks}; "
            "Conch needs Triton 2.x with its statistics and model configuration extensions (2.51 was tested)"
        )


def check_golden(
    client: triton.InferenceServerClient,
    model: StoredModel,
    *,
    samples: int | None = None,
    served_name: str | None = None,
) -> None:
    """Score the golden samples, or the first `samples` of them, through the server.

    served_name: name of the model in the server; None takes its own.

    Raises:
        ServerStartError: a score differs by more than the tolerance, there is none, or another version than
            that of `model` answers.
    """
    golden = model.golden
    for number, sample in enumerate(golden.samples[:samples]):
        try:
            inputs = request_inputs(sample.request(), model.spec)
            reply = client.infer(served_name or model.name, inputs, client_timeout=_SCORE_TIMEOUT_S)
        except InferenceServerException as error:
            raise ServerStartError(
                f"model {model.name}: golden sample {number} got no score: {error}"
            ) from error
        version = reply.get_response().model_version if reply is not None else ""  # pyright: ignore
        if version != str(model.version):
            raise ServerStartError(
                f"model {model.name}: version {version} answers, the store's latest is {model.version}; "
                "have the server load it: conch serve swap"
            )
        scores = reply.as_numpy(OUTPUT) if reply is not None else None
        expected = np.array([sample.scores])
        if scores is None or scores.shape != expected.shape:
            raise ServerStartError(f"model {model.name}: golden sample {number} got a reply of another shape")
        error = np.abs(scores - expected) / np.maximum(1.0, np.abs(expected))
        if not (error <= golden.tolerance).all():  # written so that NaN fails
            raise ServerStartError(
                f"model {model.name} version {model.version} is not ready: golden sample {number} scores "
                f"{scores[0].tolist()}, expected {list(sample.scores)} within {golden.tolerance:g}; "
                "the libraries or the weights are not those of the conversion: convert the model again"
            )
        if sample.step_scores is not None and not step_error(reply, sample) <= golden.tolerance:
            raise ServerStartError(
                f"model {model.name} version {model.version} is not ready: golden sample {number} scores its "
                "steps otherwise than the original does: convert the model again"
            )


def _startup_problem(
    client: triton.InferenceServerClient, models: Sequence[StoredModel], access: Access
) -> str:
    """Return why the server is not up yet, or "".

    Raises:
        ServerStartError: it refuses this client for good.
    """
    try:
        if not client.is_server_ready(client_timeout=_CALL_TIMEOUT_S):
            return "it says that it is not ready"
        for model in models:
            if not client.is_model_ready(model.name, client_timeout=_CALL_TIMEOUT_S):
                return f"model {model.name} is not loaded"
    except InferenceServerException as error:
        why = explain_refusal(error, access) or first_line(error.message() or "")
        if is_lasting(error):
            raise ServerStartError(why) from error
        return why
    return ""


def step_error(reply: Any, sample: GoldenSample) -> float:
    """Return the largest difference of a step's score from the golden sample's, divided by max(1, |score|).

    Infinity where steps are missing or end elsewhere.
    """
    assert sample.step_scores is not None and sample.step_ends is not None
    try:
        (ends,), (scores,) = read_steps(reply, "the model", 1)
    except ServingError:
        return np.inf
    if ends != list(sample.step_ends):
        return np.inf
    expected = np.array(sample.step_scores)
    return float((np.abs(scores - expected) / np.maximum(1.0, np.abs(expected))).max())

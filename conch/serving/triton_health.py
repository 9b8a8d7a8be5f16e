"""Ready means: golden samples score right. Triton's own flags stay green when a model's process is dead."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from conch.errors import ServerStartError
from conch.serving.spec import MASK_INPUT, OUTPUT, TEXT_INPUT, TOKEN_INPUT
from conch.serving.store import StoredModel

_POLL_S = 0.05
_CALL_TIMEOUT_S = 2.0
_SCORE_TIMEOUT_S = 60.0
# Without these a channel that was refused once waits seconds before it tries again, and may ask a web proxy.
_CHANNEL = [
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 100),
    ("grpc.enable_http_proxy", 0),
]


def wait_until_ready(
    url: str, models: Sequence[StoredModel], *, is_alive: Callable[[], bool], deadline: float
) -> None:
    """Return once the server is up and every model scores its golden samples right.

    deadline: on the clock of `time.monotonic`.

    Raises:
        ServerStartError: the server died, was not ready in time, or a score is wrong.
    """
    with triton.InferenceServerClient(url, channel_args=_CHANNEL) as client:
        while not _flags_are_up(client, models):
            if not is_alive():
                raise ServerStartError("tritonserver died before it was ready")
            if time.monotonic() > deadline:
                raise ServerStartError("tritonserver was not ready in time; give a longer ready_timeout_s")
            time.sleep(_POLL_S)
        for model in models:
            check_golden(client, model)


def check_golden(client: triton.InferenceServerClient, model: StoredModel) -> None:
    """Score the golden samples through the server.

    Raises:
        ServerStartError: a score differs by more than the tolerance, or there is none.
    """
    golden = model.golden
    for number, sample in enumerate(golden.samples):
        try:
            reply = client.infer(
                model.name, _inputs(sample.text, sample.input_ids), client_timeout=_SCORE_TIMEOUT_S
            )
        except InferenceServerException as error:
            raise ServerStartError(
                f"model {model.name}: golden sample {number} got no score: {error}"
            ) from error
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


def _flags_are_up(client: triton.InferenceServerClient, models: Sequence[StoredModel]) -> bool:
    try:
        return bool(client.is_server_ready(client_timeout=_CALL_TIMEOUT_S)) and all(
            client.is_model_ready(model.name, client_timeout=_CALL_TIMEOUT_S) for model in models
        )
    except InferenceServerException:  # not listening yet
        return False


def _inputs(text: str | None, input_ids: tuple[int, ...] | None) -> list[Any]:
    if text is not None:
        return [_tensor(TEXT_INPUT, "BYTES", np.array([[text.encode("utf-8")]], dtype=np.object_))]
    ids = np.array([input_ids], dtype=np.int64)
    return [_tensor(TOKEN_INPUT, "INT64", ids), _tensor(MASK_INPUT, "INT64", np.ones_like(ids))]


def _tensor(name: str, dtype: str, values: np.ndarray) -> Any:
    tensor = triton.InferInput(name, list(values.shape), dtype)
    tensor.set_data_from_numpy(values)
    return tensor

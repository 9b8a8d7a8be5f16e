"""A blocking client of one served model: one request after the other, refusals as results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from conch.addresses import Endpoint
from conch.errors import ConfigError, ServingError
from conch.log import progress
from conch.triton.channel import Access, open_client
from conch.triton.config_pbtxt import spec_from_model_config
from conch.triton.contract import (
    MASK_INPUT,
    OUTPUT,
    STEP_ENDS,
    STEP_REWARDS,
    TEXT_INPUT,
    TOKEN_INPUT,
    RewardModelSpec,
)

_CONFIG_TIMEOUT_S = 10.0
_SCORE_TIMEOUT_S = 600.0
# An error of this kind is the request's; others are the server's, and raise.
_REFUSED = "StatusCode.INVALID_ARGUMENT"


class ServedModel:
    """One model of a running server, `host:port/model`. Use as a context manager.

    Raises:
        ServingError: the address is of another form.
    """

    def __init__(self, endpoint: str) -> None:
        try:
            parsed = Endpoint.parse(endpoint)
        except ConfigError as error:
            raise ServingError(
                f"{endpoint!r} is no served model: give host:port/model, with the gRPC port"
            ) from error
        self._address, self._model = parsed.address, parsed.model
        self._client = open_client(self._address, Access())

    def __enter__(self) -> ServedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def spec(self) -> RewardModelSpec:
        """Read the model's contract from the server.

        Raises:
            ServingError: it does not answer, does not have the model, or the model gives no rewards.
        """
        try:
            reply: Any = self._client.get_model_config(self._model, client_timeout=_CONFIG_TIMEOUT_S)
        except InferenceServerException as error:
            raise ServingError(
                f"model {self._model!r} cannot be asked at {self._address}: {error.message()}"
            ) from error
        return spec_from_model_config(reply.config)

    def score(self, requests: Sequence[dict[str, Any]], spec: RewardModelSpec) -> list[dict[str, Any]]:
        """Score requests, one after the other.

        requests: {"texts": [...]} or {"input_ids": [[...]], "attention_mask": [[...]]}.

        Returns:
            for each request {"scores": [[...], ...]}, or {"error": "..."} where the server refused it. A
            model that scores steps or tokens adds `step_scores` and `step_ends`, a list for each row.

        Raises:
            ServingError: the server failed, or its reply has another shape than its configuration says.
        """
        return [self._score_one(request, spec) for request in progress(requests, desc="asking the server")]

    def _score_one(self, request: dict[str, Any], spec: RewardModelSpec) -> dict[str, Any]:
        inputs = request_inputs(request, spec)
        try:
            reply = self._client.infer(self._model, inputs, client_timeout=_SCORE_TIMEOUT_S)
        except InferenceServerException as error:
            if error.status() == _REFUSED:
                return {"error": str(error.message())}
            raise ServingError(
                f"{self._model} at {self._address} gave no score: {error.message()}"
            ) from error
        scores = reply.as_numpy(OUTPUT) if reply is not None else None
        expected = (len(next(iter(request.values()))), len(spec.reward_names))
        if scores is None or scores.shape != expected:
            shape = None if scores is None else list(scores.shape)
            raise ServingError(f"{self._model} replied with rewards of shape {shape}, not {list(expected)}")
        result: dict[str, Any] = {"scores": scores.tolist()}
        if spec.is_dense:
            result["step_ends"], result["step_scores"] = read_steps(reply, self._model, expected[0])
        return result


def read_steps(reply: Any, model: str, rows: int) -> tuple[list[list[int]], list[list[float]]]:
    """Return the ends of each row's steps or tokens, and their scores.

    Raises:
        ServingError: the reply lacks one of the two, or they do not fit together.
    """
    ends, scores = reply.as_numpy(STEP_ENDS), reply.as_numpy(STEP_REWARDS)
    if ends is None or scores is None or ends.shape != scores.shape or len(ends) != rows:
        raise ServingError(f"{model} replied with {STEP_ENDS} and {STEP_REWARDS} that do not fit together")
    is_step = ends >= 0
    return (
        [row[mask].tolist() for row, mask in zip(ends, is_step, strict=True)],
        [row[mask].tolist() for row, mask in zip(scores, is_step, strict=True)],
    )


def request_inputs(request: dict[str, Any], spec: RewardModelSpec) -> list[Any]:
    """Return the input tensors of one request, `texts` or `input_ids` and `attention_mask`."""
    if "texts" in request:
        texts = np.array([[text.encode("utf-8")] for text in request["texts"]], dtype=np.object_)
        return [_tensor(TEXT_INPUT, "BYTES", texts)]
    names = [TOKEN_INPUT, MASK_INPUT] if spec.takes_attention_mask else [TOKEN_INPUT]
    dtype = np.int32 if spec.input_dtype == "INT32" else np.int64
    return [_tensor(name, spec.input_dtype, np.array(request[name], dtype=dtype)) for name in names]


def _tensor(name: str, dtype: str, values: np.ndarray) -> Any:
    tensor = triton.InferInput(name, list(values.shape), dtype)
    tensor.set_data_from_numpy(values)
    return tensor

"""KServe's Open Inference Protocol (v2) over HTTP, as Triton's own HTTP port speaks it.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol

    POST /v2/models/NAME/infer
    {"inputs": [{"name": "text", "shape": [n], "datatype": "BYTES", "data": [text, ...]}]}
    -> {"model_name", "outputs": [{"name": "rewards", "shape": [n, 1], "datatype": "FP32", "data": [...]}]}

The names are those of the models that Conch converts (`conch/triton/contract.py`), so what asks Triton's HTTP
port for one of them can ask here. Two inputs, `prompt` and `completion`, tell them apart.
Triton's extension for binary data is read (`tritonclient.http` writes its inputs so); answers are JSON.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from conch.reward_server.forms.base import BAD_REQUEST, Body, Form, Question, Reader, RefusedError, Scores
from conch.triton.contract import OUTPUT, TEXT_INPUT

_ONE, _TWO = {TEXT_INPUT}, {"prompt", "completion"}
_SIZE = struct.Struct("<I")
RAW = "__raw__"
"""Key under which bytes behind the JSON stand, which the extension for binary data sends."""


def _error(status: int, reason: str) -> dict[str, Any]:
    del status
    return {"error": reason}


def _read(body: Body, reader: Reader) -> Question:
    inputs = body["inputs"]
    if not isinstance(inputs, list) or not all(isinstance(each, Mapping) for each in inputs):
        raise RefusedError(BAD_REQUEST, "`inputs` is a list of tensors")
    raw, columns = memoryview(body.get(RAW, b"")), dict[str, list[str]]()
    for tensor in inputs:
        size = _raw_size(tensor)
        columns[str(tensor.get("name"))] = _strings(tensor, raw[:size])
        raw = raw[size:]
    if columns.keys() != _ONE and columns.keys() != _TWO:
        raise RefusedError(
            BAD_REQUEST, f"the inputs are `{TEXT_INPUT}`, or `prompt` and `completion`, not {sorted(columns)}"
        )
    if not isinstance(body.get("id"), str | None):
        raise RefusedError(BAD_REQUEST, "`id` is a text")
    wanted = body.get("outputs") or []
    if not isinstance(wanted, list) or any(
        not isinstance(each, Mapping) or each.get("name") != OUTPUT for each in wanted
    ):
        raise RefusedError(BAD_REQUEST, f"there is one output, `{OUTPUT}`")
    if columns.keys() == _ONE:
        rollouts = [reader.text(text) for text in columns[TEXT_INPUT]]
    else:
        prompts, completions = columns["prompt"], columns["completion"]
        if len(prompts) != len(completions):
            raise RefusedError(BAD_REQUEST, "`prompt` and `completion` have different lengths")
        rollouts = [reader.answered(*pair, {}) for pair in zip(prompts, completions, strict=True)]
    return Question(rollouts, lambda scores: _tell(scores, body.get("id")))


def _raw_size(tensor: Mapping[str, Any]) -> int:
    """How many bytes behind the JSON are a tensor's."""
    parameters = tensor.get("parameters")
    size = parameters.get("binary_data_size", 0) if isinstance(parameters, Mapping) else 0
    if not isinstance(size, int) or size < 0:
        raise RefusedError(BAD_REQUEST, "`binary_data_size` is a number of bytes")
    return size


def _strings(tensor: Mapping[str, Any], raw: memoryview) -> list[str]:
    """The elements of a tensor of strings, whatever its shape is."""
    name, shape = tensor.get("name"), tensor.get("shape")
    if tensor.get("datatype") != "BYTES":
        raise RefusedError(BAD_REQUEST, f"input `{name}` is {tensor.get('datatype')}, texts are BYTES")
    values = _flat(tensor["data"]) if "data" in tensor else _unpacked(name, raw)
    if not all(isinstance(value, str) for value in values):
        raise RefusedError(BAD_REQUEST, f"input `{name}` holds something else than texts")
    ok = isinstance(shape, list) and all(isinstance(size, int) for size in shape)
    if not ok or shape not in ([len(values)], [len(values), 1]):
        raise RefusedError(
            BAD_REQUEST, f"input `{name}` has {len(values)} texts and the shape {shape!r:.40}: [n] or [n, 1]"
        )
    return values


def _flat(data: Any) -> list[Any]:
    if not isinstance(data, Sequence) or isinstance(data, str):
        return [data]
    return [inner for each in data for inner in (each if isinstance(each, list) else [each])]


def _unpacked(name: Any, raw: memoryview) -> list[str]:
    """Strings that each stand behind their length, four bytes little-endian."""
    values: list[str] = []
    try:
        while raw:
            (size,) = _SIZE.unpack(raw[: _SIZE.size])
            text = raw[_SIZE.size : _SIZE.size + size]
            if len(text) != size:
                raise ValueError
            values.append(str(text, "utf-8"))
            raw = raw[_SIZE.size + size :]
    except (struct.error, ValueError):
        raise RefusedError(BAD_REQUEST, f"the binary data of input `{name}` cannot be read") from None
    return values


def _tell(scores: Scores, request_id: Any) -> dict[str, Any]:
    number = len(scores.totals)
    output = {"name": OUTPUT, "shape": [number, 1], "datatype": "FP32", "data": list(scores.totals)}
    told = {"model_name": scores.model, "model_version": "1", "outputs": [output]}
    return told if request_id is None else {**told, "id": request_id}


def metadata(name: str) -> dict[str, Any]:
    """What `GET /v2/models/NAME` tells."""
    return {
        "name": name,
        "versions": ["1"],
        "platform": "conch",
        "inputs": [{"name": TEXT_INPUT, "datatype": "BYTES", "shape": [-1, 1]}],
        "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, 1]}],
    }


KSERVE = Form(
    "kserve",
    '{"inputs": [{"name": "text", "shape": [n], "datatype": "BYTES", "data": [text, ...]}]}',
    frozenset({"inputs"}),
    _read,
    _error,
)

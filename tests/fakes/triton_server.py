"""A gRPC server on a loopback port that speaks Triton's protocol and misbehaves on request.

For failures that the real server cannot produce on demand. The model it "serves" scores each row with a
Python function; `script` holds what to do with the next requests instead, one entry each.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import grpc
import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, triton_to_np_dtype

from conch.triton.config_pbtxt import to_pbtxt
from conch.triton.contract import RewardModelSpec

Row = Any  # str in text form, tuple of the unmasked ids in token form
EXTENSIONS = ["model_repository", "model_configuration", "statistics"]
Action = Callable[[list[Row], grpc.ServicerContext], Any]


def fail(code: grpc.StatusCode, message: str) -> Action:
    """Answer with an error."""

    def act(rows: list[Row], context: grpc.ServicerContext) -> Any:
        context.abort(code, message)

    return act


def reply(scores: Any, *, dtype: str = "FP32", output: str = "rewards") -> Action:
    """Answer with exactly this tensor."""
    array = np.asarray(scores, dtype=triton_to_np_dtype(dtype))

    def act(rows: list[Row], context: grpc.ServicerContext) -> Any:
        return response(array, dtype=dtype, output=output)

    return act


def hang(until: threading.Event, timeout_s: float = 30.0) -> Action:
    """Answer nothing until `until` is set."""

    def act(rows: list[Row], context: grpc.ServicerContext) -> Any:
        until.wait(timeout_s)
        context.abort(grpc.StatusCode.CANCELLED, "hung")

    return act


def response(array: np.ndarray, *, dtype: str = "FP32", output: str = "rewards", version: str = "1") -> Any:
    """A ModelInferResponse with one output."""
    message = service_pb2.ModelInferResponse(model_name="fake", model_version=version)
    message.outputs.add(name=output, datatype=dtype, shape=array.shape)
    message.raw_output_contents.append(array.tobytes())
    return message


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Serves one model called `spec.name` on `port` (0: a free one).

    score: row -> one value per reward name.
    poison: a batch that holds this row fails as a whole, as the python back end does when execute() raises.
    requests: the rows of every ModelInfer, in the order of arrival.
    index: model name -> (state, reason) as the repository index tells it; None refuses to tell.
    config: a ModelConfig message to tell instead of the spec's.
    version: of the model, as replies state it.
    statistics: the model's sums since it was loaded; None is a server that does not tell.
    headers: of the latest request for scores.
    told: name, version and extensions that it says it has; None refuses to tell.
    """

    def __init__(self, spec: RewardModelSpec, score: Callable[[Row], Sequence[float]], port: int = 0) -> None:
        self.spec = spec
        self.score = score
        self.poison: Row | None = None
        self.script: deque[Action] = deque()
        self.requests: list[list[Row]] = []
        self.widths: list[int] = []
        self.ready = True
        self.index: dict[str, tuple[str, str]] | None = {spec.name: ("READY", "")}
        self.config: Any = text_format.Parse(to_pbtxt(spec), model_config_pb2.ModelConfig())
        self.version = "1"
        self.statistics: Any = service_pb2.ModelStatistics(name=spec.name, version="1")
        self.headers: dict[str, str] = {}
        self.told: tuple[str, str, list[str]] | None = ("triton", "2.51.0", EXTENSIONS)
        self.most_in_flight = 0
        self._in_flight = 0
        self._lock = threading.Lock()
        # so_reuseport off: a test that takes a port must be the only one on it.
        self._server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    @property
    def url(self) -> str:
        """What a user gives as the reward."""
        return f"127.0.0.1:{self.port}/{self.spec.name}"

    def stop(self) -> None:
        """Close the port and abort what is under way."""
        self._server.stop(grace=None).wait()

    def __enter__(self) -> FakeTriton:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def ServerLive(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802 - named by the protocol
        return service_pb2.ServerLiveResponse(live=True)

    def ServerReady(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return service_pb2.ServerReadyResponse(ready=self.ready)

    def ServerMetadata(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        if self.told is None:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
            raise AssertionError("abort raises")
        name, version, extensions = self.told
        return service_pb2.ServerMetadataResponse(name=name, version=version, extensions=extensions)

    def ModelReady(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return service_pb2.ModelReadyResponse(ready=self.ready and request.name == self.spec.name)

    def RepositoryIndex(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        if self.index is None:
            context.abort(grpc.StatusCode.UNAVAILABLE, "This protocol is restricted, expecting header 'x'")
            raise AssertionError("abort raises")
        message = service_pb2.RepositoryIndexResponse()
        for name, (state, reason) in self.index.items():
            message.models.add(name=name, state=state, reason=reason)
        return message

    def ModelConfig(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        if request.name != self.spec.name:
            context.abort(
                grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found"
            )
        return service_pb2.ModelConfigResponse(config=self.config)

    def ModelStatistics(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        if self.statistics is None:
            context.abort(grpc.StatusCode.UNAVAILABLE, "This protocol is restricted, expecting header 'x'")
        return service_pb2.ModelStatisticsResponse(model_stats=[self.statistics])

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        rows = self._rows(request)
        with self._lock:
            self.requests.append(rows)
            self.widths.append(request.inputs[0].shape[1])
            self.headers = {key: str(value) for key, value in context.invocation_metadata()}
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            action = self.script.popleft() if self.script else None
        try:
            return self._answer(rows, context) if action is None else action(rows, context)
        finally:
            with self._lock:
                self._in_flight -= 1

    def _answer(self, rows: list[Row], context: grpc.ServicerContext) -> Any:
        if self.poison is not None and self.poison in rows:
            context.abort(
                grpc.StatusCode.INTERNAL,
                "Failed to process the request(s) for model 'fake', message: ValueError: bad\n\nAt:\n  x.py",
            )
        scores = np.array([self.score(row) for row in rows], dtype=np.float32)
        return response(scores, version=self.version)

    def _rows(self, request: Any) -> list[Row]:
        tensors = {
            tensor.name: self._decode(tensor, raw)
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        if self.spec.form == "text":
            return [text.decode() for text in tensors["text"][:, 0]]
        ids = tensors["input_ids"]
        mask = tensors.get("attention_mask", np.ones_like(ids))
        return [tuple(row[kept == 1].tolist()) for row, kept in zip(ids, mask, strict=True)]

    @staticmethod
    def _decode(tensor: Any, raw: bytes) -> np.ndarray:
        if tensor.datatype == "BYTES":
            return deserialize_bytes_tensor(raw).reshape(list(tensor.shape))
        return np.frombuffer(raw, triton_to_np_dtype(tensor.datatype)).reshape(list(tensor.shape))

"""A gRPC relay before a real Triton server that changes what the server answers to ModelInfer.

For faults that bytes cannot express: wrong replies inside sound frames, errors that come fast, every request
with a small chance.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

Alter = Callable[[Any, Any], None]
"""Changes a ModelInferResponse in place; gets the texts that were asked for, too."""


class FaultyRelay(grpc.GenericRpcHandler):
    """Listens on `port`; passes every call to the server at `target`, `host:port`.

    alter: changes the replies to ModelInfer.
    error: code and message that ModelInfer is answered with instead, at once.
    chance: share of ModelInfer requests that `alter` or `error` are applied to, drawn with `seed`.
    requests, harmed: ModelInfer requests so far, and those of them that met the fault.
    """

    def __init__(self, target: str, seed: int = 0) -> None:
        self.alter: Alter | None = None
        self.error: tuple[grpc.StatusCode, str] | None = None
        self.chance = 1.0
        self.requests = 0
        self.harmed = 0
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._channel = grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)])
        self._pool = ThreadPoolExecutor(16)
        self._server = grpc.server(self._pool, options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers([self])
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    @property
    def url(self) -> str:
        """`host:port`, where the server seems to be."""
        return f"127.0.0.1:{self.port}"

    def close(self) -> None:
        """Close the port and abort what is under way."""
        self._server.stop(grace=None).wait()
        self._channel.close()
        self._pool.shutdown()

    def __enter__(self) -> FaultyRelay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """Every method, its messages as bytes."""
        return grpc.unary_unary_rpc_method_handler(partial(self._relay, handler_call_details.method))

    def _relay(self, method: str, request: bytes, context: grpc.ServicerContext) -> bytes:
        harm = method.endswith("/ModelInfer") and self._draw()
        if harm and self.error is not None:
            context.abort(*self.error)
        reply = self._ask(method, request, context)
        if not harm or self.alter is None:
            return reply
        message = service_pb2.ModelInferResponse.FromString(reply)
        self.alter(_texts(service_pb2.ModelInferRequest.FromString(request)), message)
        return message.SerializeToString()

    def _draw(self) -> bool:
        with self._lock:
            self.requests += 1
            harm = self._random.random() < self.chance and (self.alter or self.error) is not None
            self.harmed += harm
            return harm

    def _ask(self, method: str, request: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            return self._channel.unary_unary(method)(request, timeout=context.time_remaining())
        except grpc.RpcError as error:
            context.abort(error.code(), error.details())  # pyright: ignore[reportAttributeAccessIssue]
            raise AssertionError("abort raises") from error


def _texts(request: Any) -> list[str]:
    """The `text` input of a request: BYTES, each with its length in four bytes before it."""
    raw, found, place = request.raw_input_contents[0], [], 0
    while place < len(raw):
        size = int.from_bytes(raw[place : place + 4], "little")
        found.append(raw[place + 4 : place + 4 + size].decode())
        place += 4 + size
    return found

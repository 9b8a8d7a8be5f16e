"""Answers in place of a Ray cluster's control store, on a real socket: it asks for a token, or does not."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc


class _ControlStore(grpc.GenericRpcHandler):
    def __init__(self, token: str) -> None:
        self._token = token

    def service(self, handler_call_details: Any) -> Any:
        shown = dict(handler_call_details.invocation_metadata).get("authorization", "")
        is_known = handler_call_details.method == "/ray.rpc.NodeInfoGcsService/CheckAlive"

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            if self._token and shown != f"Bearer {self._token}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            if not is_known:
                context.abort(grpc.StatusCode.UNIMPLEMENTED, "")
            return b"\n\x00\x12\x062.60.0 \x01"

        return grpc.unary_unary_rpc_method_handler(answer)


@contextmanager
def ray_head(token: str) -> Iterator[str]:
    """`host:port` of a cluster; with an empty `token` it asks for none."""
    server = grpc.server(ThreadPoolExecutor(2), handlers=[_ControlStore(token)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait()

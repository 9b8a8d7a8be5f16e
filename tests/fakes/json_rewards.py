"""An HTTP endpoint that gives rewards as JSON, on a real socket: the score of a sample is its length."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, bytes]
Answer = Callable[[list[str]], Reply]
"""Samples -> status and body."""


def lengths(samples: list[str]) -> Reply:
    """The dialect `query`."""
    return 200, json.dumps({"rewards": [float(len(sample)) for sample in samples], "scores": None}).encode()


def goals(samples: list[str]) -> Reply:
    """The dialect `goals`, with two of them."""
    columns = {"long": [float(len(sample)) for sample in samples], "one": [1.0] * len(samples)}
    return 200, json.dumps(columns).encode()


@dataclass
class Endpoint:
    """A running one. answer: may be exchanged. asked: bodies so far, with their paths and headers."""

    url: str
    answer: Answer
    asked: list[Any] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def endpoint(answer: Answer = lengths, *, tls: ssl.SSLContext | None = None) -> Iterator[Endpoint]:
    """Serve inside the block, on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    scheme = "http" if tls is None else "https"
    running = Endpoint(f"{scheme}://127.0.0.1:{server.server_port}/score", answer)
    server.running = running  # pyright: ignore[reportAttributeAccessIssue]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield running
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Note what is asked, and answer it."""
        running: Endpoint = self.server.running  # pyright: ignore[reportAttributeAccessIssue]
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        running.asked.append(body)
        running.paths.append(self.path)
        running.headers.append({name.lower(): value for name, value in self.headers.items()})
        if isinstance(body, dict) and "query" not in body:
            status, reply = 422, b""
        else:
            status, reply = running.answer(body["query"] if isinstance(body, dict) else body)
        if status == 0:  # break the connection off
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("content-length", str(len(reply)))
        if 300 <= status < 400:
            self.send_header("location", "/elsewhere")
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

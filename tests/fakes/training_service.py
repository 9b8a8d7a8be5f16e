"""A training service on a real port that answers what a test has written down."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any]
LOST: Answer = (0, None)
"""The connection breaks instead of an answer."""


class FakeTrainingService:
    """Answers each request by what comes next for its path.

    answers: by path, in order: status with a JSON value, or with bytes and a header of them; a function makes
        one of the request's JSON value. The last of a path stays.
    port: to listen on; 0 takes a free one.
    asked: paths and JSON values of the requests so far.
    """

    def __init__(self, answers: dict[str, list[Answer | Callable[[Any], Answer]]], port: int = 0) -> None:
        self.asked: list[tuple[str, Any]] = []
        self._answers = {path: [*each] for path, each in answers.items()}
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                fake._answer(self)

            def do_POST(self) -> None:
                fake._answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                del format, args

        self._server = _QuietServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def sent_to(self, path: str) -> list[Any]:
        """JSON values of the requests to a path."""
        return [value for where, value in self.asked if where == path]

    def close(self) -> None:
        """Free the port."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("content-length", 0)))
        value = json.loads(body) if body else {k.lower(): v for k, v in handler.headers.items()}
        self.asked.append((handler.path, value))
        waiting = self._answers[handler.path]
        answer = waiting.pop(0) if len(waiting) > 1 else waiting[0]
        status, content = answer(value) if callable(answer) else answer
        if status == 0:
            handler.close_connection = True
            return
        headers: dict[str, str] = {}
        if isinstance(content, tuple):
            content, headers = content
        sent = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(status)
        for name, text in {"content-length": str(len(sent)), **headers}.items():
            handler.send_header(name, text)
        handler.end_headers()
        handler.wfile.write(sent)
        handler.close_connection |= "content-length" in headers  # a part of what was promised


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that has left before its answer."""
        del request, client_address
        if not isinstance(sys.exc_info()[1], ConnectionError):
            raise


@contextmanager
def fake_service(**answers: Any) -> Iterator[FakeTrainingService]:
    """A service that is gone afterwards; `completions_batch=[...]` answers at `/completions/batch`."""
    fake = FakeTrainingService({"/" + name.replace("_", "/"): each for name, each in answers.items()})
    try:
        yield fake
    finally:
        fake.close()

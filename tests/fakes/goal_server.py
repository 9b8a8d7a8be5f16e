"""A server that measures goals, on a real socket: `length` counts letters, `calls` exclamation marks."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Measure = Callable[[str], float | None]

GOALS: Mapping[str, Measure] = {
    "length": lambda text: float(len(text)),
    "calls": lambda text: float(text.count("!")),
}


@dataclass
class GoalServer:
    """A running one.

    url: of its goal space.
    goals: what it measures.
    forms: that it takes; anything else is a 422.
    lists: whether GET /goals is answered.
    path: of the goal space.
    redirect: where all other paths lead; None answers them.
    busy: so many requests are answered 429 first, with `retry_after`.
    delay_s: of each request.
    die_at: number of the request with which it dies.
    asked: bodies of POST, with the time of each.
    """

    url: str = ""
    goals: Mapping[str, Measure] = field(default_factory=lambda: GOALS)
    forms: Sequence[str] = ("texts", "list")
    lists: bool = True
    path: str = "/goalspace"
    redirect: str | None = None
    busy: int = 0
    retry_after: str | None = "1"
    delay_s: float = 0.0
    die_at: int | None = None
    asked: list[Any] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    dead: threading.Event = field(default_factory=threading.Event)
    server: Any = None

    def texts_of(self, body: Any) -> list[str] | None:
        """What is to be measured; None for a form that it does not take."""
        form = "list" if isinstance(body, list) else "texts"
        if form not in self.forms:
            return None
        return body if isinstance(body, list) else body["texts"]

    def measured(self, texts: Sequence[str]) -> dict[str, list[float | None]]:
        """The reply."""
        return {name: [measure(text) for text in texts] for name, measure in self.goals.items()}

    def die(self) -> None:
        """As a killed process: requests under way get no reply, and nobody listens any more."""
        self.dead.set()
        self.server.socket.close()


@contextmanager
def goal_server(**settings: Any) -> Iterator[GoalServer]:
    """Serve inside the block, on a free port of this machine."""
    running = GoalServer(**settings)
    server = running.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    running.url = f"http://127.0.0.1:{server.server_port}{running.path}"
    server.running = running  # pyright: ignore[reportAttributeAccessIssue]
    thread = threading.Thread(target=_serve, args=(server,))
    thread.start()
    try:
        yield running
    finally:
        running.dead.set()
        thread.join()
        server.server_close()


def _serve(server: ThreadingHTTPServer) -> None:
    running: GoalServer = server.running  # pyright: ignore[reportAttributeAccessIssue]
    server.timeout = 0.02
    while not running.dead.is_set():
        try:
            server.handle_request()
        except (OSError, ValueError):
            return


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        """GET /goals."""
        running: GoalServer = self.server.running
        if running.lists and self.path == "/goals":
            self._reply(200, {"goals": list(running.goals)})
        else:
            self._reply(404, {"detail": "secret text"})

    def do_POST(self) -> None:
        """Measure."""
        running: GoalServer = self.server.running
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if running.redirect is not None and self.path != running.redirect:
            self._reply(307, {}, location=running.redirect)
            return
        with running.lock:
            running.asked.append(body)
            running.times.append(time.monotonic())
            if running.die_at is not None and len(running.asked) >= running.die_at:
                running.die()
            running.busy -= 1
            is_busy = running.busy >= 0
        if is_busy:
            extra = {} if running.retry_after is None else {"retry-after": running.retry_after}
            self._reply(429, {}, **extra)
            return
        if running.delay_s:
            running.dead.wait(running.delay_s)
        if running.dead.is_set():
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        texts = running.texts_of(body)
        if texts is None:
            self._reply(422, {"detail": "secret text"})
        else:
            self._reply(200, running.measured(texts))

    def _reply(self, status: int, content: Any, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

"""Serves a page that follows its runs, on loopback alone: who reaches it reads prompts and completions."""

from __future__ import annotations

import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from conch.addresses import is_loopback
from conch.errors import ConfigError
from conch.log import get_logger
from conch.report.collect import Collector
from conch.report.page import as_json, page

_log = get_logger(__name__)

_REQUEST_S = 10.0
"""Longest time for a request to come in, and for a part of the answer to be taken."""

_REFRESH_S = 1.0
"""Shortest time between two looks at the runs' files."""


class LiveReport:
    """A server of a page and of its data. Run it with `serve`, end it with `close`.

    host, port: to listen on; port 0 takes a free one.

    Raises:
        ConfigError: the host is not loopback, the port is taken, or plotly is not installed.
    """

    def __init__(self, collector: Collector, *, title: str, host: str = "127.0.0.1", port: int = 0) -> None:
        if not is_loopback(host):
            raise ConfigError(
                f"--host {host}: a live report is served on loopback alone, for it asks for no secret; from "
                "another machine take `ssh -L 8900:127.0.0.1:8900 this-machine`"
            )
        self._page = page(None, title=title).encode("utf-8")
        self._collector = collector
        self._lock = threading.Lock()
        self._session = secrets.token_hex(8)
        self._read_at = -_REFRESH_S
        try:
            self._server = _Server((host, port), self)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port} ({error.strerror}): choose another --port"
            ) from error

    @property
    def url(self) -> str:
        """Of the page."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}/"

    def serve(self) -> None:
        """Answer requests until `close` is called."""
        self._server.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        """End `serve`, and close the port."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Status, type and body of the answer to a GET."""
        parts = urlsplit(path)
        if parts.path == "/":
            return 200, "text/html; charset=utf-8", self._page
        if parts.path != "/data":
            return 404, "text/plain; charset=utf-8", b"there is / and /data\n"
        query = parse_qs(parts.query)
        try:
            since, strings = (int(query.get(name, ["0"])[0]) for name in ("since", "strings"))
        except ValueError:
            return 400, "text/plain; charset=utf-8", b"since and strings are numbers\n"
        with self._lock:
            if time.monotonic() - self._read_at >= _REFRESH_S:
                self._collector.refresh(patient=True)
                self._read_at = time.monotonic()
            if query.get("session") != [self._session]:  # a page of an earlier server on this port
                since, strings = 0, 0
            if since == self._collector.version:
                return 204, "application/json", b""
            update = self._collector.update(since=since, known_strings=strings)
            return 200, "application/json", as_json({**update, "session": self._session})


class _Server(ThreadingHTTPServer):
    """Hands requests to a report."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], report: LiveReport) -> None:
        self.report = report
        super().__init__(address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    """A connection."""

    timeout = _REQUEST_S

    def do_GET(self) -> None:
        """Answer, unless the request was made for another host: then a page elsewhere has had the browser ask
        by a name of its own that leads here (DNS rebinding)."""
        host = urlsplit(f"//{self.headers.get('host', '')}").hostname or ""
        if not is_loopback(host):
            status, kind, body = 403, "text/plain; charset=utf-8", b"this page is for this machine\n"
        else:
            assert isinstance(self.server, _Server)
            status, kind, body = self.server.report.answer(self.path)
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        """Tell nothing of the machine."""
        return "conch"

    def log_message(self, format: str, *args: object) -> None:
        """Log requests for those who ask for it."""
        _log.debug(format, *args)


_HEADERS = {
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}

"""uvicorn's connection with a parser in C, for servers that get a request for every sample.

It asks the same of a peer as `HeaderDeadline`: headers in time, and not more of them than fit.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from conch.servers.listening import HeaderTimer

_MAX_HEADER_BYTES = 65_536
"""Most bytes that may come before headers end: as much as one read of a socket brings."""


class QuickHeaderDeadline(HeaderTimer, HttpToolsProtocol):
    """uvicorn's connection, closed where headers do not come in time, or do not end."""

    _header_bytes = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._deadline is None:
            return
        self._header_bytes += len(data)
        if self._header_bytes > _MAX_HEADER_BYTES:
            self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._watch()

    def on_headers_complete(self) -> None:
        self._stop_watching()
        super().on_headers_complete()

    def _watch(self) -> None:
        if self._deadline is None:
            self._header_bytes = 0
            self._start_watching()

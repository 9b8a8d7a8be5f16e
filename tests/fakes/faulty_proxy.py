"""A TCP proxy on a loopback port that harms what passes through it: bytes only, it knows nothing of gRPC.

with FaultyProxy(server.url) as proxy:
    proxy.fault = Fault(delay_s=0.2)      # holds from now on, for open connections too
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from conch.rewards.client.event_loop import LoopThread

_PIECE = 65536
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_LONGEST_S = 30.0


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to the pieces that come from the server; a piece is what one read from its socket gives.

    delay_s: seconds that each piece waits before it goes on.
    drip_bytes: bytes that go on at once, with `delay_s` between them; 0 does not cut a piece up.
    cut_chance: probability that a piece ends in its middle, with a reset of both sides.
    swallow: nothing goes on in either direction, and the connection stays open. What it swallowed is gone, so
        such a connection is dead for good, as one to a machine that vanished is.
    """

    delay_s: float = 0.0
    drip_bytes: int = 0
    cut_chance: float = 0.0
    swallow: bool = False


class FaultyProxy:
    """Listens on `port` and passes everything to and from `target`, `host:port`, which may be changed.

    accepted, cuts: connections taken, and pieces cut, so far.
    seed: of the choice which pieces are cut.
    """

    def __init__(self, target: str, seed: int = 0) -> None:
        self.target = target
        self.fault = Fault()
        self.accepted = 0
        self.cuts = 0
        self.port = 0
        self._random = random.Random(seed)
        self._listener: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._thread = LoopThread("faulty-proxy")
        self._run(self._listen())

    @property
    def url(self) -> str:
        """`host:port`, where the server seems to be."""
        return f"127.0.0.1:{self.port}"

    def refuse(self) -> None:
        """Close the port and reset all connections: what is tried now is refused."""
        self._run(self._refuse())

    def listen(self) -> None:
        """Take connections again, on the same port."""
        self._run(self._listen())

    def reset(self) -> None:
        """Reset all connections; new ones are welcome."""
        self._run(self._reset())

    def close(self) -> None:
        """Close everything and join the thread."""
        self._thread.close(self._refuse)

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._thread.submit(coroutine).result(_LONGEST_S)

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def _refuse(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        await self._reset()

    async def _reset(self) -> None:
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        try:
            await self._serve(reader, writer)
        except asyncio.CancelledError:  # by `reset`; a task of asyncio's server must not end as cancelled
            pass
        finally:
            self._connections.discard(connection)
            _abort(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.fault.swallow:
            await _swallow(reader)
            return
        host, port = self.target.rsplit(":", 1)
        try:
            from_server, to_server = await asyncio.open_connection(host, int(port))
        except OSError:
            return
        pumps = [
            asyncio.ensure_future(pump)
            for pump in (self._upstream(reader, to_server), self._downstream(from_server, writer))
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            _abort(to_server)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _upstream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(_PIECE):
            if self.fault.swallow:
                await _swallow(reader)
                return
            writer.write(piece)
            await writer.drain()

    async def _downstream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(_PIECE):
            if self.fault.swallow:
                await asyncio.Event().wait()  # until `_upstream` sees the client go
            if self.fault.cut_chance and self._random.random() < self.fault.cut_chance:
                self.cuts += 1
                writer.write(piece[: len(piece) // 2])
                await writer.drain()
                return
            await self._pass_on(piece, writer)

    async def _pass_on(self, piece: bytes, writer: asyncio.StreamWriter) -> None:
        while piece:
            fault = self.fault
            if fault.delay_s:
                await asyncio.sleep(fault.delay_s)
            size = fault.drip_bytes or len(piece)
            writer.write(piece[:size])
            await writer.drain()
            piece = piece[size:]


async def _swallow(reader: asyncio.StreamReader) -> None:
    while await reader.read(_PIECE):
        pass


def _abort(writer: asyncio.StreamWriter) -> None:
    """Close with a reset instead of a farewell."""
    with contextlib.suppress(OSError, AttributeError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()

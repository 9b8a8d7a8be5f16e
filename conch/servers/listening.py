"""The port of a server: who is let in, and what a request may bring.

    peer -> TLS -> headers within 10 s -> `Guard`: secret, size and time of the body -> the server's addresses

Every refusal is `{"detail": one sentence}`. docs/security.md lists what guards each port.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import socket
import ssl
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from conch.access.secrets import secret_from
from conch.access.tls import check_server
from conch.errors import ServerStartError
from conch.servers.settings import ListenSettings

BAD_REQUEST, UNAUTHORIZED, TIMEOUT, STALE_WEIGHTS, TOO_LARGE, UNAVAILABLE = 400, 401, 408, 409, 413, 503

_HUNG_UP = object()

_HEADERS_S = 10.0
"""Longest time from a connection, or from the first byte of a further request, to the end of its headers."""

_BODY_S = 60.0
"""Longest time for a request's body to come in."""

_KEEP_ALIVE_S = 5.0
"""Idle time after which a connection is closed."""

_GOODBYE_S = 1.0
"""Longest wait of a server that stops for a peer that is idle."""


class Guard:
    """An ASGI application before another: lets in who knows the secret, with a body of bounded size and time.

    Of a request without the secret nothing but the headers is read.

    secret: "" lets everybody in.
    takes_password: also lets in who sends it as a password (`http://any:SECRET@host`), as clients can that
        have no setting for a header.
    key_header: name of a header that may hold the secret instead, by itself; "" for none.
    max_body_bytes: largest body.
    body_s: longest time for a body to come in, in seconds.
    on_refused: told the status of each request that is not let in.
    """

    def __init__(
        self,
        app: Any,
        secret: str,
        max_body_bytes: int,
        body_s: float = _BODY_S,
        *,
        takes_password: bool = False,
        key_header: str = "",
        on_refused: Callable[[int], object] = lambda _: None,
    ) -> None:
        self._app = app
        self._on_refused = on_refused
        self._takes_password = takes_password
        self._key_header = key_header.lower().encode()
        self._expected = f"Bearer {secret}".encode() if secret else b""
        self._max_body_bytes = max_body_bytes
        self._body_s = body_s

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        reason = self._why_stranger(scope)
        if reason is not None:
            await self._refuse(send, UNAUTHORIZED, reason)
            return
        try:
            body = await asyncio.wait_for(self._read(receive), self._body_s)
        except asyncio.TimeoutError:
            await self._refuse(send, TIMEOUT, f"the request did not come in within {self._body_s:g} s")
            return
        if body is _HUNG_UP:
            return
        if body is None:
            limit = self._max_body_bytes / 1e6
            await self._refuse(
                send,
                TOO_LARGE,
                f"a request is larger than this server's `max_request_mb` = {limit:g}: raise it there",
            )
            return
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return unread.pop() if unread else await receive()

        await self._app(scope, replay, send)

    async def _refuse(self, send: Any, status: int, reason: str) -> None:
        self._on_refused(status)
        await _refuse(send, status, reason)

    def _why_stranger(self, scope: Any) -> str | None:
        """Why the sender of these headers is not let in; None where it is."""
        if not self._expected:
            return None
        tokens = [value for name, value in scope["headers"] if name == b"authorization"]
        keys = [value for name, value in scope["headers"] if name == self._key_header]
        tokens += [b"Bearer " + key for key in keys]
        if not tokens:
            return "the server asks for a secret: name the environment variable that holds it (secret_env)"
        token = _as_bearer(tokens[0]) if self._takes_password else tokens[0]
        # Compared in a time that tells nothing of how much of the secret is right.
        if len(tokens) == 1 and hmac.compare_digest(token, self._expected):
            return None
        return "the server refuses the secret: it was started with another one"

    async def _read(self, receive: Any) -> bytes | object | None:
        """The body; None where it is too large, read to its end so that its sender reads the answer;
        `_HUNG_UP` where the sender left before its end."""
        body, size = bytearray(), 0
        while True:
            message = await receive()
            part = message.get("body", b"")
            size += len(part)
            if size <= self._max_body_bytes:
                body += part
            else:
                body.clear()
            if message["type"] == "http.disconnect":
                return _HUNG_UP
            if not message.get("more_body"):
                return bytes(body) if size <= self._max_body_bytes else None


def _as_bearer(token: bytes) -> bytes:
    """A user's password as if it had been sent as a token; anything else as it is."""
    kind, _, content = token.partition(b" ")
    if kind.lower() != b"basic":
        return token
    try:
        return b"Bearer " + base64.b64decode(content, validate=True).partition(b":")[2]
    except ValueError:
        return b""


async def _refuse(send: Any, status: int, reason: str) -> None:
    """Answer with a reason, and hang up: what the peer still sends is not read."""
    content = json.dumps({"detail": reason}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        (b"connection", b"close"),
    ]
    if status == UNAUTHORIZED:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


class HeaderTimer:
    """Before a protocol of uvicorn's: a connection is closed where headers do not come in time.

    uvicorn itself waits for ever. The protocol says when headers begin and end.
    """

    transport: Any
    loop: asyncio.AbstractEventLoop
    _deadline: asyncio.TimerHandle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)  # pyright: ignore[reportAttributeAccessIssue]  the protocol's
        self._stop_watching()

    def shutdown(self) -> None:
        super().shutdown()  # pyright: ignore[reportAttributeAccessIssue]  the protocol's
        if self.transport.is_closing():  # an idle trainer does not say goodbye, which TLS waits for
            self.loop.call_later(_GOODBYE_S, self.transport.abort)

    def _start_watching(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(_HEADERS_S, self.transport.abort)

    def _stop_watching(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class HeaderDeadline(HeaderTimer, H11Protocol):
    """uvicorn's connection with a parser in Python, closed where headers do not come in time."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_watching()
        else:
            self._start_watching()


def new_app(title: str, **documented: Any) -> FastAPI:
    """An application without addresses; what it cannot read it refuses in words.

    documented: of FastAPI, for one that has a schema and a page about itself; without, it has none.
    """
    hidden = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = FastAPI(title=title, **{**hidden, **documented})

    @app.exception_handler(RequestValidationError)
    async def unreadable(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": _complaint(request, error)}, BAD_REQUEST)

    # FastAPI finds it by its annotations, which it reads from the module.
    del unreadable
    return app


def _complaint(request: Request, error: RequestValidationError) -> str:
    """What is wrong with a body, in a sentence that repeats nothing of what the body holds."""
    problems = error.errors()
    first = problems[0]
    if first["type"] == "json_invalid":
        return f"the body of {request.url.path} is no JSON: {first['ctx']['error']}"
    key = ".".join(str(part) for part in first["loc"][1:]) or "the body"
    others = f" ({len(problems) - 1} more mistakes)" if len(problems) > 1 else ""
    reason = first["msg"].removeprefix("Value error, ")
    return f"the body of {request.url.path} cannot be read: `{key}`: {reason}{others}"


def check_access(settings: ListenSettings) -> None:
    """Check secret and certificates of a server that is to be started.

    Raises:
        ConfigError: the secret's variable is not set.
        ServerStartError: a certificate is unfit.
    """
    secret_from(settings.secret_env)
    tls = settings.tls()
    if tls is not None:
        check_server(tls)


def check_port(settings: ListenSettings) -> None:
    """See that a server can listen where it is to, before it loads what takes long.

    Raises:
        ServerStartError: something else listens there, or the address is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ServerStartError(
            f"`port` = {settings.port} of `host` = {settings.host} cannot be listened on ({error.strerror}): "
            "another server may be there"
        ) from error


def make_listener(
    app: Any,
    settings: ListenSettings,
    *,
    http: type[asyncio.Protocol] = HeaderDeadline,
    takes_password: bool = False,
    key_header: str = "",
    keep_alive_s: float = _KEEP_ALIVE_S,
    grace_s: float | None = None,
    on_refused: Callable[[int], object] = lambda _: None,
) -> uvicorn.Server:
    """What serves `app`, behind a guard, on `settings.host` and `settings.port`, as soon as it is run.

    app: an ASGI application.
    http: of a connection, which must close those whose headers do not come.
    takes_password, key_header, on_refused: see `Guard`.
    keep_alive_s: idle time after which a connection is closed, in seconds.
    grace_s: longest time that a server which stops waits for what is under way; None for ever.

    Raises as `check_access` does.
    """
    check_access(settings)
    tls = settings.tls()
    guarded = Guard(
        app,
        secret_from(settings.secret_env),
        int(settings.max_request_mb * 1e6),
        takes_password=takes_password,
        key_header=key_header,
        on_refused=on_refused,
    )
    mutual = tls is not None and tls.require_client_cert
    return uvicorn.Server(
        uvicorn.Config(
            guarded,
            host=settings.host,
            port=settings.port,
            http=http,
            timeout_keep_alive=keep_alive_s,  # pyright: ignore[reportArgumentType]  (passed to the loop as it is)
            timeout_graceful_shutdown=grace_s,  # pyright: ignore[reportArgumentType]
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ssl_certfile=tls.cert if tls else None,
            ssl_keyfile=tls.key if tls else None,
            ssl_ca_certs=str(tls.ca) if mutual and tls else None,
            ssl_cert_reqs=ssl.CERT_REQUIRED if mutual else ssl.CERT_NONE,
        )
    )

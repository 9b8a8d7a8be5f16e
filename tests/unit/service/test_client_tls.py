"""Where client and service do not agree about TLS that is told at once, and not tried for half an hour."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from conch.errors import ServiceError, ServiceUnavailableError
from conch.service.client import AsyncTrainingClient, TrainingClient
from tests.certificates import Certificates, make_certificates


@contextmanager
def listening(context: ssl.SSLContext | None, body: bytes = b"{}") -> Iterator[int]:
    """A port that answers each request with a body. context: of its TLS; None speaks none."""
    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection, suppress(OSError):
                        wrapped = context.wrap_socket(connection, server_side=True) if context else connection
                        wrapped.recv(65536)
                        wrapped.sendall(head + body)
                        wrapped.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"), "127.0.0.1")


def server_context(certificates: Certificates, *, asks: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.server, certificates.server_key)
    if asks:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(certificates.ca)
    return context


def trusting(certificates: Certificates) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificates.ca))


def asked(url: str, verify: ssl.SSLContext | bool = True, retry_s: float = 60.0) -> str:
    """What the error of a request says that must come long before `retry_s` is over."""
    started = time.monotonic()
    with (
        TrainingClient(url, "key", retry_s=retry_s, verify=verify) as client,
        pytest.raises(ServiceError) as error,
    ):
        client.get_status()
    assert time.monotonic() - started < 30
    return str(error.value)


def test_certificate_that_is_not_trusted_is_told_with_the_remedy(certificates: Certificates) -> None:
    with listening(server_context(certificates)) as port:
        told = asked(f"https://127.0.0.1:{port}")
        assert "certificate is not trusted" in told
        assert "pass `verify=ssl.create_default_context(cafile=" in told
        with TrainingClient(f"https://127.0.0.1:{port}", "key", verify=trusting(certificates)) as client:
            assert client.get_status().state == "none"


def test_asynchronous_client_tells_it_too(certificates: Certificates) -> None:
    async def ask(port: int) -> None:
        async with AsyncTrainingClient(f"https://127.0.0.1:{port}", "key", retry_s=60.0) as client:
            await client.get_status()

    with listening(server_context(certificates)) as port, pytest.raises(ServiceError, match="not trusted"):
        asyncio.run(asyncio.wait_for(ask(port), 30))


def test_service_without_tls_is_told() -> None:
    with listening(None) as port:
        assert "what answers speaks no TLS: write http://" in asked(f"https://127.0.0.1:{port}")


def test_service_that_asks_for_a_certificate_is_told(certificates: Certificates) -> None:
    with listening(server_context(certificates, asks=True)) as port:
        told = asked(f"https://127.0.0.1:{port}", trusting(certificates))
        assert "it turns this client away" in told and "load_cert_chain" in told


def test_service_with_tls_that_is_asked_without_is_hinted_at(certificates: Certificates) -> None:
    with listening(server_context(certificates)) as port:
        assert "if it speaks TLS, write https://" in asked(f"http://127.0.0.1:{port}", retry_s=1.0)


def test_service_that_is_away_is_told_of_once_while_it_is_waited_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    with (
        caplog.at_level(logging.WARNING),
        TrainingClient(url, "key", retry_s=3.5) as client,
        pytest.raises(ServiceUnavailableError),
    ):
        client.get_status()
    [message] = caplog.messages
    assert "Connection refused" in message and "asked again, for up to 3.5 s in all" in message

"""Connections to a Triton server: plain or TLS, with or without a secret. Health, watchdog, status and the
trainers' reward client all open theirs here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
from tritonclient.grpc import InferenceServerClient
from tritonclient.grpc._client import InferenceServerClientBase  # pyright: ignore[reportPrivateImportUsage]
from tritonclient.grpc.aio import InferenceServerClient as AioClient
from tritonclient.utils import InferenceServerException

from conch.access.secrets import secret_from
from conch.access.tls import ClientTls
from conch.config import TlsConfig
from conch.errors import ConfigError
from conch.triton.contract import ADMIN_KEY, SECRET_KEY

# Without these a channel that was refused once waits seconds before it tries again, and may ask a web proxy.
_QUICK = [
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 100),
    ("grpc.enable_http_proxy", 0),
]
_HEADER = "triton-grpc-protocol-"


@dataclass(frozen=True, slots=True)
class Access:
    """Credentials of a client.

    tls: None speaks plain text.
    secret: for all requests; "" where the server asks for none.
    admin_secret: for requests that change the server; "" where the client sends none.
    headers: sent with every request, for a proxy before the server; values may be secrets.
    """

    tls: ClientTls | None = None
    secret: str = field(default="", repr=False)
    admin_secret: str = field(default="", repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


def open_client(address: str, access: Access) -> InferenceServerClient:
    """Return a blocking client; nothing is sent yet.

    Raises:
        ConfigError: a certificate file cannot be read.
    """
    credentials, options = _credentials(access.tls)
    client = InferenceServerClient(address, creds=credentials, channel_args=[*_QUICK, *options])
    _add_headers(client, access)
    return client


def open_aio_client(address: str, access: Access, channel_args: list[tuple[str, int]]) -> AioClient:
    """Return a client for the running asyncio loop. Raises as `open_client` does."""
    credentials, options = _credentials(access.tls)
    client = AioClient(address, creds=credentials, channel_args=[*channel_args, *options])
    _add_headers(client, access)
    return client


def configured_access(
    tls: TlsConfig, secret_env: str | None, headers: Mapping[str, str] | None = None
) -> Access:
    """Return the credentials that a configuration names.

    secret_env: environment variable with the secret; None sends none.
    headers: further headers.

    Raises:
        ConfigError: the variable is not set, or a certificate file cannot be read.
    """
    client = ClientTls(tls.ca, tls.cert, tls.key) if tls.ca is not None else None
    _credentials(client)
    return Access(client, secret_from(secret_env), headers=headers or {})


def explain_refusal(error: InferenceServerException, access: Access) -> str | None:
    """Explain an error that comes from TLS or the secret in a sentence, with the remedy; None for others."""
    text = (error.message() or "").lower()
    if "protocol is restricted" in text:
        if access.secret or access.admin_secret:
            return "the server refuses the secret: it was started with another one"
        return "the server asks for a secret: name the environment variable that holds it (secret_env)"
    if "certificate_verify_failed" in text:
        return "the server's certificate is not signed by the authority given as CA, or has expired"
    if "hostname verification" in text:
        return "the server's certificate is for other host names: connect by one of those that it states"
    if access.tls is not None and "wrong_version_number" in text:
        return "the server does not speak TLS: leave the CA out, or start it with a certificate"
    if not _hung_up(text):
        return None
    if access.tls is None:
        return "the server hung up on plain text: it probably speaks TLS, so give its CA"
    if access.tls.cert is None:
        return "the server hung up during the TLS handshake: it probably asks for a client certificate"
    return "the server hung up during the TLS handshake: its authority did not sign the client's certificate"


def is_plain_hangup(error: InferenceServerException, access: Access) -> bool:
    """Whether the peer hung up on a client that spoke plain text."""
    return access.tls is None and _hung_up((error.message() or "").lower())


def is_lasting(error: InferenceServerException) -> bool:
    """Whether a retry gets the same refusal. A hang-up may be a server that starts or stops."""
    text = (error.message() or "").lower()
    return any(
        sign in text
        for sign in (
            "protocol is restricted",
            "certificate_verify_failed",
            "hostname verification",
            "wrong_version_number",
        )
    )


def _hung_up(text: str) -> bool:
    return any(sign in text for sign in ("socket closed", "connection reset", "broken pipe"))


class _Headers:
    """A plugin of tritonclient: adds headers to every request before it is sent."""

    def __init__(self, headers: dict[str, str]) -> None:
        self._headers = headers

    def __call__(self, request: Any) -> None:
        request.headers = {**(request.headers or {}), **self._headers}


def _add_headers(client: InferenceServerClientBase, access: Access) -> None:
    by_key = {SECRET_KEY: access.secret, ADMIN_KEY: access.admin_secret}
    secrets = {_HEADER + key: secret for key, secret in by_key.items() if secret}
    if headers := {**access.headers, **secrets}:
        client.register_plugin(_Headers(headers))  # pyright: ignore[reportArgumentType]


def _credentials(tls: ClientTls | None) -> tuple[grpc.ChannelCredentials | None, list[tuple[str, str]]]:
    if tls is None:
        return None, []
    try:
        contents = [path.read_bytes() if path is not None else None for path in (tls.ca, tls.key, tls.cert)]
    except OSError as error:
        raise ConfigError(f"certificate file {error.filename} cannot be read ({error.strerror})") from error
    name = [("grpc.ssl_target_name_override", tls.server_name)] if tls.server_name else []
    return grpc.ssl_channel_credentials(*contents), name

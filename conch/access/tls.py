"""Certificates of a server and of its clients, checked before anything starts.

The check is a real handshake between a server and a client in memory: it fails where a client's would.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conch.config import TlsConfig
from conch.errors import ConfigError, ServerStartError


@dataclass(frozen=True, slots=True)
class ServerTls:
    """PEM files of a server.

    cert, key: its certificate, with intermediate ones if there are any, and the private key, not encrypted.
    ca: who signs the clients' certificates; needed with `require_client_cert`.
    require_client_cert: mutual TLS: clients without a certificate signed by `ca` are turned away.
    """

    cert: Path
    key: Path
    ca: Path | None = None
    require_client_cert: bool = False


@dataclass(frozen=True, slots=True)
class ClientTls:
    """PEM files of a client.

    ca: whom to trust: the authority that signed the server's certificate, or that certificate itself.
    cert, key: the client's own, for servers that ask for one.
    server_name: the name expected in the server's certificate; "" takes the host of the address.
    """

    ca: Path
    cert: Path | None = None
    key: Path | None = None
    server_name: str = ""


def own_client(tls: ServerTls) -> ClientTls:
    """Return the TLS files of the client in the process that starts a server.

    The client trusts the server's very certificate, whoever signed it, and shows it to a server that asks for
    certificates: `ca` must have signed it too.

    Raises:
        ServerStartError: names the file that is missing, unreadable, unfit, expired or of another pair.
    """
    if tls.require_client_cert and tls.ca is None:
        raise ServerStartError(
            "--require-client-cert needs --tls-ca, the authority that signs the clients' certificates"
        )
    for path in (tls.cert, tls.key, tls.ca):
        if path is not None:
            check_readable(path)
    certificate = _handshake(tls)
    names = [value for kind, value in certificate.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
    if not names:
        raise ServerStartError(
            f"certificate {tls.cert} names no host (subjectAltName), so every client would refuse it; "
            "make one with the host's names"
        )
    name = names[0].replace("*", "wildcard", 1)
    mutual = tls.require_client_cert
    return ClientTls(tls.cert, tls.cert if mutual else None, tls.key if mutual else None, name)


def check_server(tls: ServerTls) -> None:
    """Check that a server can serve with these files, in a handshake in memory.

    Raises:
        ServerStartError: names the file that is missing, unreadable, unfit, expired or of another pair.
    """
    own_client(ServerTls(tls.cert, tls.key))
    if tls.ca is not None:
        check_readable(tls.ca)
        _load_authority(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), tls.ca)


def client_context(tls: TlsConfig, setting: str) -> ssl.SSLContext:
    """Return what an HTTP client speaks TLS with. Certificates are always verified: by `tls.ca`, or by the
    system's authorities.

    setting: full name of the section, for messages.

    Raises:
        ConfigError: a file cannot be read, is no PEM, or its key is encrypted.
    """
    try:
        context = ssl.create_default_context(cafile=None if tls.ca is None else str(tls.ca))
        if tls.cert is not None and tls.key is not None:
            context.load_cert_chain(str(tls.cert), str(tls.key), password=_no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(
            f"{setting}: a certificate or key cannot be read ({error}); give PEM files, the key unencrypted"
        ) from error
    return context


def check_readable(path: Path) -> None:
    """Raise ServerStartError unless `path` is a file that can be read and looks like PEM."""
    try:
        is_pem = b"-----BEGIN" in path.read_bytes()
    except OSError as error:
        raise ServerStartError(f"certificate file {path} cannot be read ({error.strerror})") from error
    if not is_pem:
        raise ServerStartError(f"certificate file {path} is not in PEM format (no `-----BEGIN` in it)")


def _handshake(tls: ServerTls) -> dict[str, Any]:
    """Return the server's certificate, as a client that trusts it reads it."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        server.load_cert_chain(tls.cert, tls.key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        raise ServerStartError(
            f"certificate {tls.cert} and key {tls.key} cannot be used ({_reason(error)}): "
            "they must be a pair, in PEM format, the key not encrypted"
        ) from error
    client.load_verify_locations(tls.cert)
    if tls.require_client_cert:
        assert tls.ca is not None
        server.verify_mode = ssl.CERT_REQUIRED
        _load_authority(server, tls.ca)
        client.load_cert_chain(tls.cert, tls.key)
    return _shake(server, client, tls)


def _load_authority(context: ssl.SSLContext, ca: Path) -> None:
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise ServerStartError(f"{ca} holds no certificate authority ({_reason(error)})") from error


def _shake(server: ssl.SSLContext, client: ssl.SSLContext, tls: ServerTls) -> dict[str, Any]:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = {
        "the certificate": client.wrap_bio(to_client, to_server),
        "a client with this server's own certificate": server.wrap_bio(
            to_server, to_client, server_side=True
        ),
    }
    unfinished = dict(ends)
    while unfinished:
        for name, end in list(unfinished.items()):
            try:
                end.do_handshake()
                del unfinished[name]
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                raise ServerStartError(
                    f"certificate {tls.cert}: {name} would be refused ({_reason(error)})"
                ) from error
    return ends["the certificate"].getpeercert() or {}


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def _reason(error: Exception) -> str:
    verify = getattr(error, "verify_message", "")
    return verify or getattr(error, "reason", "") or str(error)

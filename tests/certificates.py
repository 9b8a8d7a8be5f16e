"""Certificates for tests, made on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trustme

HOST = "rewards.example"


@dataclass(frozen=True)
class Certificates:
    """PEM files: an authority, a server and a client that it signed, and a stranger that another signed."""

    ca: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path
    other_ca: Path
    stranger: Path
    stranger_key: Path


def make_certificates(folder: Path, *server_names: str) -> Certificates:
    """Write them into `folder`. server_names: of the server's certificate; default `HOST`."""
    authority, other = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    other.cert_pem.write_to_path(str(folder / "other-ca.pem"))
    names = server_names or (HOST,)
    return Certificates(
        folder / "ca.pem",
        *_issue(authority, folder, "server", *names),
        *_issue(authority, folder, "client", "trainer"),
        folder / "other-ca.pem",
        *_issue(other, folder, "stranger", "trainer"),
    )


def _issue(authority: trustme.CA, folder: Path, name: str, *identities: str) -> tuple[Path, Path]:
    issued = authority.issue_cert(*identities)
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(key))
    return cert, key

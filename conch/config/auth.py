"""Access of a client to servers: certificates and a secret."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from conch.config.base import Section


class TlsConfig(Section):
    """Certificates (PEM files) for a server that speaks TLS. Without `ca` the connection is plain text."""

    ca: Path | None = None
    """Authority that signed the server's certificate, or that certificate itself."""

    cert: Path | None = None
    """Our own certificate, for servers that ask for one (mutual TLS)."""

    key: Path | None = None
    """The private key of `cert`, not encrypted."""

    @model_validator(mode="after")
    def _complete(self) -> TlsConfig:
        if (self.cert is None) != (self.key is None):
            raise ValueError("`tls.cert` and `tls.key` belong together: give both or neither")
        if self.cert is not None and self.ca is None:
            raise ValueError("`tls.cert` needs `tls.ca`: without it nothing is encrypted")
        return self


class AuthConfig(Section):
    """Access to servers: certificates and a secret."""

    tls: TlsConfig = Field(default_factory=TlsConfig)
    """Certificates for a server that speaks TLS."""

    secret_env: str | None = None
    """Environment variable that holds the servers' secret; None sends none."""

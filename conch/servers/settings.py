"""Settings of the port that a server listens on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import Field, model_validator

from conch.access.tls import ServerTls
from conch.addresses import is_loopback
from conch.config import Section, load
from conch.errors import ConfigError, yaml_problem


class ListenSettings(Section):
    """Where a server listens, and who is let in. Each server has its own defaults of port and sizes."""

    port: int = Field(default=8100, ge=1, le=65535)
    """Port to listen on."""

    host: str = "127.0.0.1"
    """Address to listen on. Beyond this machine it asks for `secret_env` or `require_client_cert`, unless
    `allow_anyone` is true: whoever is let in uses the server as a trainer does."""

    secret_env: str | None = None
    """Environment variable with the secret that trainers must send (`auth.secret_env` there). None asks for
    none."""

    restart: bool = True
    """Start the server again when it is killed. False leaves that to systemd, Slurm or Kubernetes."""

    tls_cert: Path | None = None
    """Certificate (PEM) of the server, which then speaks TLS (`auth.tls.ca` in the trainer)."""

    tls_key: Path | None = None
    """Private key (PEM, not encrypted) of `tls_cert`."""

    tls_ca: Path | None = None
    """Authority (PEM) that signed the trainers' certificates."""

    require_client_cert: bool = False
    """Turn trainers without a certificate away that `tls_ca` has signed."""

    allow_anyone: bool = False
    """Listen on a `host` beyond this machine without asking for a secret or a certificate."""

    max_request_mb: float = Field(default=64.0, gt=0)
    """Largest request, in millions of bytes."""

    @model_validator(mode="after")
    def _asks_who_comes(self) -> ListenSettings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("`tls_cert` and `tls_key` belong together: give both or neither")
        if self.tls_cert is None and (self.tls_ca is not None or self.require_client_cert):
            raise ValueError("`tls_ca` and `require_client_cert` need `tls_cert` and `tls_key`")
        if self.require_client_cert and self.tls_ca is None:
            raise ValueError(
                "`require_client_cert` needs `tls_ca`, the authority that signs trainers' certificates"
            )
        asks = self.secret_env is not None or self.require_client_cert or self.allow_anyone
        if not asks and not is_loopback(self.host):
            raise ValueError(
                f"`host` = {self.host!r} is reached from other machines, and whoever reaches it "
                f"{self.harm()}: name a variable with a secret in `secret_env`, ask for certificates "
                "(`require_client_cert`), or set `allow_anyone=true`"
            )
        return self

    def harm(self) -> str:
        """What whoever is let in can do."""
        return "uses the server"

    def tls(self) -> ServerTls | None:
        """Certificates of the server; None speaks plain text."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return ServerTls(self.tls_cert, self.tls_key, self.tls_ca, self.require_client_cert)


SettingsT = TypeVar("SettingsT", bound=ListenSettings)


def load_settings(section: type[SettingsT], argv: Sequence[str]) -> SettingsT:
    """Settings from a command line of `key=value`; a key with dots stands in a section.

    Raises:
        ConfigError: one line per mistake.
    """
    pairs = [text.partition("=") for text in argv]
    for key, sign, _ in pairs:
        if not sign:
            raise ConfigError(f"`{key}` is no setting: write key=value; --help lists the keys")
    values: dict[str, Any] = {}
    for key, _, value in pairs:
        *sections, name = key.split(".")
        inner = values
        for each in sections:
            inner = inner.setdefault(each, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"`{key}` and `{each}` cannot both be given")
        try:
            inner[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"`{key}={value}` is no YAML: {yaml_problem(error)}") from None
    return load(section, values)


def pairs_from_environment(
    section: type[ListenSettings],
    prefix: str,
    environment: Mapping[str, str],
    *,
    others: Collection[str] = (),
) -> list[str]:
    """Settings that environment variables name, as `key=value`: `PREFIX_MAX_WAITING=8` is `max_waiting=8`.

    An empty variable is none, for what starts containers may pass on one that nobody has set.

    prefix: of the variables, with the sign that ends it.
    others: variables with this prefix that are no settings; the one that `secret_env` names is none either.

    Raises:
        ConfigError: a variable with this prefix is no setting.
    """
    known = {f"{prefix}{name}".upper(): name for name in section.model_fields}
    given = {name: value for name, value in environment.items() if name.startswith(prefix) and value}
    secret = given.get(f"{prefix}SECRET_ENV")
    unknown = sorted(name for name in given if name not in known and name not in (*others, secret))
    if unknown:
        raise ConfigError(
            f"environment variable {unknown[0]} is no setting: there are {', '.join((*others, *known))}. "
            "Kubernetes sets such variables for a service of that name, unless `enableServiceLinks` is false"
        )
    return [f"{known[name]}={value}" for name, value in sorted(given.items()) if name in known]

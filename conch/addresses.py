"""Addresses of servers: `host:port`, `host:port/model` of Triton, URLs of HTTP endpoints, and secret headers.

Secrets stand in environment variables, and in no message or log.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from conch.errors import ConfigError

_SERVER = re.compile(r"(?P<host>[^\s/:,]+|\[[0-9A-Fa-f:.]+\]):(?P<port>\d{1,5})")
_MODEL = re.compile(r"[^\s/]+")


def host_and_port(server: str) -> tuple[str, int] | None:
    """Read `host:port`, an IPv6 host in brackets; None where `server` is something else."""
    match = _SERVER.fullmatch(server)
    if match is None or not 0 < int(match["port"]) < 65536:
        return None
    return match["host"], int(match["port"])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`: an address, or `localhost`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def parse_servers(text: str, setting: str) -> list[str]:
    """Read `host:port`, or several with a comma between.

    setting: full name of the key that `text` comes from, for messages.

    Raises:
        ConfigError: `text` is something else, or names a server twice.
    """
    servers = [part.strip() for part in text.split(",")]
    for server in servers:
        if host_and_port(server) is None:
            raise ConfigError(
                f"`{setting}` = {text!r}: {server!r} is not of the form host:port; several servers have a "
                "comma between them"
            )
    if len(set(servers)) < len(servers):
        raise ConfigError(f"`{setting}` = {text!r} names a server twice")
    return servers


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`host:port/model`; the port is the server's gRPC port."""

    host: str
    port: int
    model: str

    @property
    def address(self) -> str:
        """`host:port`, as a gRPC channel takes it."""
        return f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.address}/{self.model}"

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Read `host:port/model`.

        Raises:
            ConfigError: `text` is something else; the message says what was expected.
        """
        if "://" in text:
            raise ConfigError(
                f"reward `{text}`: give a served model as `host:port/model` with its gRPC port, or an HTTP "
                "endpoint as http://host:port/path or https://host:port/path"
            )
        server, _, model = text.strip().rpartition("/")
        address = host_and_port(server)
        if address is None or not _MODEL.fullmatch(model):
            raise ConfigError(
                f"reward `{text}` is not of the form `host:port/model`, for example 127.0.0.1:8001/walks"
            )
        return cls(*address, model)

    @classmethod
    def parse_all(cls, text: str) -> tuple[Endpoint, ...]:
        """Read `host:port/model` or, for several servers of one model, `host1:port,host2:port/model`.

        Raises:
            ConfigError: `text` is something else, or names a server twice.
        """
        *others, last = (part.strip() for part in text.split(","))
        model = cls.parse(last).model
        if any("/" in other for other in others):
            raise ConfigError(
                f"reward `{text}`: give the model once, after the last server, for example "
                f"host1:8001,host2:8001/{model}"
            )
        endpoints = tuple(cls.parse(f"{server}/{model}") for server in (*others, last.rpartition("/")[0]))
        if len(set(endpoints)) < len(endpoints):
            raise ConfigError(f"reward `{text}` names a server twice")
        return endpoints


SCHEMES = ("http://", "https://")


def parse_urls(
    text: str, setting: str = "reward", headers_setting: str = "reward.auth.headers_env"
) -> tuple[str, ...]:
    """Read `http://host:port/path`, or several with a comma between; those without a path have the last's.

    setting: what `text` is, for messages.
    headers_setting: full name of the key that has a token's header, likewise.

    Raises:
        ConfigError: `text` is something else, names a server twice, or holds a password.
    """
    parts = [part.strip() for part in text.split(",")]
    path = urlsplit(parts[-1]).path or "/"
    named = f"{setting} `{_shown(text)}`"
    urls = tuple(_complete(part, path, named, headers_setting) for part in parts)
    if len(set(urls)) < len(urls):
        raise ConfigError(f"{named} names a server twice")
    return urls


def _complete(part: str, path: str, named: str, headers_setting: str) -> str:
    split = _split(part)
    if split is None or split.scheme not in ("http", "https") or not split.hostname:
        raise ConfigError(
            f"{named} is not of the form `http://host:port/path`; several servers have a "
            "comma between them: http://host1:8000,http://host2:8000/path"
        )
    if split.username is not None or split.query or split.fragment:
        raise ConfigError(
            f"{named}: give no password, `?` or `#` in the address; a token goes into a header, "
            f"`{headers_setting}.authorization=VARIABLE`"
        )
    return f"{split.scheme}://{split.netloc}{split.path or path}"


def _split(part: str) -> SplitResult | None:
    try:
        split = urlsplit(part)
        _ = split.port  # raises for what is no number
    except ValueError:
        return None
    return split


def _shown(text: str) -> str:
    """Without what stands before an @: it may be a password."""
    return ",".join(part.split("@")[-1] for part in text.split(","))


_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


def secret_headers(
    headers_env: Mapping[str, str], setting: str = "reward.auth.headers_env"
) -> dict[str, str]:
    """Lower-case header -> value, from header -> environment variable.

    setting: full name of the key, for messages.

    Raises:
        ConfigError: a header has no proper name, or a variable is not set or holds what no header can carry.
    """
    return {
        _name(header, setting): _value(header, variable, setting) for header, variable in headers_env.items()
    }


def _name(header: str, setting: str) -> str:
    name = header.lower()
    if not _NAME.fullmatch(name) or name.startswith("grpc-") or name.endswith("-bin"):
        raise ConfigError(
            f"{setting}: `{header}` cannot be a header of ours; take letters, digits and "
            "dashes, without `grpc-` before or `-bin` behind"
        )
    return name


def _value(header: str, variable: str, setting: str) -> str:
    value = os.environ.get(variable, "")
    if not value:
        raise ConfigError(
            f"{setting}: environment variable {variable}, which is to hold header `{header}`, "
            "is not set or empty"
        )
    if not (value.isascii() and value.isprintable()):
        raise ConfigError(
            f"{setting}: what environment variable {variable} holds cannot stand in a header: "
            "only printable ASCII can"
        )
    return value

"""The addresses of a served reward model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from conch.errors import ConfigError

_ENDPOINT = re.compile(r"(?P<host>[^\s/:,]+|\[[0-9A-Fa-f:.]+\]):(?P<port>\d{1,5})/(?P<model>[^\s/]+)")


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
        match = _ENDPOINT.fullmatch(text.strip())
        if match is None or not 0 < int(match["port"]) < 65536:
            raise ConfigError(
                f"reward `{text}` is not of the form `host:port/model`, for example 127.0.0.1:8001/walks"
            )
        return cls(match["host"], int(match["port"]), match["model"])

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

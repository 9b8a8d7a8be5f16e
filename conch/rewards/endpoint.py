"""The address of a served reward model."""

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
                f"reward `{text}`: HTTP endpoints are not supported yet. Serve the model with Triton, give "
                "`host:port/model` with its gRPC port, or pass a Python function that calls the endpoint"
            )
        if "," in text:
            raise ConfigError(
                f"reward `{text}`: several servers are not supported yet; give one `host:port/model`"
            )
        match = _ENDPOINT.fullmatch(text.strip())
        if match is None or not 0 < int(match["port"]) < 65536:
            raise ConfigError(
                f"reward `{text}` is not of the form `host:port/model`, for example 127.0.0.1:8001/walks"
            )
        return cls(match["host"], int(match["port"]), match["model"])

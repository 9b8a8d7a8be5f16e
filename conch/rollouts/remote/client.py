"""A rollout server as its client sees it; `conch.rollouts.protocol` has what is said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2

from conch.addresses import host_and_port
from conch.config import Section
from conch.errors import RolloutError, RolloutUnavailableError
from conch.rollouts.protocol import CompletionReply, GenerateRequest, Health, WeightUpdate

_CONNECT_S = 5.0
_ASTRAY = 409
_SHOWN = 300
"""Characters of what a server says of its failure."""


class AstrayError(RolloutUnavailableError):
    """The server holds other weights than were asked for."""


class ServerLink:
    """The connection to one server, which several threads may use at once.

    address: `host:port`. deadline_s: longest wait for weights to be taken, or for the next completion.
    """

    def __init__(self, address: str, deadline_s: float) -> None:
        self.address = address
        parsed = host_and_port(address)
        assert parsed is not None, f"{address} is no host:port"
        self.host, self.port = parsed[0].strip("[]"), parsed[1]
        self._client = httpx2.Client(
            base_url=f"http://{address}",
            headers={"content-type": "application/json"},
            timeout=httpx2.Timeout(deadline_s, connect=_CONNECT_S),
            limits=httpx2.Limits(max_connections=None),
            # A proxy set for the internet does not lead to a machine of one's own cluster.
            trust_env=False,
        )

    def health(self) -> Health:
        """What the server is, and which weights it holds.

        Raises:
            RolloutUnavailableError, RolloutError: it is away, or it is something else.
        """
        return self._parsed(Health, self._call("GET", "/health", timeout=_CONNECT_S))

    def refit(self, given: WeightUpdate) -> Health:
        """Let it take these weights; returns once it has.

        Raises:
            RolloutUnavailableError, RolloutError: it is away, or cannot.
        """
        return self._parsed(Health, self._call("POST", "/weights", content=given.model_dump_json()))

    def completions(self, asked: GenerateRequest) -> Iterator[CompletionReply]:
        """Completions as they end.

        Raises:
            AstrayError: it holds other weights.
            RolloutUnavailableError, RolloutError: it is away, or cannot.
        """
        try:
            with self._client.stream("POST", "/generate", content=asked.model_dump_json()) as reply:
                if reply.status_code != httpx2.codes.OK:
                    reply.read()
                    self._refused(reply)
                for text in reply.iter_lines():
                    yield self._parsed(CompletionReply, json.loads(text))
        except httpx2.TransportError as error:
            raise self._away(error) from error
        except ValueError as error:
            raise RolloutUnavailableError(f"{self.address} broke off in the middle of a line") from error

    def _call(self, method: str, path: str, **settings: Any) -> Any:
        try:
            reply = self._client.request(method, path, **settings)
        except httpx2.TransportError as error:
            raise self._away(error) from error
        if reply.status_code != httpx2.codes.OK:
            self._refused(reply)
        return reply.json()

    def _refused(self, reply: httpx2.Response) -> None:
        try:
            detail = str(reply.json()["detail"])[:_SHOWN]
        except (ValueError, KeyError, TypeError):
            detail = f"HTTP {reply.status_code}"
        if reply.status_code == _ASTRAY:
            raise AstrayError(f"{self.address}: {detail}")
        if reply.status_code >= 500:
            raise RolloutUnavailableError(f"{self.address} failed: {detail}")
        raise RolloutError(f"{self.address} refuses: {detail}")

    def _away(self, error: Exception) -> RolloutUnavailableError:
        return RolloutUnavailableError(f"{self.address} does not answer ({type(error).__name__}: {error})")

    def _parsed(self, kind: type[Any], values: Any) -> Any:
        assert issubclass(kind, Section)
        try:
            return kind.model_validate(values)
        except ValueError as error:
            raise RolloutError(
                f"{self.address} is no rollout server of this release: its {kind.__name__} cannot be read"
            ) from error

    def close(self) -> None:
        """Let go of its connections."""
        self._client.close()

"""HTTP client of one rollout server; see `conch.rollouts.protocol` for the messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NoReturn, TypeVar

import httpx2

from conch.addresses import host_and_port
from conch.config import Section
from conch.errors import RolloutError, RolloutUnavailableError
from conch.rollouts.protocol import CompletionReply, GenerateRequest, Health, WeightUpdate

_CONNECT_S = 5.0
_STALE_WEIGHTS = 409
_MAX_DETAIL = 300
"""Characters of a server's error that are shown."""

MessageT = TypeVar("MessageT", bound=Section)


class StaleWeightsError(RolloutUnavailableError):
    """The server holds other weights than those of the request."""


class ServerClient:
    """Client of one server, which several threads may use at once.

    address: `host:port`.
    deadline_s: longest wait for weights to be loaded, or for the next completion.
    """

    def __init__(self, address: str, deadline_s: float) -> None:
        self.address = address
        parsed = host_and_port(address)
        assert parsed is not None, f"{address} is no host:port"
        self.host, self.port = parsed[0].strip("[]"), parsed[1]
        self._http = httpx2.Client(
            base_url=f"http://{address}",
            headers={"content-type": "application/json"},
            timeout=httpx2.Timeout(deadline_s, connect=_CONNECT_S),
            limits=httpx2.Limits(max_connections=None),
            # A proxy set for the internet does not lead to a machine of one's own cluster.
            trust_env=False,
        )

    def health(self) -> Health:
        """State of the server.

        Raises:
            RolloutUnavailableError: it does not answer.
            RolloutError: something else than a rollout server answers.
        """
        return self._parse(Health, self._call("GET", "/health", timeout=_CONNECT_S))

    def update_weights(self, update: WeightUpdate) -> Health:
        """Have the server load these weights; returns once it has.

        Raises:
            RolloutUnavailableError: it does not answer, or failed.
            RolloutError: it can never load them.
        """
        return self._parse(Health, self._call("POST", "/weights", content=update.model_dump_json()))

    def completions(self, request: GenerateRequest) -> Iterator[CompletionReply]:
        """Yield completions as they end.

        Raises:
            StaleWeightsError: the server holds other weights.
            RolloutUnavailableError: it does not answer, or broke off.
            RolloutError: it can never sample what is requested.
        """
        try:
            with self._http.stream("POST", "/generate", content=request.model_dump_json()) as reply:
                if reply.status_code != httpx2.codes.OK:
                    reply.read()
                    self._raise_refusal(reply)
                for line in reply.iter_lines():
                    yield self._parse(CompletionReply, json.loads(line))
        except httpx2.TransportError as error:
            raise self._unavailable(error) from error
        except ValueError as error:
            raise RolloutUnavailableError(f"{self.address} broke off in the middle of a line") from error

    def _call(self, method: str, path: str, **settings: Any) -> Any:
        try:
            reply = self._http.request(method, path, **settings)
        except httpx2.TransportError as error:
            raise self._unavailable(error) from error
        if reply.status_code != httpx2.codes.OK:
            self._raise_refusal(reply)
        return reply.json()

    def _raise_refusal(self, reply: httpx2.Response) -> NoReturn:
        try:
            detail = str(reply.json()["detail"])[:_MAX_DETAIL]
        except (ValueError, KeyError, TypeError):
            detail = f"HTTP {reply.status_code}"
        if reply.status_code == _STALE_WEIGHTS:
            raise StaleWeightsError(f"{self.address}: {detail}")
        if reply.status_code >= 500:
            raise RolloutUnavailableError(f"{self.address} failed: {detail}")
        raise RolloutError(f"{self.address} refuses: {detail}")

    def _unavailable(self, error: Exception) -> RolloutUnavailableError:
        return RolloutUnavailableError(f"{self.address} does not answer ({type(error).__name__}: {error})")

    def _parse(self, message: type[MessageT], values: Any) -> MessageT:
        try:
            return message.model_validate(values)
        except ValueError as error:
            raise RolloutError(
                f"{self.address} is no rollout server of this release: its {message.__name__} cannot be read"
            ) from error

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

"""HTTP client of one rollout server; see `conch.rollouts.protocol` for the messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import ClassVar

from conch.config import AuthConfig
from conch.errors import ConchError, RolloutError, RolloutUnavailableError
from conch.rollouts.protocol import CompletionReply, Failure, GenerateRequest, Health, WeightUpdate
from conch.servers.client import CONNECT_S, JSON, HttpClient

_STALE_WEIGHTS = 409
_MAX_DETAIL = 300
"""Characters of a server's failure that are shown."""


class StaleWeightsError(RolloutUnavailableError):
    """The server holds other weights than those of the request."""


class ServerClient(HttpClient):
    """Client of one server, which several threads may use at once.

    address: `host:port`.
    deadline_s: longest wait for weights to be loaded, or for the next completion.
    auth: access to the server; TLS where it names an authority.

    Raises:
        ConfigError: from the constructor: a certificate cannot be read, or the secret's variable is not set.
    """

    takes_handed: ClassVar[bool] = False
    """True where tensors go with the message of an update."""

    requests_per_server: ClassVar[int] = 4
    """Requests that a server's share of prompts is split into: a quick server can relieve a slow one."""

    def __init__(self, address: str, deadline_s: float, auth: AuthConfig | None = None) -> None:
        super().__init__(
            address,
            auth or AuthConfig(),
            section="rollout",
            what="rollout server",
            timeout_s=deadline_s,
            refused=RolloutError,
            unavailable=RolloutUnavailableError,
        )

    def health(self) -> Health:
        """State of the server.

        Raises:
            RolloutUnavailableError: it does not answer.
            RolloutError: it lets us not in, or is no rollout server.
        """
        return self.parse(Health, self.values("GET", "/health", timeout=CONNECT_S))

    def update_weights(self, update: WeightUpdate) -> Health:
        """Have the server load these weights; returns once it has.

        Raises:
            RolloutUnavailableError: it does not answer, or failed.
            RolloutError: it can never load them.
        """
        content = update.model_dump_json()
        return self.parse(Health, self.values("POST", "/weights", content=content, headers=JSON))

    def completions(self, request: GenerateRequest) -> Iterator[CompletionReply]:
        """Yield completions as they end.

        Raises:
            StaleWeightsError: the server holds other weights.
            RolloutUnavailableError: it does not answer, or broke off.
            RolloutError: it can never sample what is requested.
        """
        for line in self.lines("/generate", request.model_dump_json()):
            try:
                values = json.loads(line)
            except ValueError as error:
                raise RolloutUnavailableError(f"{self.address} broke off in the middle of a line") from error
            if isinstance(values, dict) and "detail" in values:
                failure = self.parse(Failure, values).detail[:_MAX_DETAIL]
                raise RolloutUnavailableError(f"{self.address} failed: {failure}")
            yield self.parse(CompletionReply, values)

    def stacks(self) -> str:
        """Nothing: a server does not show strangers what it does."""
        return ""

    def refusal_of(self, status: int, detail: str) -> ConchError:
        if status == _STALE_WEIGHTS:
            return StaleWeightsError(f"{self.address}: {detail}")
        return super().refusal_of(status, detail)

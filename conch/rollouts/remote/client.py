"""HTTP client of one rollout server; see `conch.rollouts.protocol` for the messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NoReturn, TypeVar

import httpx2
from pydantic import ValidationError

from conch.access.secrets import secret_from
from conch.access.tls import client_context
from conch.addresses import host_and_port
from conch.config import AuthConfig, Section
from conch.errors import RolloutError, RolloutUnavailableError
from conch.rollouts.protocol import CompletionReply, Failure, GenerateRequest, Health, WeightUpdate

_CONNECT_S = 5.0
_UNAUTHORIZED, _STALE_WEIGHTS = 401, 409
_MAX_DETAIL = 300
"""Characters of a server's error that are shown."""

_OTHER_NAMES = "the server's certificate is for other names or addresses: take one of them in `rollout.urls`"
_NO_TLS = "the server does not speak TLS: leave `rollout.auth.tls.ca` out, or start it with `tls_cert`"
_TLS_REFUSALS = {
    "mismatch": _OTHER_NAMES,
    "certificate_verify_failed": (
        "the server's certificate is not signed by the authority in `rollout.auth.tls.ca`, or has expired"
    ),
    "wrong_version_number": _NO_TLS,
    "record_layer_failure": _NO_TLS,
}
"""What an error of TLS says -> what it means; the first that fits."""

MessageT = TypeVar("MessageT", bound=Section)


class StaleWeightsError(RolloutUnavailableError):
    """The server holds other weights than those of the request."""


class ServerClient:
    """Client of one server, which several threads may use at once.

    address: `host:port`.
    deadline_s: longest wait for weights to be loaded, or for the next completion.
    auth: access to the server; TLS where it names an authority.

    Raises:
        ConfigError: from the constructor: a certificate cannot be read, or the secret's variable is not set.
    """

    def __init__(self, address: str, deadline_s: float, auth: AuthConfig | None = None) -> None:
        auth = auth or AuthConfig()
        self.address = address
        self._is_tls = auth.tls.ca is not None
        self._hang_up_hint = (
            "if it speaks TLS, give `rollout.auth.tls.ca`"
            if not self._is_tls
            else "if it asks for certificates, give `rollout.auth.tls.cert` and `rollout.auth.tls.key`"
            if auth.tls.cert is None
            else "if it asks for certificates, its authority did not sign `rollout.auth.tls.cert`"
        )
        secret = secret_from(auth.secret_env)
        parsed = host_and_port(address)
        assert parsed is not None, f"{address} is no host:port"
        self.host, self.port = parsed[0].strip("[]"), parsed[1]
        self._http = httpx2.Client(
            base_url=f"{'https' if self._is_tls else 'http'}://{address}",
            headers={
                "content-type": "application/json",
                **({"authorization": f"Bearer {secret}"} if secret else {}),
            },
            verify=client_context(auth.tls, "rollout.auth.tls") if self._is_tls else False,
            timeout=httpx2.Timeout(deadline_s, connect=_CONNECT_S),
            limits=httpx2.Limits(max_connections=None),
            # A proxy set for the internet does not lead to a machine of one's own cluster.
            trust_env=False,
        )

    def health(self) -> Health:
        """State of the server.

        Raises:
            RolloutUnavailableError: it does not answer.
            RolloutError: it lets us not in, or is no rollout server.
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
                    values = json.loads(line)
                    if isinstance(values, dict) and "detail" in values:
                        failure = self._parse(Failure, values).detail[:_MAX_DETAIL]
                        raise RolloutUnavailableError(f"{self.address} failed: {failure}")
                    yield self._parse(CompletionReply, values)
        except httpx2.RequestError as error:
            raise self._connection_error(error) from error
        except ValueError as error:
            raise RolloutUnavailableError(f"{self.address} broke off in the middle of a line") from error

    def _call(self, method: str, path: str, **settings: Any) -> Any:
        try:
            reply = self._http.request(method, path, **settings)
        except httpx2.RequestError as error:
            raise self._connection_error(error) from error
        if reply.status_code != httpx2.codes.OK:
            self._raise_refusal(reply)
        try:
            return reply.json()
        except ValueError as error:
            raise RolloutError(f"{self.address} is no rollout server: it answers with no JSON") from error

    def _raise_refusal(self, reply: httpx2.Response) -> NoReturn:
        try:
            detail = str(reply.json()["detail"])[:_MAX_DETAIL]
        except (ValueError, KeyError, TypeError):
            detail = f"HTTP {reply.status_code}"
        if reply.status_code == _UNAUTHORIZED:
            raise RolloutError(f"{self.address}: {detail}; see `rollout.auth.secret_env`")
        if reply.status_code == _STALE_WEIGHTS:
            raise StaleWeightsError(f"{self.address}: {detail}")
        if reply.status_code >= 500:
            raise RolloutUnavailableError(f"{self.address} failed: {detail}")
        raise RolloutError(f"{self.address} refuses: {detail}")

    def _connection_error(self, error: httpx2.RequestError) -> RolloutError:
        """What a connection broke by; of another type where it would break by it again and again."""
        text = str(error).lower()
        for sign, explanation in _TLS_REFUSALS.items():
            if self._is_tls and sign in text:
                return RolloutError(f"{self.address}: {explanation}")
        # A server that hangs up may be one that starts or stops, too: another attempt may help.
        hung_up = isinstance(error, httpx2.RemoteProtocolError | httpx2.ReadError | httpx2.WriteError)
        hint = f"; {self._hang_up_hint}" if hung_up else ""
        return RolloutUnavailableError(
            f"{self.address} does not answer ({type(error).__name__}: {error}){hint}"
        )

    def _parse(self, message: type[MessageT], values: Any) -> MessageT:
        try:
            return message.model_validate(values)
        except ValidationError as error:
            raise RolloutError(
                f"{self.address} is no rollout server of this release, or its model gives no numbers: its "
                f"{message.__name__} cannot be read ({_first_mistake(error)})"
            ) from error

    def close(self) -> None:
        """Close the connections."""
        self._http.close()


def _first_mistake(error: ValidationError) -> str:
    """Where a message is wrong, and how; repeats nothing of what it holds."""
    mistake = error.errors(include_input=False, include_url=False)[0]
    return f"{'.'.join(map(str, mistake['loc'])) or 'all of it'}: {mistake['msg']}"

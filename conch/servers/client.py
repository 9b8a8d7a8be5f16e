"""HTTP client of a server that Conch started: access, time limits, and what a failure means."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar
from weakref import WeakSet

import httpx2
from pydantic import ValidationError

from conch.access.secrets import secret_from
from conch.access.tls import client_context
from conch.addresses import host_and_port
from conch.config import AuthConfig, Section
from conch.errors import ConchError

CONNECT_S = 5.0
"""Longest time until a connection stands, and until a server has told its health."""

_UNAUTHORIZED = 401
_MAX_DETAIL = 300
"""Characters of a server's error that are shown."""

MessageT = TypeVar("MessageT", bound=Section)


class HttpClient:
    """Client of one server, which several threads may use at once.

    address: `host:port`.
    section: of the configuration that the server is named in, `rollout`.
    what: the kind of server, "rollout server".
    timeout_s: longest wait for an answer to begin, or for its next part.
    refused: raised where asking again would not help.
    unavailable: raised where it may.

    Raises:
        ConfigError: from the constructor: a certificate cannot be read, or the secret's variable is not set.
    """

    def __init__(
        self,
        address: str,
        auth: AuthConfig,
        *,
        section: str,
        what: str,
        timeout_s: float,
        refused: type[ConchError],
        unavailable: type[ConchError],
    ) -> None:
        self.address = address
        self._section, self._what = section, what
        self._refused, self._unavailable = refused, unavailable
        self._is_tls = auth.tls.ca is not None
        self._hang_up_hint = (
            f"if it speaks TLS, give `{section}.auth.tls.ca`"
            if not self._is_tls
            else f"if it asks for certificates, give `{section}.auth.tls.cert` and `{section}.auth.tls.key`"
            if auth.tls.cert is None
            else f"if it asks for certificates, its authority did not sign `{section}.auth.tls.cert`"
        )
        secret = secret_from(auth.secret_env)
        parsed = host_and_port(address)
        assert parsed is not None, f"{address} is no host:port"
        self.host, self.port = parsed[0].strip("[]"), parsed[1]
        self._http = httpx2.Client(
            base_url=f"{'https' if self._is_tls else 'http'}://{address}",
            headers={"authorization": f"Bearer {secret}"} if secret else {},
            verify=client_context(auth.tls, f"{section}.auth.tls") if self._is_tls else False,
            timeout=httpx2.Timeout(timeout_s, connect=CONNECT_S),
            limits=httpx2.Limits(max_connections=None),
            # A proxy set for the internet does not lead to a machine of one's own cluster.
            trust_env=False,
        )
        self._connections: WeakSet[socket.socket] = WeakSet()
        self._traced = {"trace": self._note_connection}

    def ask(self, method: str, path: str, **settings: Any) -> httpx2.Response:
        """A whole answer, status 200.

        settings: of `httpx2.Client.request`.

        Raises:
            ConchError: of the two types of the constructor.
        """
        with self.answered():
            reply = self._http.request(method, path, extensions=self._traced, **settings)
        if reply.status_code != httpx2.codes.OK:
            self._raise_refusal(reply)
        return reply

    def values(self, method: str, path: str, **settings: Any) -> Any:
        """The JSON of a whole answer; raises as `ask` does."""
        reply = self.ask(method, path, **settings)
        try:
            return reply.json()
        except ValueError as error:
            raise self._refused(f"{self.address} is no {self._what}: it answers with no JSON") from error

    def lines(self, path: str, content: str) -> Iterator[str]:
        """Yield the lines of an answer to a POST as they come; raises as `ask` does."""
        with (
            self.answered(),
            self._http.stream("POST", path, content=content, headers=JSON, extensions=self._traced) as reply,
        ):
            if reply.status_code != httpx2.codes.OK:
                reply.read()
                self._raise_refusal(reply)
            yield from reply.iter_lines()

    def parse(self, message: type[MessageT], values: Any) -> MessageT:
        """A message of the server's.

        Raises:
            ConchError: of the type for what is refused: this is no such message.
        """
        try:
            return message.model_validate(values)
        except ValidationError as error:
            raise self._refused(
                f"{self.address} is no {self._what} of this release, or its model gives no numbers: its "
                f"{message.__name__} cannot be read ({_first_mistake(error)})"
            ) from error

    def refusal_of(self, status: int, detail: str) -> ConchError:
        """What an answer with this status means."""
        if status == _UNAUTHORIZED:
            return self._refused(f"{self.address}: {detail}; see `{self._section}.auth.secret_env`")
        if status >= 500:
            return self._unavailable(f"{self.address} failed: {detail}")
        return self._refused(f"{self.address} refuses: {detail}")

    @contextmanager
    def answered(self) -> Iterator[None]:
        """Turn what a connection breaks by into words."""
        try:
            yield
        except httpx2.RequestError as error:
            raise self._connection_error(error) from error

    def _raise_refusal(self, reply: httpx2.Response) -> NoReturn:
        try:
            detail = str(reply.json()["detail"])[:_MAX_DETAIL]
        except (ValueError, KeyError, TypeError):
            detail = f"HTTP {reply.status_code}"
        raise self.refusal_of(reply.status_code, detail)

    def _connection_error(self, error: httpx2.RequestError) -> ConchError:
        """What a connection broke by; of another type where it would break by it again and again."""
        text = str(error).lower()
        for sign, explanation in self._tls_refusals().items():
            if self._is_tls and sign in text:
                return self._refused(f"{self.address}: {explanation}")
        # A server that hangs up may be one that starts or stops, too: another attempt may help.
        hung_up = isinstance(error, httpx2.RemoteProtocolError | httpx2.ReadError | httpx2.WriteError)
        hint = f"; {self._hang_up_hint}" if hung_up else ""
        return self._unavailable(f"{self.address} does not answer ({type(error).__name__}: {error}){hint}")

    def _tls_refusals(self) -> dict[str, str]:
        """What an error of TLS says -> what it means; the first that fits."""
        other_names = (
            f"the server's certificate is for other names or addresses: take one of them in "
            f"`{self._section}.urls`"
        )
        no_tls = (
            f"the server does not speak TLS: leave `{self._section}.auth.tls.ca` out, or start it with "
            "`tls_cert`"
        )
        return {
            "mismatch": other_names,
            "certificate_verify_failed": (
                f"the server's certificate is not signed by the authority in `{self._section}.auth.tls.ca`, "
                "or has expired"
            ),
            "wrong_version_number": no_tls,
            "record_layer_failure": no_tls,
        }

    def _note_connection(self, event: str, details: Mapping[str, Any]) -> None:
        """Note the socket of each new connection: what waits there at `close` has to be woken."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._connections.add(details["return_value"].get_extra_info("socket"))

    def close(self) -> None:
        """Close the connections; who waits for an answer in another thread gets an error."""
        for connection in [*self._connections]:
            with suppress(OSError):  # the server has hung up just now
                connection.shutdown(socket.SHUT_RDWR)  # to close it would leave the other thread waiting
        self._http.close()


JSON = {"content-type": "application/json"}
"""Header of a request whose body is JSON."""


def _first_mistake(error: ValidationError) -> str:
    """Where a message is wrong, and how; repeats nothing of what it holds."""
    mistake = error.errors(include_input=False, include_url=False)[0]
    return f"{'.'.join(map(str, mistake['loc'])) or 'all of it'}: {mistake['msg']}"

"""Transport to one HTTP endpoint that speaks JSON.

    dialect   request body                              reply
    query     {"query": [sample, ...]}                  {"rewards": [number, ...]}, other keys are ignored
    messages  {"query": [sample, ...],                  the same
               "dialogues": [dialogue or null, ...]}
    goals     [sample, ...]                             {goal: [number or null, ...], ...}

A dialogue is {"messages": [...]}, with "tools" and "chat_template_kwargs" where the prompt has them; null
stands for a prompt that is a text. A goal's null says that it does not apply to the sample.

A body that the endpoint sends with an error is never shown: it may repeat the samples.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, NoReturn
from urllib.parse import urlsplit

import httpx2

from conch.config import HttpDialect, RewardClientConfig
from conch.errors import RewardUnavailableError
from conch.rewards.base import ServerTimes
from conch.rewards.client.transport import Failure, ModelInfo, ReplicaError, Reply, ScoringRow
from conch.triton.dialogues import dialogue_parts
from conch.types import DEFAULT_OBJECTIVE, RewardStatus

_REPLY_LIMIT = 16_000_000
"""Bytes; a number takes some twenty."""

ACCESS_DENIED = (401, 403, 407)
TRANSIENT = (408, 425, 429, 502, 503, 504)
# 413 too large may fit in halves; 500 is what frameworks make of an exception, of one row perhaps.
_MAYBE_ONE_ROW = (400, 413, 422, 500)


class HttpTransport:
    """The endpoint at one URL; see `Transport`."""

    def __init__(
        self,
        url: str,
        config: RewardClientConfig,
        headers: Mapping[str, str],
        context: ssl.SSLContext,
        dialect: HttpDialect = "query",
    ) -> None:
        self.name = f"reward endpoint {url}"
        self.model = url
        self._url = url
        self._config = config
        self._dialect: HttpDialect = dialect
        self._headers = {**headers, "content-type": "application/json", "accept": "application/json"}
        self._context = context
        self._client: httpx2.AsyncClient | None = None

    async def check(self, timeout_s: float) -> None:
        """Find out whether anything listens; the probe that follows shows the rest."""
        split = urlsplit(self._url)
        port = split.port or (443 if split.scheme == "https" else 80)
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(split.hostname, port), timeout_s)
        except (OSError, asyncio.TimeoutError) as error:
            reason = "no answer in time" if isinstance(error, asyncio.TimeoutError) else str(error)
            raise RewardUnavailableError(
                f"{self.name} cannot be reached ({reason}): start the endpoint, or correct `reward.url`"
            ) from error
        writer.close()

    async def describe(self, timeout_s: float) -> ModelInfo:
        """Return the configured limits: an endpoint tells nothing about its model."""
        del timeout_s
        reads: Any = "both" if self._dialect == "messages" else "texts"
        return ModelInfo(max_rows=self._config.batch_rows, reads=reads)

    async def infer(self, rows: Sequence[ScoringRow], timeout_s: float) -> Reply:
        body = json.dumps(_body(rows, self._dialect))
        try:
            # The library's own deadlines are for each packet: a reply that drips would never end.
            reply = await asyncio.wait_for(self._post(body), timeout_s)
        except asyncio.TimeoutError:
            raise ReplicaError(Failure(RewardStatus.TIMEOUT, "no reply in time", retryable=True)) from None
        except httpx2.TransportError as error:
            raise ReplicaError(connection_failure(error)) from error
        except httpx2.HTTPError as error:
            _raise_invalid(f"the reply cannot be read ({type(error).__name__})")
        return Reply(_parse_body(reply, self._dialect))

    async def server_statistics(self, timeout_s: float) -> ServerTimes | None:
        del timeout_s
        return None

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def _post(self, body: str) -> bytes:
        async with self._open_client().stream("POST", self._url, content=body) as response:
            if response.status_code != HTTPStatus.OK:
                raise ReplicaError(_status_failure(response.status_code))
            reply = bytearray()
            async for part in response.aiter_bytes():
                reply += part
                if len(reply) > _REPLY_LIMIT:
                    _raise_invalid(f"the reply is larger than {_REPLY_LIMIT} bytes")
            return bytes(reply)

    def _open_client(self) -> httpx2.AsyncClient:
        # Made at first use because its connections belong to the loop that they are made in.
        if self._client is None:
            self._client = httpx2.AsyncClient(
                headers=self._headers,
                verify=self._context,
                timeout=httpx2.Timeout(None, connect=self._config.connect_timeout_s),
                # A proxy set for the internet does not lead to a machine of one's own cluster.
                trust_env=False,
            )
        return self._client


def _body(rows: Sequence[ScoringRow], dialect: HttpDialect) -> Any:
    samples = [row.sample for row in rows]
    if dialect == "goals":
        return samples
    if dialect == "query":
        return {"query": samples}
    return {"query": samples, "dialogues": [dialogue_parts(row.dialogue) for row in rows]}


def _parse_body(reply: bytes, dialect: str) -> dict[str, list[float | None]]:
    try:
        # NaN is no JSON, but Python reads it.
        content = json.loads(reply, parse_constant=lambda name: _raise_invalid(f"the reply holds {name}"))
    except (ValueError, RecursionError):
        _raise_invalid("the reply is not JSON")
    if not isinstance(content, dict):
        _raise_invalid(f"the reply is a JSON {type(content).__name__}, expected an object")
    if dialect != "goals":
        if "rewards" not in content:
            _raise_invalid('the reply has no "rewards"; for {goal: [...]} set `reward.dialect=goals`')
        content = {DEFAULT_OBJECTIVE: content["rewards"]}
    may_lack = len(content) > 1
    return {name: _numbers(name, values, may_lack=may_lack) for name, values in content.items()}


def _numbers(name: str, values: Any, *, may_lack: bool) -> list[float | None]:
    """may_lack: whether null is no mistake, since other goals may apply."""
    if not isinstance(values, list):
        _raise_invalid(f"the reply's {name!r} is a {type(values).__name__}, expected a list of numbers")
    for value in values:
        if may_lack and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            _raise_invalid(f"the reply's {name!r} holds a {type(value).__name__}, expected numbers")
    try:
        return [None if value is None else float(value) for value in values]
    except OverflowError:
        _raise_invalid(f"the reply's {name!r} holds a number beyond all bounds")


def _raise_invalid(problem: str) -> NoReturn:
    raise ReplicaError(Failure(RewardStatus.INVALID, problem, maybe_one_row=True))


def connection_failure(error: httpx2.TransportError) -> Failure:
    """Return what a connection that failed means for the samples."""
    reason = str(error) or type(error).__name__
    if isinstance(error, httpx2.TimeoutException):
        return Failure(RewardStatus.TIMEOUT, "no connection in time", retryable=True)
    if not isinstance(error, httpx2.ConnectError):
        return Failure(RewardStatus.UNAVAILABLE, f"the connection broke ({reason})", retryable=True)
    # A certificate that does not verify and a host that does not exist stay so; a refused connection may not.
    lasting = any(isinstance(cause, ssl.SSLError) for cause in _causes(error)) or "[SSL" in reason
    detail = f"{reason}: check `reward.auth.tls`" if lasting else f"no connection ({reason})"
    return Failure(RewardStatus.UNAVAILABLE, detail, retryable=not lasting, is_down=True)


def _causes(error: BaseException | None) -> list[BaseException]:
    causes: list[BaseException] = []
    while error is not None:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def _status_failure(status: int) -> Failure:
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "?"
    detail = f"HTTP {status} {phrase}"
    if status in ACCESS_DENIED:
        detail += ": it wants a token; name its variable in `reward.auth.headers_env.authorization`"
        return Failure(RewardStatus.UNAVAILABLE, detail, is_down=True)
    if status in TRANSIENT:
        return Failure(RewardStatus.UNAVAILABLE, detail, retryable=True)
    if status in _MAYBE_ONE_ROW:
        return Failure(
            RewardStatus.INVALID,
            detail,
            maybe_one_row=True,
            elsewhere=status == HTTPStatus.INTERNAL_SERVER_ERROR,
        )
    # No endpoint for us: another path, another method, a redirect.
    return Failure(
        RewardStatus.UNAVAILABLE,
        f"{detail}: check the path in `reward.url` and `reward.dialect`",
        is_down=True,
    )

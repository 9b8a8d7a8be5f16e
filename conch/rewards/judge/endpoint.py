"""One server that speaks OpenAI's chat completions: one request, one answer.

What a server writes into an error is never shown, since it may repeat the samples; only codes are that the
protocol knows.
"""

from __future__ import annotations

import asyncio
import json
import math
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import httpx2

from conch.config import JudgeConfig
from conch.errors import ConfigError
from conch.rewards.client.http import ACCESS_DENIED, TRANSIENT, connection_failure
from conch.rewards.client.transport import Failure, ReplicaError
from conch.rewards.judge.limits import asked_pause_s, exhausted_pause_s, told_pause_s
from conch.types import RewardStatus

_REPLY_LIMIT = 16_000_000
"""Bytes."""

_QUOTA_SPENT = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_NO_MODEL = {"model_not_found", "NotFoundError"}
_TOO_LONG = {"context_length_exceeded", "string_above_max_length"}

# What servers call the end of an answer, in small letters. OpenAI: stop, length, content_filter, tool_calls,
# function_call. Others have words of their own for the same, from the engine or the API that is behind them.
_WHOLE = {"", "stop", "eos", "eos_token", "stop_sequence", "end_turn", "complete", "completed"}
_CUT = {"length", "max_tokens", "model_length"}
_BROKEN_OFF = {"abort", "error", "insufficient_system_resource"}
"""The server gave up in the midst of it; the judge may well answer another time."""


class PausedError(ReplicaError):
    """The server asks to be left alone.

    pause_s: for so many seconds.
    """

    def __init__(self, failure: Failure, pause_s: float) -> None:
        super().__init__(failure)
        self.pause_s = pause_s


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """What could have stood in one place of an answer.

    token: that does.
    top: token -> log-probability in nats, of the likeliest ones and of `token`.
    """

    token: str
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of a judge.

    text: the message's content; of a model whose server keeps its thinking apart, without it.
    finish_reason: `stop` where it is whole, `length` where it was cut, else the server's word.
    refused: the server marks it as a refusal.
    tokens: of the text with their alternatives; None where no log-probabilities came.
    model: as the server names it.
    tokens_in, tokens_out: read and written, as the server counts them; 4 bytes each where it does not.
    is_known: from the cache, so that it cost nothing.
    """

    text: str
    finish_reason: str
    refused: bool = False
    tokens: tuple[TokenChoice, ...] | None = None
    model: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    is_known: bool = False
    pause_s: float = field(default=0.0, compare=False)
    """Seconds for which the server's headers say that nothing more is to be had."""


class JudgeEndpoint:
    """The server at one address; has what a `Pool` reads of a transport.

    url: up to `/v1`.
    headers: that hold secrets.
    """

    def __init__(
        self, url: str, config: JudgeConfig, headers: Mapping[str, str], context: ssl.SSLContext
    ) -> None:
        assert config.model is not None, "checked before"
        self.name = f"judge `{config.model}` at {url}"
        self.model = config.model
        self.url = url.removesuffix("/").removesuffix("/chat/completions")
        self._config = config
        self._headers = {"content-type": "application/json", "accept": "application/json", **headers}
        self._context = context
        self._client: httpx2.AsyncClient | None = None

    async def ask(self, body: Mapping[str, Any], timeout_s: float) -> Answer:
        """Send one request.

        Raises:
            ReplicaError: no answer, and what that means for the sample; PausedError, when to ask again.
        """
        content = json.dumps(body)
        try:
            # The library's own deadlines are for each packet: a reply that drips would never end.
            status, headers, reply = await asyncio.wait_for(
                self._send("POST", "/chat/completions", content), timeout_s
            )
        except asyncio.TimeoutError:
            raise ReplicaError(Failure(RewardStatus.TIMEOUT, "no answer in time", retryable=True)) from None
        except httpx2.TransportError as error:
            raise ReplicaError(connection_failure(error, "judge.tls")) from error
        except httpx2.HTTPError as error:
            raise ReplicaError(_invalid(f"the reply cannot be read ({type(error).__name__})")) from error
        if status != HTTPStatus.OK:
            raise _status_error(status, headers, _error_code(reply), self.url)
        return _answer(reply, content, exhausted_pause_s(headers))

    async def models(self, timeout_s: float) -> list[str]:
        """Return the names of the models that the server has; empty where it does not tell."""
        try:
            status, _, reply = await asyncio.wait_for(self._send("GET", "/models", ""), timeout_s)
            rows = json.loads(reply)["data"] if status == HTTPStatus.OK else []
            return [str(row["id"]) for row in rows]
        except (asyncio.TimeoutError, httpx2.HTTPError, ReplicaError, ValueError, KeyError, TypeError):
            return []

    async def close(self) -> None:
        """Close the connections. A second call does nothing."""
        if self._client is not None:
            await self._client.aclose()

    async def _send(self, method: str, path: str, content: str) -> tuple[int, Mapping[str, str], bytes]:
        url = self.url + path
        async with self._open_client().stream(method, url, content=content or None) as response:
            reply = bytearray()
            async for part in response.aiter_bytes():
                reply += part
                if len(reply) > _REPLY_LIMIT:
                    raise ReplicaError(_invalid(f"the reply is larger than {_REPLY_LIMIT} bytes"))
            return response.status_code, response.headers, bytes(reply)

    def _open_client(self) -> httpx2.AsyncClient:
        # Made at first use because its connections belong to the loop that they are made in.
        if self._client is None:
            self._client = httpx2.AsyncClient(
                headers=self._headers,
                verify=self._context,
                timeout=httpx2.Timeout(None, connect=self._config.connect_timeout_s),
                limits=httpx2.Limits(max_connections=None),
                trust_env=False,
            )
        return self._client


def _invalid(detail: str) -> Failure:
    return Failure(RewardStatus.INVALID, detail)


def _error_code(reply: bytes) -> str:
    """The code or type of an error that the protocol knows, else ""."""
    try:
        content = json.loads(reply)
        error = content.get("error", content)
        codes = {str(error.get("code")), str(error.get("type"))}
    except (ValueError, AttributeError, RecursionError):
        return ""
    return next(iter(codes & (_QUOTA_SPENT | _NO_MODEL | _TOO_LONG)), "")


def _status_error(status: int, headers: Mapping[str, str], code: str, url: str) -> ReplicaError:
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "?"
    detail = f"HTTP {status} {phrase}"
    if code in _QUOTA_SPENT:
        spent = f"{detail}: the account has no quota left ({code})"
        return ReplicaError(Failure(RewardStatus.UNAVAILABLE, spent, is_down=True))
    if status in ACCESS_DENIED:
        detail += ": name the variable that holds its key in `judge.key_env`"
        return ReplicaError(Failure(RewardStatus.UNAVAILABLE, detail, is_down=True))
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        failure = Failure(RewardStatus.UNAVAILABLE, detail, retryable=True)
        return PausedError(failure, asked_pause_s(headers))
    if status in TRANSIENT or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        failure, pause_s = Failure(RewardStatus.UNAVAILABLE, detail, retryable=True), told_pause_s(headers)
        return ReplicaError(failure) if pause_s is None else PausedError(failure, pause_s)
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED) or code in _NO_MODEL or status < 400:
        where = f"{detail}: check the model's name and `judge.url` = {url}, which ends with /v1"
        return ReplicaError(Failure(RewardStatus.UNAVAILABLE, where, is_down=True))
    if code in _TOO_LONG:
        detail += ": longer than the judge's context"
    return ReplicaError(_invalid(detail))


def _answer(reply: bytes, request: str, pause_s: float) -> Answer:
    """Read a reply.

    Raises:
        ReplicaError: it is no chat completion, or one that the server has broken off.
    """
    try:
        content = json.loads(reply)
        choice = content["choices"][0]
        message = choice["message"]
        text = message.get("content") or ""
        usage = content.get("usage") or {}
        if not isinstance(text, str):
            raise TypeError
        return Answer(
            text=text,
            finish_reason=_finish_reason(choice.get("finish_reason")),
            refused=bool(message.get("refusal")),
            tokens=_tokens(choice.get("logprobs")),
            model=str(content.get("model") or ""),
            tokens_in=int(usage.get("prompt_tokens") or -(-len(request) // 4)),
            tokens_out=int(usage.get("completion_tokens") or -(-len(text.encode()) // 4)),
            pause_s=pause_s,
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise ReplicaError(_invalid("the reply is no chat completion")) from None


def _finish_reason(told: Any) -> str:
    """How an answer ended; a server that does not say it gives whole ones.

    Raises:
        ReplicaError: the server has broken it off.
    """
    reason = str(told or "").lower()
    if reason in _BROKEN_OFF:
        broken = f"the server broke its answer off (`{reason}`)"
        raise ReplicaError(Failure(RewardStatus.UNAVAILABLE, broken, retryable=True))
    return "stop" if reason in _WHOLE else "length" if reason in _CUT else reason


def _tokens(logprobs: Any) -> tuple[TokenChoice, ...] | None:
    rows = None if logprobs is None else logprobs.get("content")
    if not rows:
        return None
    return tuple(
        TokenChoice(
            str(row["token"]),
            # The sampled token stands in the list or not, as it was among the likeliest or not.
            tuple(
                dict.fromkeys(
                    (str(each["token"]), _logprob(each["logprob"]))
                    for each in (*row.get("top_logprobs", ()), row)
                )
            ),
        )
        for row in rows
    )


def _logprob(value: Any) -> float:
    """A log-probability; NaN is none, and would count as certainty."""
    number = float(value)
    if math.isnan(number):
        raise ValueError
    return number


def check_model(models: list[str], config: JudgeConfig, url: str) -> None:
    """See that a server has the model, as far as it tells.

    Raises:
        ConfigError: it has others.
    """
    if models and config.model not in models:
        shown = ", ".join(models[:10]) + (", ..." if len(models) > 10 else "")
        raise ConfigError(
            f"`judge.model` = {config.model}: the server at {url} has no such model, but {shown}"
        )

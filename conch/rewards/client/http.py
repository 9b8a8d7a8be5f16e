"""Transport to one HTTP endpoint that speaks JSON.

    dialect   request body                              reply
    query     {"query": [sample, ...]}                  {"rewards": [number, ...]}, other keys are ignored
    messages  {"query": [sample, ...],                  the same
               "dialogues": [dialogue or null, ...]}
    goals     {"texts": [text, ...], "normalize": bool} {goal: [number or null, ...], ...}
              or [text, ...]

A dialogue is {"messages": [...]}, with "tools" and "chat_template_kwargs" where the prompt has them; null
stands for a prompt that is a text. A goal's null, or NaN, says that it has no value for the text.

A body that the endpoint sends with an error is never shown: it may repeat the samples.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import ssl
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timezone
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Literal, NoReturn, TypeVar
from urllib.parse import urljoin, urlsplit, urlunsplit

import httpx2

from conch.config import GoalServerConfig, HttpDialect, RewardClientConfig
from conch.errors import RewardUnavailableError
from conch.rewards.base import ServerTimes
from conch.rewards.client.transport import (
    FIRST_TEXT,
    Failure,
    ModelInfo,
    ReplicaError,
    Reply,
    ScoringRow,
)
from conch.triton.dialogues import dialogue_parts
from conch.types import DEFAULT_OBJECTIVE, RewardStatus

_REPLY_LIMIT = 16_000_000
"""Bytes; a number takes some twenty."""

ACCESS_DENIED = (401, 403, 407)
TRANSIENT = (408, 425, 429, 502, 503, 504)
# 413 too large may fit in halves; 500 is what frameworks make of an exception, of one row perhaps.
_MAYBE_ONE_ROW = (400, 413, 422, 500)
_REDIRECTS = (301, 302, 307, 308)
_OTHER_FORM = (400, 415, 422)

_LONGEST_RETRY_AFTER_S = 60.0
"""A server that wants to be left alone for longer is asked again all the same: it may have changed."""

_Form = Literal["texts", "list"]

ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True)
class Golden:
    """A text with values that a server must measure on it.

    normalize: whether the values are between 0 and 1 by the server's ranges; else as they are measured.
    """

    text: str
    goals: Mapping[str, float]
    tolerance: float
    normalize: bool


class _StatusError(ReplicaError):
    """An endpoint answered with another status than 200, which is `code`."""

    def __init__(self, failure: Failure, code: int) -> None:
        super().__init__(failure)
        self.code = code


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
        reply = await _within(timeout_s, self._post(body))
        return Reply(_parse_body(reply, self._dialect))

    async def server_statistics(self, timeout_s: float) -> ServerTimes | None:
        del timeout_s
        return None

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def _post(self, body: str) -> bytes:
        status, headers, reply = await self._exchange("POST", self._url, body)
        if status in _REDIRECTS and (slashed := _same_but_for_slash(self._url, headers)) is not None:
            status, headers, reply = await self._exchange("POST", slashed, body)
            if status == HTTPStatus.OK:
                self._url = slashed
        if status != HTTPStatus.OK:
            raise _StatusError(_status_failure(status, headers, self._url), status)
        return reply

    async def _exchange(
        self, method: str, url: str, body: str | None = None
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and, of a status 200, the body of one request."""
        async with self._open_client().stream(method, url, content=body) as response:
            reply = bytearray()
            if response.status_code != HTTPStatus.OK:
                return response.status_code, response.headers, b""
            async for part in response.aiter_bytes():
                reply += part
                if len(reply) > _REPLY_LIMIT:
                    _raise_invalid(f"the reply is larger than {_REPLY_LIMIT} bytes")
            return response.status_code, response.headers, bytes(reply)

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


class GoalsTransport(HttpTransport):
    """An endpoint that measures goals, in the dialect `goals`.

    goals: what is asked for, and how.
    golden: what a server must measure right each time that it is reached.
    partial: whether a goal without a value leaves the sample its others; else a goal that is named fails it.
    """

    def __init__(
        self,
        url: str,
        config: RewardClientConfig,
        headers: Mapping[str, str],
        context: ssl.SSLContext,
        goals: GoalServerConfig,
        golden: Sequence[Golden] = (),
        *,
        partial: bool = False,
    ) -> None:
        super().__init__(url, config, headers, context, "goals")
        self._goals = goals
        self._golden = golden
        self._partial = partial
        self._form: _Form = "list" if goals.form == "list" else "texts"

    async def describe(self, timeout_s: float) -> ModelInfo:
        """Find out which goals the server measures and in which form it is asked, and hold it against its
        golden texts."""
        return await _within(timeout_s, self._describe())

    async def infer(self, rows: Sequence[ScoringRow], timeout_s: float) -> Reply:
        body = self._body([row.sample for row in rows], self._form, normalize=self._goals.normalize)
        reply = await _within(timeout_s, self._post(body))
        return Reply(self._columns(reply))

    async def _describe(self) -> ModelInfo:
        listed = await self._listed_goals()
        if listed is not None:
            self._check_names(listed)
        columns = await self._find_form()
        without_ranges = not self._goals.normalize or any(not each.normalize for each in self._golden)
        if self._form == "list" and without_ranges:
            raise ReplicaError(
                Failure(
                    RewardStatus.INVALID,
                    "it takes a list of texts alone, which cannot ask for values without ranges: set "
                    "`reward.goal_server.form=list`, and leave `normalize=false` out",
                )
            )
        for golden in self._golden:
            body = self._body([golden.text], self._form, normalize=golden.normalize)
            self._check_golden(golden, _read_columns(await self._post(body)))
        return ModelInfo(
            max_rows=self._config.batch_rows,
            reads="outputs" if self._goals.send == "output" else "texts",
            reward_names=self._goals.names or tuple(sorted(columns)),
        )

    async def _listed_goals(self) -> list[str] | None:
        """Goals by GET /goals beside the path; None where the server has no such list."""
        status, headers, reply = await self._exchange("GET", _beside(self._url, "goals"))
        if status in (*ACCESS_DENIED, *TRANSIENT):
            raise ReplicaError(_status_failure(status, headers, self._url))
        try:
            content = json.loads(reply) if status == HTTPStatus.OK else None
        except (ValueError, RecursionError):
            return None
        listed = content.get("goals") if isinstance(content, dict) else content
        is_list = isinstance(listed, list) and all(isinstance(name, str) for name in listed)
        return [str(name) for name in listed] if is_list and listed else None

    async def _find_form(self) -> dict[str, list[float | None]]:
        """Ask for one text in the form that is set, or in the forms that there are, and keep the one that is
        answered."""
        forms: tuple[_Form, ...] = ("texts", "list") if self._goals.form == "auto" else (self._form,)
        for form in forms:
            self._form = form
            body = self._body([FIRST_TEXT], form, normalize=self._goals.normalize)
            try:
                return self._columns(await self._post(body))
            except _StatusError as error:
                if error.code not in _OTHER_FORM or form == forms[-1]:
                    if error.code in _OTHER_FORM:
                        raise ReplicaError(_no_form(error.code, forms)) from error
                    raise
        raise AssertionError("there is a form")

    def _body(self, texts: Sequence[str], form: _Form, *, normalize: bool) -> str:
        return json.dumps({"texts": texts, "normalize": normalize} if form == "texts" else texts)

    def _columns(self, reply: bytes) -> dict[str, list[float | None]]:
        """The goals that are asked for, of a reply that may have others."""
        columns = _read_columns(reply)
        names = self._goals.names
        if not names:
            return columns if not self._partial else {name: _partial(each) for name, each in columns.items()}
        self._check_names(columns)
        fill = _partial if self._partial else _needed
        return {name: fill(columns[name]) for name in names}

    def _check_names(self, measured: Iterable[str]) -> None:
        measured = list(measured)
        missing = [f"`{name}`" for name in self._goals.names if name not in measured]
        if missing:
            has = ", ".join(measured) or "none"
            raise ReplicaError(
                Failure(
                    RewardStatus.INVALID,
                    f"it does not measure {', '.join(missing)}; it has {has}: start it with that goal "
                    "(GOAL_DIMENSIONS), or correct `reward.goal_server.names`",
                )
            )

    def _check_golden(self, golden: Golden, columns: Mapping[str, Sequence[float | None]]) -> None:
        for name, wanted in golden.goals.items():
            values = columns.get(name, [])
            value = values[0] if len(values) == 1 else None
            if value is not None and abs(value - wanted) <= golden.tolerance:
                continue
            raise ReplicaError(
                Failure(
                    RewardStatus.INVALID,
                    f"it gives {'no value' if value is None else f'{value:g}'} for `{name}` on a golden "
                    f"text, expected {wanted:g} within {golden.tolerance:g}: its measures or ranges differ; "
                    "start it with those that were agreed on, or correct `reward.goal_server`",
                )
            )


async def _within(timeout_s: float, work: Coroutine[Any, Any, ValueT]) -> ValueT:
    """What `work` gives, or the failure that the client understands.

    Raises:
        ReplicaError: no reply in time, no connection, or a reply that cannot be read.
    """
    try:
        # The library's own deadlines are for each packet: a reply that drips would never end.
        return await asyncio.wait_for(work, timeout_s)
    except asyncio.TimeoutError:
        raise ReplicaError(Failure(RewardStatus.TIMEOUT, "no reply in time", retryable=True)) from None
    except httpx2.TransportError as error:
        raise ReplicaError(connection_failure(error, "reward.auth.tls")) from error
    except httpx2.HTTPError as error:
        _raise_invalid(f"the reply cannot be read ({type(error).__name__})")


def _body(rows: Sequence[ScoringRow], dialect: HttpDialect) -> Any:
    samples = [row.sample for row in rows]
    if dialect == "query":
        return {"query": samples}
    return {"query": samples, "dialogues": [dialogue_parts(row.dialogue) for row in rows]}


def _parse_body(reply: bytes, dialect: str) -> dict[str, list[float | None]]:
    content = _json_object(reply, parse_constant=lambda name: _raise_invalid(f"the reply holds {name}"))
    if "rewards" not in content:
        _raise_invalid('the reply has no "rewards"; for {goal: [...]} set `reward.dialect=goals`')
    return {DEFAULT_OBJECTIVE: _numbers(DEFAULT_OBJECTIVE, content["rewards"], may_lack=False)}


def _read_columns(reply: bytes) -> dict[str, list[float | None]]:
    """Goals with one value per text, NaN and null among them."""
    content = _json_object(reply, parse_constant=float)
    return {str(name): _numbers(name, values, may_lack=True) for name, values in content.items()}


def _json_object(reply: bytes, **how: Any) -> dict[str, Any]:
    try:
        content = json.loads(reply, **how)  # NaN is no JSON, but Python reads it
    except (ValueError, RecursionError):
        _raise_invalid("the reply is not JSON")
    if not isinstance(content, dict):
        _raise_invalid(f"the reply is a JSON {type(content).__name__}, expected an object")
    return content


def _partial(values: Sequence[float | None]) -> list[float | None]:
    """No value is None, so that what else was measured of the sample is kept."""
    return [None if value is None or math.isnan(value) else value for value in values]


def _needed(values: Sequence[float | None]) -> list[float | None]:
    """No value is NaN, which the client gives back as this sample's status."""
    return [math.nan if value is None else value for value in values]


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


def connection_failure(error: httpx2.TransportError, setting: str) -> Failure:
    """Return what a connection that failed means for the samples.

    setting: full name of the section with the certificates, for messages.
    """
    reason = str(error) or type(error).__name__
    if isinstance(error, httpx2.TimeoutException):
        return Failure(RewardStatus.TIMEOUT, "no connection in time", retryable=True)
    if not isinstance(error, httpx2.ConnectError):
        return Failure(RewardStatus.UNAVAILABLE, f"the connection broke ({reason})", retryable=True)
    # A certificate that does not verify and a host that does not exist stay so; a refused connection may not.
    lasting = any(isinstance(cause, ssl.SSLError) for cause in _causes(error)) or "[SSL" in reason
    detail = f"{reason}: check `{setting}`" if lasting else f"no connection ({reason})"
    return Failure(RewardStatus.UNAVAILABLE, detail, retryable=not lasting, is_down=True)


def _causes(error: BaseException | None) -> list[BaseException]:
    causes: list[BaseException] = []
    while error is not None:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def _same_but_for_slash(url: str, headers: Mapping[str, str]) -> str | None:
    """Where a redirect leads, if that is the same server's path with or without a slash behind it."""
    target = urljoin(url, headers.get("location", ""))
    before, after = urlsplit(url), urlsplit(target)
    same_server = (before.scheme, before.netloc) == (after.scheme, after.netloc)
    same_path = before.path.rstrip("/") == after.path.rstrip("/") and before.query == after.query
    return target if same_server and same_path and before.path != after.path else None


def _redirected(url: str, headers: Mapping[str, str]) -> str:
    target, own = urlsplit(urljoin(url, headers.get("location", ""))), urlsplit(url)
    if not headers.get("location"):
        return ""
    if (target.scheme, target.netloc) != (own.scheme, own.netloc):
        return " to another server, which is not followed"
    return f" to {target.path}, which is not followed"


def _beside(url: str, name: str) -> str:
    """The address of `name` in the folder of a URL's path: /a/goalspace/ -> /a/goals."""
    split = urlsplit(url)
    folder = split.path.rstrip("/").rpartition("/")[0]
    return urlunsplit((split.scheme, split.netloc, f"{folder}/{name}", "", ""))


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """How long a server wants to be left alone, in seconds: a number or a date (RFC 9110, section 10.2.3; one
    without a zone is UTC). None where it does not say; below 0 where that is over."""
    text = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return float(text)
    try:
        date = parsedate_to_datetime(text)
        return (date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return None


def _no_form(code: int, forms: Sequence[_Form]) -> Failure:
    sent = {"texts": '{"texts": [...]}', "list": "[text, ...]"}
    both = " and to ".join(sent[form] for form in forms)
    remedy = "" if len(forms) > 1 else "; `reward.goal_server.form=auto` tries the other form too"
    return Failure(
        RewardStatus.INVALID,
        f"HTTP {code} to {both}: it is asked for goals by POST at the path of `reward.url`, which should be "
        f"that of its goal space{remedy}",
    )


def _status_failure(status: int, headers: Mapping[str, str], url: str) -> Failure:
    phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "?"
    detail = f"HTTP {status} {phrase}"
    if status in _REDIRECTS:
        detail += _redirected(url, headers)
    if status in ACCESS_DENIED:
        detail += ": it wants a token; name its variable in `reward.auth.headers_env.authorization`"
        return Failure(RewardStatus.UNAVAILABLE, detail, is_down=True)
    if status in TRANSIENT:
        after_s = min(max(retry_after_s(headers) or 0.0, 0.0), _LONGEST_RETRY_AFTER_S)
        return Failure(RewardStatus.UNAVAILABLE, detail, retryable=True, retry_after_s=after_s)
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

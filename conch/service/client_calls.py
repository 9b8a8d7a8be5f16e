"""What both clients of a training service share: requests, what their answers mean, and when to try again."""

from __future__ import annotations

import logging
import os
import random
import ssl
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
from pydantic import BaseModel, ValidationError

from conch.errors import ServiceError, ServiceUnavailableError
from conch.service.protocol import (
    KEY_HEADER,
    KEY_VARIABLE,
    CompletionsBatch,
    CompletionsRequest,
    CompletionsResponse,
    Refusal,
    RewardsBatch,
    RewardsRequest,
    StatusResponse,
    TrainingSettings,
)
from conch.service.refusals import RefusedError

# Not conch.log's, which needs more than a client's machine has.
_log = logging.getLogger(__name__)

TRANSIENT = (408, 425, 429, 502, 503, 504)
_MORE_S = 30.0
"""Time for an answer beyond the wait that was asked for."""

_CONNECT_S = 10.0
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 10.0
_LONGEST_RETRY_AFTER_S = 60.0
_MAX_DETAIL = 500
_TURNED_AWAY = (
    "ALERT_HANDSHAKE_FAILURE",
    "ALERT_UNKNOWN_CA",
    "CERTIFICATE_REQUIRED",
    "ALERT_PROTOCOL_VERSION",
)
"""In reasons of OpenSSL: the other side has said that it will not have this client."""

_TOLD_BEHIND_S = 2.0
"""A service that is away is told of behind this time: a short break is nobody's business."""

UserPrompt = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""A text, messages, or a mapping with "prompt", which is one of these, and keys for the reward function."""

ReplyT = TypeVar("ReplyT", bound=BaseModel)


@dataclass(frozen=True)
class Access:
    """Where a service is, and how long to try.

    headers: of each request.
    client_id: who rewards what it was leased.
    wait_s: how long one request may wait for completions, in seconds.
    retry_s: how long to try again while the service is away or busy, in seconds.
    """

    url: str
    headers: Mapping[str, str]
    client_id: str
    wait_s: float
    retry_s: float

    @classmethod
    def of(
        cls, url: str, api_key: str | None, client_id: str | None, wait_s: float, retry_s: float
    ) -> Access:
        """Access with what is left out: the key from the environment, a client id of its own.

        Raises:
            ServiceError: there is no key or none that a header can carry, or the address is none.
        """
        key = os.environ.get(KEY_VARIABLE, "") if api_key is None else api_key
        if not key:
            raise ServiceError(f"no key: pass `api_key`, or set the environment variable {KEY_VARIABLE}")
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ServiceError(
                f"what `api_key` or {KEY_VARIABLE} holds is no key: it has signs, or an end of line, that no "
                "header can carry"
            )
        if not _is_address(url):
            raise ServiceError(
                f"`url` = {url!r} is no address of a service: write http://HOST:PORT, or https://HOST:PORT "
                "where it speaks TLS"
            )
        name = f"client-{uuid.uuid4().hex[:12]}" if client_id is None else client_id
        return cls(url.rstrip("/"), {KEY_HEADER: key}, name, wait_s, retry_s)

    def timeout(self, wait_s: float) -> httpx2.Timeout:
        """Limits of a request that may be made to wait."""
        return httpx2.Timeout(wait_s + _MORE_S, connect=_CONNECT_S)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port
        return False


@dataclass(frozen=True)
class Call:
    """One request.

    repeats: whether it may be sent again where it is not known if it came through.
    """

    method: str
    path: str
    body: BaseModel | None = None
    wait_s: float = 0.0
    repeats: bool = True

    @property
    def content(self) -> dict[str, Any]:
        """What is sent, as arguments of a client of httpx."""
        if self.body is None:
            return {}
        return {
            "content": self.body.model_dump_json(exclude_none=True),
            "headers": {"content-type": "application/json"},
        }


@dataclass
class Attempts:
    """When to send a request again, and when to give up."""

    access: Access
    call: Call
    _begun: float = field(init=False, default_factory=time.monotonic)
    _pause_s: float = field(init=False, default=_FIRST_PAUSE_S)
    _is_told: bool = field(init=False, default=False)

    def broken(self, error: httpx2.RequestError) -> float:
        """Seconds to wait before the request is sent again, after a connection broke.

        Raises:
            ServiceUnavailableError: it is not to be sent again.
            ServiceError: the two sides do not agree about TLS, which does not pass.
        """
        if (reason := _tls_problem(error)) is not None:
            raise ServiceError(f"{self.access.url}: {reason}") from error
        came_through = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
        message = f"{self.access.url} does not answer ({type(error).__name__}: {error})"
        if came_through and self.access.url.startswith("http:"):
            message += "; if it speaks TLS, write https://"
        if came_through and not self.call.repeats:
            raise ServiceUnavailableError(
                f"{message}; it may have done {self.call.path} all the same"
            ) from error
        self._tell(message)
        return self._next_pause(ServiceUnavailableError(message), None)

    def refused(self, reply: httpx2.Response) -> float:
        """The same, after an answer that is no success; its body has been read.

        Raises:
            RefusedError: asking again would not help.
            ServiceUnavailableError: there was no better answer for too long.
        """
        detail = detail_of(reply)
        if reply.status_code not in TRANSIENT:
            raise RefusedError(reply.status_code, f"{self.access.url}{self.call.path} refuses: {detail}")
        error = ServiceUnavailableError(f"{self.access.url}{self.call.path}: {detail}")
        return self._next_pause(error, retry_after_s(reply))

    def lost(self, error: ServiceError) -> float:
        """The same, after a request that may not be sent twice, once it is known not to have come through.

        Raises:
            ServiceError: that error, where asking again would not help, or there was none but such for too
                long.
        """
        if not isinstance(error, ServiceUnavailableError):
            raise error
        return self._next_pause(error, None)

    def postponed(self) -> float:
        """The same, after an answer that told a part of a batch to come again."""
        return self._next_pause(ServiceUnavailableError(f"{self.access.url} is busy"), None)

    def _tell(self, message: str) -> None:
        """Say once why nothing happens, to who waits before the screen."""
        if not self._is_told and time.monotonic() - self._begun >= min(_TOLD_BEHIND_S, self.access.retry_s):
            self._is_told = True
            _log.warning("%s: asked again, for up to %g s in all", message, self.access.retry_s)

    def _next_pause(self, error: ServiceUnavailableError, wanted_s: float | None) -> float:
        left_s = self._begun + self.access.retry_s - time.monotonic()
        if left_s <= 0:
            raise error
        pause_s = self._pause_s if wanted_s is None else wanted_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        # Many clients do not come back at once; and the last attempt is made when the time is over.
        return min(pause_s * random.uniform(0.8, 1.2), left_s)


def _tls_problem(error: BaseException | None) -> str | None:
    """Why no TLS connection will ever stand; None where there is another reason, or one that may pass."""
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not trusted ({error.verify_message}): pass "
            '`verify=ssl.create_default_context(cafile="ca.pem")` with the authority that signed it'
        )
    reason = "" if error is None else error.reason or ""
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):
        return "what answers speaks no TLS: write http://"
    if any(word in reason for word in _TURNED_AWAY):
        return (
            f"it turns this client away ({reason}): where it asks for certificates, give `verify` a context "
            "with one (`load_cert_chain`)"
        )
    return None


def detail_of(reply: httpx2.Response) -> str:
    """What an answer that is no success says."""
    try:
        return str(reply.json()["detail"])[:_MAX_DETAIL]
    except (ValueError, KeyError, TypeError):
        return f"HTTP {reply.status_code}"


def retry_after_s(reply: httpx2.Response) -> float | None:
    """When the service wants to be asked again, in seconds; None where it does not say."""
    try:
        return min(float(reply.headers["retry-after"]), _LONGEST_RETRY_AFTER_S)
    except (KeyError, ValueError):
        return None


def parsed(message: type[ReplyT], reply: httpx2.Response) -> ReplyT:
    """An answer as the message that it should be.

    Raises:
        ServiceError: it is none.
    """
    try:
        return message.model_validate_json(reply.content)
    except ValidationError as error:
        mistake = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, mistake["loc"])) or "all of it"
        raise ServiceError(
            f"{reply.request.url} is no training service of this release: its {message.__name__} cannot be "
            f"read ({place}: {mistake['msg']})"
        ) from error


# --------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class PromptRow:
    """A prompt as a user gives it: what is asked for, and the keys for the reward function."""

    prompt: str | list[dict[str, Any]]
    metadata: Mapping[str, Any]

    @classmethod
    def of(cls, row: UserPrompt) -> PromptRow:
        """Take a user's prompt apart.

        Raises:
            ServiceError: it is none.
        """
        if not isinstance(row, Mapping):
            return cls(_plain(row), {})
        if "prompt" not in row:
            raise ServiceError(f"a prompt that is a mapping has the key `prompt`, this one {sorted(row)}")
        return cls(_plain(row["prompt"]), {key: value for key, value in row.items() if key != "prompt"})


def _plain(prompt: Any) -> str | list[dict[str, Any]]:
    if prompt and isinstance(prompt, str):
        return str(prompt)
    try:
        messages: list[dict[str, Any]] = [dict(message) for message in prompt]
        if messages:
            return messages
    except (TypeError, ValueError):
        pass
    raise ServiceError(f"a prompt is a text or messages, and not empty, but not {str(prompt)[:80]!r}")


def endless(prompts: Sequence[UserPrompt]) -> Iterator[PromptRow]:
    """All prompts, again and again.

    Raises:
        ServiceError: there are none.
    """
    rows = [PromptRow.of(row) for row in prompts]
    if not rows:
        raise ServiceError("there are no prompts")
    while True:
        yield from rows


def new_requests(rows: Sequence[PromptRow], access: Access) -> list[CompletionsRequest]:
    """A request for each prompt, with an id that makes it safe to repeat."""
    return [
        CompletionsRequest(
            prompt=row.prompt,
            request_id=uuid.uuid4().hex,
            client_id=access.client_id,
            wait_s=access.wait_s,
        )
        for row in rows
    ]


@dataclass(frozen=True)
class Asked:
    """A prompt with the request for its completions."""

    row: PromptRow
    request: CompletionsRequest


def new_asked(rows: Sequence[PromptRow], access: Access) -> list[Asked]:
    """Prompts with requests for their completions."""
    return [Asked(*pair) for pair in zip(rows, new_requests(rows, access), strict=True)]


def reward_arguments(
    rows: Sequence[PromptRow], completions: Sequence[CompletionsResponse]
) -> dict[str, list[Any]]:
    """What a reward function is called with, each a list with one entry per completion.

    samples, prompts, outputs: texts; a prompt of messages is its rendering.
    and the prompts' extra keys, None where a prompt lacks one.
    """
    keys = dict.fromkeys(key for row in rows for key in row.metadata)
    arguments: dict[str, list[Any]] = {
        "samples": [],
        "prompts": [],
        "outputs": [],
        **{key: [] for key in keys},
    }
    for row, reply in zip(rows, completions, strict=True):
        for output in reply.completions:
            arguments["samples"].append(reply.prompt + output)
            arguments["prompts"].append(reply.prompt)
            arguments["outputs"].append(output)
            for key in keys:
                arguments[key].append(row.metadata.get(key))
    return arguments


def rewards_of(
    values: Any, completions: Sequence[CompletionsResponse], access: Access
) -> list[RewardsRequest]:
    """The posts of what a reward function gave for `reward_arguments`.

    Raises:
        ServiceError: it gave another number of rewards, or something else.
    """
    count = sum(len(reply.completions) for reply in completions)
    try:
        rewards = [None if value is None else float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ServiceError(f"the reward function gave no list of numbers: {error}") from error
    if len(rewards) != count:
        raise ServiceError(f"the reward function gave {len(rewards)} rewards for {count} completions")
    posts: list[RewardsRequest] = []
    for reply in completions:
        own, rewards = rewards[: len(reply.completions)], rewards[len(reply.completions) :]
        posts.append(RewardsRequest.from_completions(reply, own, access.client_id))
    return posts


def is_end(status: StatusResponse) -> bool:
    """Whether a run has made its last update.

    Raises:
        ServiceError: it has ended otherwise.
    """
    if status.state in ("failed", "stopped", "stopping"):
        raise ServiceError(f"run {status.run_id} is {status.state}: {status.error or 'it can be resumed'}")
    return status.state == "finished"


def goes_on(status: StatusResponse, settings: TrainingSettings | None) -> bool:
    """Whether a client that trains with these settings joins the run that is there.

    Raises:
        ServiceError: there is none, and no settings to start one with; or it is another run.
    """
    if status.state in ("starting", "running"):
        if settings is not None and not _is_same(status.training_settings, settings):
            raise ServiceError(f"run {status.run_id} is under way with other settings: stop it first")
        return True
    if settings is None:
        before = f"; run {status.run_id}, the last, is {status.state}" if status.run_id else ""
        raise ServiceError(f"no run is under way: give `settings` to start one with{before}")
    return False


def _is_same(there: TrainingSettings | None, ours: TrainingSettings) -> bool:
    """Whether settings that came over the network are these: a tuple among them has become a list."""
    return there is not None and there.model_dump(mode="json") == ours.model_dump(mode="json")


def is_started(before: StatusResponse, now: StatusResponse, settings: TrainingSettings) -> bool:
    """Whether there is a run with these settings behind a start that was refused, since another client was
    quicker, or whose answer was lost.

    before, now: of the service before and after it.
    """
    return now.run_id not in ("", before.run_id) and _is_same(now.training_settings, settings)


def raise_first(refused: Sequence[tuple[int, Refusal]], what: str) -> None:
    """Raise the first refusal of a batch, if there is one."""
    for _, refusal in refused:
        raise RefusedError(refusal.status, f"the service refuses {what}: {refusal.detail}")


def split_refusals(
    replies: Sequence[ReplyT | Refusal],
) -> tuple[dict[int, ReplyT], list[int], list[tuple[int, Refusal]]]:
    """Of a batch by index: what was answered, what to ask for again, and what was refused for good."""
    answered: dict[int, ReplyT] = {}
    again: list[int] = []
    refused: list[tuple[int, Refusal]] = []
    for index, reply in enumerate(replies):
        if not isinstance(reply, Refusal):
            answered[index] = reply
        elif reply.status in TRANSIENT:
            again.append(index)
        else:
            refused.append((index, reply))
    return answered, again, refused


def completions_call(requests: Sequence[CompletionsRequest], access: Access) -> Call:
    """Ask for completions of several prompts."""
    return Call("POST", "/completions/batch", CompletionsBatch(requests=[*requests]), access.wait_s)


def rewards_call(requests: Sequence[RewardsRequest]) -> Call:
    """Reward several groups; the answer comes once the longest wait of one of them is over."""
    wait_s = max((request.wait_s for request in requests), default=0.0)
    return Call("POST", "/rewards/batch", RewardsBatch(requests=[*requests]), wait_s)

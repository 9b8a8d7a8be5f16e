"""The addresses of a reward server; `conch.servers.listening` guards their port.

What is asked for every sample goes by itself, without FastAPI, whose work for a request would be a good part
of a small model's: body -> form -> `ScoringService` -> answer. All other addresses are FastAPI's.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from conch.errors import ConfigError, first_line
from conch.log import get_logger
from conch.reward_server.forms import ADDRESSES, addresses
from conch.reward_server.forms.base import (
    BAD_REQUEST,
    LATE,
    NOT_FOUND,
    UNAVAILABLE,
    UNPROCESSABLE,
    Form,
    Question,
    Reader,
    RefusedError,
    Scores,
    detail_error,
)
from conch.reward_server.forms.kserve import RAW, metadata
from conch.reward_server.metrics import CONTENT_TYPE, Meter
from conch.reward_server.readiness import Readiness
from conch.reward_server.service import OverloadedError, ScoringService
from conch.rewards.results import refuse_token_scores
from conch.rewards.scorer import total_reward
from conch.servers.listening import new_app
from conch.servers.refusals import retry_after
from conch.types import RewardResult, RewardStatus

_log = get_logger(__name__)

_INTERNAL = 500
_JSON_LENGTH = b"inference-header-content-length"
_WARN_EVERY_S = 30.0
_write_json = json.JSONEncoder(allow_nan=False).encode


@dataclass(frozen=True)
class Reward:
    """One reward of a server.

    name: that requests and metrics know it by.
    weights: of its objectives.
    make_reader: makes what reads requests, once the reward was reached.
    """

    name: str
    service: ScoringService
    readiness: Readiness
    weights: Mapping[str, float]
    make_reader: Callable[[], Reader]

    @cached_property
    def reader(self) -> Reader:
        """What reads requests."""
        return self.make_reader()


_Route = tuple[Reward | None, tuple[Form, ...]]


class RewardFront:
    """An ASGI application: scores at the addresses of all forms, and passes other requests on.

    rewards: one, or several, of which a request's `model` chooses.
    meter: counts what is answered.
    """

    def __init__(self, rewards: Sequence[Reward], meter: Meter) -> None:
        self.rewards = {reward.name: reward for reward in rewards}
        self.meter = meter
        self._others = _other_addresses(self.rewards, meter)
        only = rewards[0] if len(rewards) == 1 else None
        self._routes: dict[str, _Route] = {path: (only, forms) for path, forms in ADDRESSES.items()}
        for reward in rewards:
            self._routes |= {path: (reward, forms) for path, forms in addresses(reward.name)}
            meter.watch(
                reward.name,
                lambda service=reward.service: service.waiting,
                lambda readiness=reward.readiness: readiness.is_ready,
            )
        self._warned_at = -math.inf

    @property
    def app(self) -> FastAPI:
        """The application with all addresses but those that score; more can be added."""
        return self._others

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        route = None
        if scope["type"] == "http" and scope["method"] == "POST":
            route = self._routes.get(scope["path"])
        if route is None:
            await self._others(scope, receive, send)
            return
        started = time.perf_counter()
        form = route[1][0]
        status, retry_after_s, extra = 200, None, {}
        try:
            body = await _body_of(scope, receive)
            reward, form = self._choose(route, scope["path"], body)
            answer = await self._score(reward, form, body)
        except RefusedError as error:
            status, retry_after_s, reason = error.status, error.retry_after_s, str(error)
            extra = {"statuses": error.statuses} if isinstance(error, _FailedError) else {}
            answer = {**form.error(status, reason), **extra}
        except OverloadedError as error:
            status, retry_after_s = form.busy, error.retry_after_s
            answer = form.error(status, str(error))
        except ConfigError as error:
            status, answer = _INTERNAL, form.error(_INTERNAL, str(error))
        except Exception as error:
            _log.exception("a request could not be dealt with")
            status = _INTERNAL
            answer = form.error(status, f"the server broke: {type(error).__name__}; its log says more")
        self.meter.count(form.name, status, time.perf_counter() - started)
        await _send(send, status, answer, retry_after_s)

    def _choose(self, route: _Route, path: str, body: Any) -> tuple[Reward, Form]:
        """The reward and the form that a request asks for."""
        reward, forms = route
        form = next((each for each in forms if each.fits(body)), None)
        if form is None:
            raise RefusedError(BAD_REQUEST, _unknown_form(path, forms))
        if reward is None:
            name = body.get("model")
            reward = self.rewards.get(name) if isinstance(name, str) else None
            if reward is None:
                names = ", ".join(f"`{each}`" for each in self.rewards)
                what = "names no `model`" if name is None else f"names the `model` {name!r:.80}"
                raise RefusedError(
                    NOT_FOUND if name is not None else BAD_REQUEST,
                    f"the request {what}; there are {names}, also at /models/NAME{path}",
                )
        return reward, form

    async def _score(self, reward: Reward, form: Form, body: Mapping[str, Any]) -> Any:
        readiness = reward.readiness
        if not readiness.was_reached:
            raise RefusedError(
                UNAVAILABLE,
                f"the reward `{reward.name}` is not ready: {readiness.reason}",
                retry_after_s=readiness.every_s,
            )
        question = form.read(body, reward.reader)
        results = await reward.service.score(question.rollouts)
        totals = [total_reward(result, reward.weights) for result in results]
        results = [_as_number(*pair) for pair in zip(totals, results, strict=True)]
        self.meter.count_samples(reward.name, results)
        if not question.partial or not any(each.ok for each in results):
            self._refuse_failures(question, results)
        return question.answer(Scores(reward.name, totals, results, reward.weights))

    def _refuse_failures(self, question: Question, results: Sequence[RewardResult]) -> None:
        """Raise where a sample got no reward: 422 where asking again is useless, else 503 or 504."""
        failed = [result for result in results if not result.ok]
        if not failed:
            return
        worst = min(failed, key=lambda each: each.status.is_infrastructure)
        now = time.monotonic()
        if now - self._warned_at > _WARN_EVERY_S:
            self._warned_at = now
            _log.warning("samples get no reward, now: %s (%s)", worst.detail, worst.status.value)
        status = _STATUSES.get(worst.status, UNPROCESSABLE)
        share = f"{len(failed)} of {len(results)} samples" if len(results) > 1 else "the sample"
        raise _FailedError(
            status,
            f"{share} got no reward ({worst.status.value}): {worst.detail}",
            1.0 if worst.status.is_infrastructure else None,
            [each.status.value for each in results],
        )


_STATUSES = {RewardStatus.UNAVAILABLE: UNAVAILABLE, RewardStatus.TIMEOUT: LATE}


class _FailedError(RefusedError):
    """Samples got no reward. statuses: of all of the request's."""

    def __init__(self, status: int, reason: str, retry_after_s: float | None, statuses: list[str]) -> None:
        super().__init__(status, reason, retry_after_s)
        self.statuses = statuses


def _as_number(total: float, result: RewardResult) -> RewardResult:
    """A result; INVALID where it is OK, and is no number."""
    result = refuse_token_scores(result)
    if not result.ok or math.isfinite(total):
        return result
    return RewardResult(RewardStatus.INVALID, detail=f"its objectives add up to {total}")


def _unknown_form(path: str, forms: Sequence[Form]) -> str:
    here = "; ".join(form.shape for form in forms)
    there = ", ".join(each for each in ADDRESSES if each != path)
    return (
        f"the body is of no form that {path} reads: {here}. Other forms have other addresses: {there}, "
        "/v2/models/NAME/infer; docs/reward_server.md shows them"
    )


async def _body_of(scope: Any, receive: Any) -> Any:
    """The JSON of a request, which the guard has read; bytes behind it stand under `RAW`."""
    content, more = b"", True
    while more:
        message = await receive()
        content, more = content + message.get("body", b""), message.get("more_body", False)
    length = next((value for name, value in scope["headers"] if name == _JSON_LENGTH), None)
    raw = b""
    if length is not None:
        if not length.isdigit() or int(length) > len(content):
            raise RefusedError(BAD_REQUEST, "Inference-Header-Content-Length is no length within the body")
        content, raw = content[: int(length)], content[int(length) :]
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RefusedError(
            BAD_REQUEST, f"the body of {scope['path']} is no JSON: {first_line(error)}"
        ) from None
    if isinstance(body, dict):
        body[RAW] = raw  # whatever a client has written there
    return body


async def _send(send: Any, status: int, answer: Any, retry_after_s: float | None) -> None:
    content = _write_json(answer).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if retry_after_s is not None:
        headers.append((b"retry-after", retry_after(retry_after_s).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def _other_addresses(rewards: Mapping[str, Reward], meter: Meter) -> FastAPI:
    """Health, metrics, and what servers of KServe's protocol and of OpenAI's tell about themselves."""
    app = new_app("Conch rewards")
    _add_health(app, rewards)
    _add_descriptions(app, rewards)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(await asyncio.to_thread(meter.text), media_type=CONTENT_TYPE)

    @app.exception_handler(NOT_FOUND)
    async def nothing_here(request: Request, error: Exception) -> JSONResponse:
        del error
        path, places = request.url.path, ", ".join(ADDRESSES)
        reason = (
            f"there is nothing at {request.method} {path:.80}; scores are had by a POST to {places} or "
            "/v2/models/NAME/infer"
        )
        return JSONResponse(detail_error(NOT_FOUND, reason), NOT_FOUND)

    # FastAPI finds these by their annotations, which it reads from the module.
    del metrics, nothing_here
    return app


def _add_health(app: FastAPI, rewards: Mapping[str, Reward]) -> None:
    def is_ready() -> bool:
        return all(reward.readiness.is_ready for reward in rewards.values())

    @app.get("/health")
    async def health() -> dict[str, bool]:
        return {"ready": is_ready()}

    @app.get("/ready")
    @app.get("/v2/health/ready")
    async def ready() -> Any:
        return {"ready": True} if is_ready() else _not_ready(rewards)

    @app.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        return {"live": True}

    del health, ready, live


def _add_descriptions(app: FastAPI, rewards: Mapping[str, Reward]) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "conch"} for name in rewards]
        return {"object": "list", "data": listed}

    @app.get("/v2")
    async def server() -> dict[str, Any]:
        return {"name": "conch", "version": "2", "extensions": ["binary_tensor_data"]}

    @app.get("/v2/models/{name}")
    async def model(name: str) -> Any:
        return metadata(name) if name in rewards else _no_model(name)

    @app.get("/v2/models/{name}/ready")
    async def model_ready(name: str) -> Any:
        if name not in rewards:
            return _no_model(name)
        return {"name": name, "ready": True} if rewards[name].readiness.is_ready else _not_ready(rewards)

    @app.post("/v2/models/{name}/infer")
    async def unknown_model(name: str) -> Response:
        return _no_model(name)

    del models, server, model, model_ready, unknown_model


def _not_ready(rewards: Mapping[str, Reward]) -> JSONResponse:
    reasons = {name: each.readiness.reason for name, each in rewards.items() if each.readiness.reason}
    soonest_s = min(each.readiness.every_s for each in rewards.values())
    content = {"ready": False, "rewards": reasons}
    return JSONResponse(content, UNAVAILABLE, {"retry-after": retry_after(soonest_s)})


def _no_model(name: str) -> JSONResponse:
    return JSONResponse({"error": f"there is no model {name!r:.80} here"}, NOT_FOUND)

"""The addresses of a goal-space server.

    GET  /goals                                     {"goals": [name, ...]}
    POST /goalspace, /goalspace/    [text, ...]     {goal: [number or null, ...], ...}, numbers from 0 to 1
                                    {"texts": [text, ...], "normalize": true, "goals": [name, ...]}

The second form is that of the steerability benchmark's server, the first what its description says. `goals`
chooses some; without it all are measured. `return_pandas`, which its clients send, changes nothing. null says
that a goal has no value for a text. An error is {"detail": one sentence}, which repeats nothing of the texts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from conch.errors import ConfigError, RewardUnavailableError, first_line
from conch.log import get_logger
from conch.reward_server.service import LateError, OverloadedError
from conch.servers.refusals import retry_after

_log = get_logger(__name__)

Measure: TypeAlias = Callable[[Sequence[str], bool], Awaitable[Mapping[str, Sequence[float]]]]
"""Texts and whether to normalise -> goal -> one value per text, NaN where there is none."""

GOAL_DIMENSIONS, NORMALIZATION_PATH = "GOAL_DIMENSIONS", "NORMALIZATION_PATH"
"""Environment variables with the goals of a server and with the file of their ranges."""

_KEYS = ("texts", "normalize", "goals", "return_pandas")
_BAD_REQUEST, _UNPROCESSABLE, _BUSY, _INTERNAL, _UNAVAILABLE, _LATE = 400, 422, 429, 500, 503, 504
_AGAIN_S = 1.0
_FORMS = 'send a list of strings, or {"texts": [string, ...], "normalize": true}'


class _Question(NamedTuple):
    texts: list[str]
    normalize: bool = True
    goals: list[str] | None = None


class _RefusedError(Exception):
    """A request that cannot be answered; the message says why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def add_goalspace(app: FastAPI, measure: Measure, goals: Sequence[str] | Callable[[], Sequence[str]]) -> None:
    """Add the addresses above to an application.

    measure: may raise OverloadedError (429), RewardUnavailableError (503), LateError (504) and ConfigError
        (400).
    goals: their names, or what tells them once a request asks.
    """

    async def names(request: Request) -> Response:
        del request
        return JSONResponse({"goals": list(goals() if callable(goals) else goals)})

    async def goalspace(request: Request) -> Response:
        try:
            question = _read(await request.body(), goals() if callable(goals) else goals)
            values = await measure(question.texts, question.normalize)
        except _RefusedError as error:
            return _error(error.status, str(error))
        except OverloadedError as error:
            return _error(_BUSY, str(error), error.retry_after_s)
        except LateError as error:
            return _error(_LATE, str(error), _AGAIN_S)
        except RewardUnavailableError as error:
            return _error(_UNAVAILABLE, first_line(error), _AGAIN_S)
        except ConfigError as error:
            return _error(_BAD_REQUEST, first_line(error))
        except Exception as error:
            # The traceback of a user's goal may hold the text.
            _log.error("texts could not be measured: %s", type(error).__name__)
            return _error(_INTERNAL, f"the texts could not be measured: {_reason(error)}")
        chosen = {name: values[name] for name in question.goals or values}
        return Response(_written(chosen), media_type="application/json")

    app.add_api_route("/goals", names, methods=["GET"], response_model=None)
    for path in ("/goalspace", "/goalspace/"):
        app.add_api_route(path, goalspace, methods=["POST"], response_model=None)


def _reason(error: Exception) -> str:
    return first_line(error) if isinstance(error, TimeoutError) else type(error).__name__


def _written(values: Mapping[str, Sequence[float]]) -> str:
    columns = {name: [None if math.isnan(each) else each for each in of] for name, of in values.items()}
    return json.dumps(columns, allow_nan=False)


def _error(status: int, reason: str, retry_after_s: float | None = None) -> JSONResponse:
    headers = {} if retry_after_s is None else {"retry-after": retry_after(retry_after_s)}
    return JSONResponse({"detail": reason}, status, headers)


def _read(body: bytes, goals: Sequence[str]) -> _Question:
    """Read a request.

    Raises:
        _RefusedError: it is of neither form.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise _RefusedError(_BAD_REQUEST, f"the body is no JSON: {_FORMS}") from None
    if isinstance(content, list):
        return _Question(_strings(content, "the list"))
    if not isinstance(content, dict):
        raise _RefusedError(_UNPROCESSABLE, f"the body is {_kind(content)}: {_FORMS}")
    unknown = [key for key in content if key not in _KEYS]
    if unknown or "texts" not in content:
        wrong = f"an unknown key `{unknown[0]!s:.40}`" if unknown else "no `texts`"
        raise _RefusedError(_UNPROCESSABLE, f"the body has {wrong}; its keys are {', '.join(_KEYS)}")
    for key in ("normalize", "return_pandas"):
        if not isinstance(content.get(key, True), bool):
            raise _RefusedError(_UNPROCESSABLE, f"`{key}` is {_kind(content[key])}: write true or false")
    chosen = content.get("goals")
    if chosen is not None:
        chosen = _strings(chosen, "`goals`")
        missing = [name for name in chosen if name not in goals]
        if missing or not chosen:
            wrong = f"no goal `{missing[0]:.40}`" if missing else "no goal asked for"
            raise _RefusedError(_UNPROCESSABLE, f"there is {wrong}; this server has {', '.join(goals)}")
    return _Question(_strings(content["texts"], "`texts`"), content.get("normalize", True), chosen)


def _strings(value: Any, what: str) -> list[str]:
    if not isinstance(value, list):
        raise _RefusedError(_UNPROCESSABLE, f"{what} is {_kind(value)}: {_FORMS}")
    for place, each in enumerate(value):
        if not isinstance(each, str):
            wrong = f"entry {place} of {what} is {_kind(each)}, not a string"
            raise _RefusedError(_UNPROCESSABLE, wrong)
    return value


def _kind(value: Any) -> str:
    """What JSON calls a value of this kind."""
    if value is None:
        return "null"
    kinds = {bool: "true or false", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")

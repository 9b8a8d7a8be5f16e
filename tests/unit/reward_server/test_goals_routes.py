"""What a goal-space server answers where measuring fails; tests/integration has the server itself."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from conch.errors import ConfigError, RewardUnavailableError
from conch.reward_server.goalspace import add_goalspace
from conch.reward_server.service import LateError, OverloadedError
from conch.servers.listening import new_app


def ask(measure: Any, body: Any, path: str = "/goalspace") -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of an answer to a POST."""
    app = new_app("of a test")
    add_goalspace(app, measure, ["a", "b"])
    sent: list[Any] = []
    unread = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        return unread.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
    asyncio.run(app(scope, receive, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, json.loads(b"".join(each.get("body", b"") for each in sent[1:]))


@pytest.mark.parametrize(
    ("error", "status", "retry_after", "told"),
    [
        (OverloadedError("9 texts wait", 2.5), 429, "3", "9 texts wait"),
        (RewardUnavailableError("goal `a`: no connection\nmore"), 503, "1", "goal `a`: no connection"),
        (LateError("no values within 2 s"), 504, "1", "no values within 2 s"),
        (ConfigError("goal `a` has no range"), 400, None, "goal `a` has no range"),
        (ValueError("my secret text"), 500, None, "the texts could not be measured: ValueError"),
        (TimeoutError("took longer"), 500, None, "the texts could not be measured: took longer"),
    ],
)
def test_failures_are_statuses_with_a_sentence(
    error: Exception, status: int, retry_after: str | None, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def measure(texts: Sequence[str], normalize: bool) -> Mapping[str, Sequence[float]]:
        raise error

    code, headers, reply = ask(measure, ["my secret text"])
    assert (code, headers.get("retry-after"), reply) == (status, retry_after, {"detail": told})
    assert "secret" not in caplog.text


@pytest.mark.parametrize("path", ["/goalspace", "/goalspace/"])
def test_no_value_is_null_and_goals_are_chosen_in_order(path: str) -> None:
    async def measure(texts: Sequence[str], normalize: bool) -> Mapping[str, Sequence[float]]:
        assert normalize is False
        return {"a": [1.0, math.nan], "b": [0.25, -2.0]}

    body = {"texts": ["x", "y"], "normalize": False}
    assert ask(measure, body, path)[::2] == (200, {"a": [1.0, None], "b": [0.25, -2.0]})
    assert ask(measure, {**body, "goals": ["b"]}, path)[2] == {"b": [0.25, -2.0]}
    assert ask(measure, {**body, "goals": []}, path)[0] == 422

"""The page about the service: which answers it promises, and how it says that a key is sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conch.service.app import make_app
from conch.service.protocol import KEY_HEADER
from conch.service.runs.runs import Runs
from conch.service.service_config import ServiceConfig


@pytest.fixture
def schema(tmp_path: Path) -> dict[str, Any]:
    return make_app(Runs(tmp_path, idle_s=1.0, stop_s=1.0), ServiceConfig()).openapi()


def statuses(schema: dict[str, Any], path: str, method: str = "post") -> set[int]:
    return {int(status) for status in schema["paths"][path][method]["responses"]}


def test_page_names_every_status_of_what_clients_ask_for(schema: dict[str, Any]) -> None:
    assert {200, 400, 401, 404, 409, 410, 422, 429, 503} <= statuses(schema, "/completions")
    assert {200, 400, 401, 404, 409, 410, 422, 503} <= statuses(schema, "/rewards")
    assert {206, 404, 409, 416} <= statuses(schema, "/model", "get")
    assert 422 not in statuses(schema, "/rewards/batch")
    for path, operations in schema["paths"].items():
        assert all({200, 401, 413} <= statuses(schema, path, method) for method in operations)


def test_page_has_one_form_of_refusal_and_says_when_to_come_again(schema: dict[str, Any]) -> None:
    responses = schema["paths"]["/completions"]["post"]["responses"]
    forms = {
        response["content"]["application/json"]["schema"]["$ref"]
        for status, response in responses.items()
        if status != "200"
    }
    assert forms == {"#/components/schemas/Reason"}
    assert "detail" in schema["components"]["schemas"]["Reason"]["properties"]
    assert {status for status in responses if "headers" in responses[status]} == {"429", "503"}
    assert "HTTPValidationError" not in schema["components"]["schemas"]


def test_page_has_the_ways_to_send_the_key(schema: dict[str, Any]) -> None:
    ways = schema["components"]["securitySchemes"]
    assert {"key", "bearer", "password"} == {*ways} == {name for way in schema["security"] for name in way}
    assert (ways["key"]["in"], ways["key"]["name"]) == ("header", KEY_HEADER)


def test_page_is_the_same_every_time(tmp_path: Path) -> None:
    app = make_app(Runs(tmp_path, idle_s=1.0, stop_s=1.0), ServiceConfig())
    assert app.openapi() is app.openapi()

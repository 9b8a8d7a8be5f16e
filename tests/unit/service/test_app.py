"""The addresses without a run, and who is let in: a real port, no model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from conch.config import load
from conch.servers.listening import make_listener
from conch.service.app import make_app
from conch.service.protocol import KEY_HEADER
from conch.service.runs.runs import Runs
from conch.service.service_config import ServiceConfig
from tests.footprint import wait_until
from tests.launches import free_port

KEY = "right-key"


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A service with a folder in which a run was made once."""
    monkeypatch.setenv("KEY_OF_A_TEST", KEY)
    config = load(ServiceConfig, {"port": free_port(), "secret_env": "KEY_OF_A_TEST", "output_dir": tmp_path})
    runs = Runs(tmp_path, models=("allowed",), idle_s=1.0, stop_s=1.0)
    listener = make_listener(make_app(runs, config), config, takes_password=True, key_header=KEY_HEADER)
    thread = threading.Thread(target=lambda: asyncio.run(listener.serve()))
    thread.start()
    wait_until(lambda: listener.started, lambda: "the server does not listen")
    yield f"http://127.0.0.1:{config.port}"
    listener.should_exit = True
    thread.join(30)


def ask(url: str, method: str, path: str, **settings: Any) -> httpx2.Response:
    with httpx2.Client(trust_env=False, timeout=30) as client:
        return client.request(method, url + path, **{"headers": {KEY_HEADER: KEY}, **settings})


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({KEY_HEADER: KEY}, 200),
        ({"authorization": f"Bearer {KEY}"}, 200),
        ({}, 401),
        ({KEY_HEADER: "wrong-key"}, 401),
        ({KEY_HEADER: ""}, 401),
        ({"authorization": KEY}, 401),
        ({KEY_HEADER: "wrong-key", "authorization": f"Bearer {KEY}"}, 401),
    ],
)
def test_key_lets_in(url: str, headers: dict[str, str], status: int) -> None:
    assert ask(url, "GET", "/status", headers=headers).status_code == status


def test_key_as_a_password_opens_the_page_that_teaches(url: str) -> None:
    page = ask(url, "GET", "/docs", headers={}, auth=("any", KEY))
    assert page.status_code == 200 and "swagger" in page.text.lower()
    schema = ask(url, "GET", "/openapi.json").json()
    assert "POST /start" in schema["info"]["description"]
    assert {"TrainingSettings", "CompletionsRequest", "RewardsResponse"} <= {*schema["components"]["schemas"]}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "reason"),
    [
        ("POST", "/stop", None, 409, "no run was started"),
        ("POST", "/completions", {"prompt": "a"}, 409, "no run was started: POST /start first"),
        ("POST", "/rewards", {"rewards": [1.0]}, 409, "no run was started"),
        ("POST", "/model", {}, 409, "no run was started"),
        ("POST", "/model", {"version": 10**300}, 400, "`version`"),
        ("GET", "/model?version=-1", None, 400, "`version`"),
        ("GET", f"/model?version={10**300}", None, 400, "`version`"),
        ("GET", "/events", None, 409, "no run was started"),
        ("GET", "/training_settings", None, 409, "no run was started"),
        ("POST", "/resume", {"run_id": "../../etc"}, 404, "there is no run '../../etc'"),
        (
            "POST",
            "/start",
            {"model_id": "other"},
            409,
            "`model_id` is none of those that this service trains",
        ),
        ("POST", "/start", {"model_id": "m", "max_step": 3}, 400, "`max_step`"),
        ("POST", "/start", {"model_id": "m", "num_completions_per_prompt": 1}, 400, "num_completions_per"),
        ("POST", "/start", {"model_id": "m", "seed": 2**40}, 400, "`seed`"),
        ("POST", "/completions", {"prompt": ""}, 400, "`prompt"),
        ("POST", "/completions", {}, 400, "`prompt`"),
        ("POST", "/rewards", {"rewards": ["x"]}, 400, "`rewards.0"),
    ],
)
def test_request_that_the_state_forbids_is_refused_in_words(
    url: str, method: str, path: str, body: Any, status: int, reason: str
) -> None:
    reply = ask(url, method, path, json=body)
    assert (reply.status_code, reason in reply.json()["detail"]) == (status, True), reply.text


def test_status_before_the_first_run_is_that_of_none(url: str) -> None:
    status = ask(url, "GET", "/status").json()
    assert (status["state"], status["training_settings"], status["model_version"]) == ("none", None, ["", 0])
    assert ask(url, "GET", "/runs").json() == {"runs": []}

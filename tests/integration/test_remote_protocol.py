"""The service keeps what its OpenAPI page promises, whatever it is sent, in each state of a run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.configuration import set_hypothesis_home_dir

from conch.service.client import TrainingClient
from conch.service.protocol import KEY_HEADER
from tests.openapi_cases import Case, Cases, Operation, operations_of
from tests.services import KEY, Service, service, tiny_model, tiny_settings, vowel_rewards

# What Hypothesis writes beside its results goes where the tests' other caches are.
set_hypothesis_home_dir(os.path.join(os.environ.get("HF_HOME", tempfile.gettempdir()), "hypothesis"))

_EXAMPLES = 40
"""Of each address in each state."""

_LEASE_S = 30.0
_RETRIED = (429, 503)
# How long a request may take; a model that is there would make a start with drawn settings a run of its own.
ONLY = {"wait_s": [0, 0.3], "model_id": ["nowhere", "elsewhere"]}
EXPLORE = settings(
    max_examples=_EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[*HealthCheck],
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@contextmanager
def sending(running: Service) -> Iterator[Any]:
    """A function that sends a case, and gives the answer; of a stream without end only how it begins."""
    with httpx2.Client(trust_env=False, timeout=60, base_url=running.url) as client:

        def send(case: Case) -> httpx2.Response:
            headers = {KEY_HEADER: KEY, **case.headers}
            request = client.build_request(
                case.operation.method,
                case.operation.path,
                params=dict(case.query),
                headers=headers,
                content=case.body or None,
            )
            reply = client.send(request, stream=True)
            if reply.headers.get("content-type", "").startswith("text/event-stream"):
                reply.close()
            else:
                reply.read()
            return reply

        yield send


def explore(
    running: Service, left_out: Sequence[str] = (), known: Mapping[str, Sequence[Any]] | None = None
) -> set[tuple[str, int]]:
    """Send drawn requests to all addresses but some; returns which answered with which status."""
    page = running.ask("GET", "/openapi.json").json()
    cases = Cases(page, known or {}, ONLY)
    seen: set[tuple[str, int]] = set()
    with sending(running) as send:

        def keeps_its_promise(case: Case) -> None:
            reply = send(case)
            seen.add((case.operation.path, reply.status_code))
            check(reply, case.operation, page)

        for operation in operations_of(page):
            if operation.path not in left_out:
                EXPLORE(given(cases.of(operation))(keeps_its_promise))()
    assert running.process.poll() is None and running.ask("GET", "/status").status_code == 200
    return seen


def check(reply: httpx2.Response, operation: Operation, page: Mapping[str, Any]) -> None:
    """Hold an answer against what the page says of its address."""
    said = reply.text[:300] if reply.is_closed and reply.is_stream_consumed else ""
    assert reply.status_code in operation.statuses, (operation.path, reply.status_code, said)
    if reply.is_success:
        if operation.reply is not None:
            whole = {**operation.reply, "components": page["components"]}
            jsonschema.Draft202012Validator(whole).validate(reply.json())
        return
    # What is wrong with a range is told by whoever sends files.
    if not (operation.path == "/model" and "range" in reply.request.headers):
        assert isinstance(reply.json()["detail"], str) and reply.json()["detail"], said
    if reply.status_code in _RETRIED:
        assert int(reply.headers["retry-after"]) >= 1, operation.path


def check_right_requests(running: Service) -> None:
    """Ask and reward as the page says, alone and in a batch."""
    page = running.ask("GET", "/openapi.json").json()
    operations = {each.path: each for each in operations_of(page)}

    def ask(path: str, body: dict[str, Any]) -> dict[str, Any]:
        reply = running.ask("POST", path, json=body)
        assert reply.status_code == 200, reply.text
        check(reply, operations[path], page)
        return reply.json()

    [got] = ask("/completions/batch", {"requests": [{"prompt": "ab"}]})["replies"]
    post = {name: got[name] for name in ("sample_ids", "token_hashes")}
    post["rewards"] = [1.0, 2.0, None, 3.0]
    ask("/rewards", post)
    ask("/rewards/batch", {"requests": [post]})
    ask("/completions", {"prompt": "cd"})


def test_every_answer_is_one_that_the_page_has(model: Path, tmp_path: Path) -> None:
    allowed = f"[nowhere, {model}]"
    with service(tmp_path / "runs", models=allowed) as running:
        seen = explore(running)
        assert {("/completions", 409), ("/start", 422), ("/start", 409), ("/resume", 404)} <= seen

        changes = {"lease_s": _LEASE_S, "max_steps": 10_000, "save_every": 10_000}
        with TrainingClient(running.url, KEY, client_id="known") as client:
            client.start(tiny_settings(model, **changes))
            groups = [client.get_completions(prompt) for prompt in ("ab", "cd", "ef")]
            client.submit_rewards(groups[0], vowel_rewards(groups[0].completions))
            known = {
                "sample_ids": [each.sample_ids for each in groups],
                "token_hashes": [each.token_hashes for each in groups],
                "completion_tokens": [each.completion_tokens for each in groups],
                "rewards": [[1.0, 2.0, 3.0, 4.0], vowel_rewards(groups[0].completions)],
                "run_id": [groups[0].model_version[0]],
                "client_id": ["known", ""],
                "request_id": ["r1", "r2"],
                "prompt": ["ab", "cd", "abcdefgh" * 2],
                "version": [0, 1, 10**300],
            }
            check_right_requests(running)
            seen = explore(running, ("/stop",), known)
            # What is drawn reaches refusals of every kind; right requests were sent above.
            assert {200, 404, 409, 422} <= {status for _, status in seen}
            assert {("/start", 409), ("/events", 200)} <= seen
            assert running.status()["state"] == "running"
            client.stop()
        seen = explore(running, (), known)
        assert {("/completions", 409), ("/stop", 409), ("/model", 200)} <= seen


def test_answers_without_the_key_are_of_the_page_too(tmp_path: Path) -> None:
    with service(tmp_path / "runs") as running:
        page = running.ask("GET", "/openapi.json").json()
        for operation in operations_of(page):
            reply = running.ask(operation.method, operation.path, headers={KEY_HEADER: "wrong"})
            assert reply.status_code == 401
            check(reply, operation, page)
        reply = running.ask("POST", "/completions", content=b"x" * 65_000_000)
        assert reply.status_code == 413

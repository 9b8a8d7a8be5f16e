"""`conch.serving up`: what it refuses before anything starts, and how it judges a server that is up."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from conch.serving.__main__ import main
from conch.serving.deployment import state as deployment
from conch.store.store import read_model
from tests.fakes.triton_server import EXTENSIONS, FakeTriton, fail, response
from tests.stores import store_model

MODEL = "lengths"


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    store_model(tmp_path / "store", MODEL)
    return tmp_path / "store"


@pytest.fixture
def fake(store: Path) -> Iterator[FakeTriton]:
    """A server that is up and scores like the model in the store."""
    with FakeTriton(read_model(store, MODEL).spec, lambda text: [len(text)]) as server:
        yield server


def up(store: Path, *arguments: str) -> int:
    return main(["up", "--model-store", str(store), "--model", MODEL, *arguments])


def check(store: Path, fake: FakeTriton) -> int:
    return up(store, "--url", f"127.0.0.1:{fake.port}", "--ready-timeout", "60")


def test_a_server_that_scores_right_is_ready(store: Path, fake: FakeTriton, capsys: Any) -> None:
    assert check(store, fake) == 0
    assert capsys.readouterr().out == f"export TRITON_HOST={fake.url}\n"
    assert fake.requests == [["ab"]]


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (("triton", "1.15.0", EXTENSIONS), "the server is triton 1.15.0; Conch needs Triton 2.x"),
        (("triton", "3.0.0", EXTENSIONS), "the server is triton 3.0.0; Conch needs Triton 2.x"),
        (("OpenVINO Model Server", "2.0", EXTENSIONS), "the server is OpenVINO Model Server 2.0;"),
        (("triton", "2.51.0", ["statistics"]), "triton 2.51.0, without model_configuration; Conch needs"),
        (("", "", []), "nameless of unknown version, without model_configuration, statistics;"),
        (None, "the server does not say what it is: Method not found!"),
    ],
)
def test_a_server_of_another_kind_or_version_is_refused(
    store: Path, fake: FakeTriton, capsys: Any, told: Any, expected: str
) -> None:
    fake.told = told
    assert check(store, fake) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and expected in said and said.count("\n") == 1
    assert fake.requests == []


def test_a_server_that_scores_wrong_is_not_ready(store: Path, fake: FakeTriton, capsys: Any) -> None:
    fake.score = lambda text: [len(text) + 0.01]
    assert check(store, fake) == 1
    assert "lengths version 1 is not ready: golden sample 0 scores [2.00999" in capsys.readouterr().err


def test_a_score_that_is_not_a_number_is_not_ready(store: Path, fake: FakeTriton, capsys: Any) -> None:
    fake.score = lambda text: [float("nan")]
    assert check(store, fake) == 1
    assert "golden sample 0 scores [nan], expected [2.0]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            lambda rows, context: response(np.float32([[2, 2]])),
            "golden sample 0 got a reply of another shape",
        ),
        (
            lambda rows, context: response(np.float32([[2]]), version="7"),
            "version 7 answers, the store's latest is 1",
        ),
        (fail(grpc.StatusCode.INTERNAL, "no such luck"), "golden sample 0 got no score: .*no such luck"),
    ],
)
def test_a_reply_that_is_no_score_is_told(
    store: Path, fake: FakeTriton, capsys: Any, answer: Any, expected: str
) -> None:
    fake.script.append(answer)
    assert check(store, fake) == 1
    assert re.search(expected, capsys.readouterr().err)


def test_a_server_that_is_not_ready_in_time_is_told_with_what_it_lacks(
    store: Path, fake: FakeTriton, capsys: Any
) -> None:
    url = f"127.0.0.1:{fake.port}"
    fake.ready = False
    assert up(store, "--url", url, "--ready-timeout", "2") == 1
    assert f"{url} was not ready in time (it says that it is not ready)" in capsys.readouterr().err
    fake.stop()
    assert up(store, "--url", url, "--ready-timeout", "0.2") == 1
    assert f"{url} was not ready in time (" in capsys.readouterr().err


CERTIFICATE = ["--tls-cert", "c.pem", "--tls-key", "k.pem"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--replicas", "0"], "--replicas 0: at least 1 is needed"),
        (["--cpu-threads", "0"], "--cpu-threads 0: at least 1 is needed"),
        (["--max-restarts", "-1"], "--max-restarts -1: at least 0 is needed"),
        (["--log-keep", "-1"], "--log-keep -1: at least 0 is needed"),
        (["--ready-timeout", "0"], "--ready-timeout 0: it must be above 0"),
        (["--watch-interval", "nan"], "--watch-interval nan: it must be above 0"),
        (["--log-max-mb", "-2"], "--log-max-mb -2: it must be above 0"),
        (["--replicas", "2", "--log-file", "x.log"], "--log-file is for one server"),
        (["--image", "x.sif"], "--image needs --runtime apptainer or --runtime docker"),
        (["--runtime", "apptainer"], "--runtime apptainer needs --image"),
        (["--runtime", "docker"], "--runtime docker needs --image"),
        (["--tls-cert", "c.pem"], "--tls-cert and --tls-key belong together"),
        (["--tls-ca", "c.pem"], "--tls-ca and --require-client-cert need --tls-cert and --tls-key"),
        (["--require-client-cert"], "--tls-ca and --require-client-cert need --tls-cert and --tls-key"),
        (["--secret-env", "CONCH_NOT_SET"], "CONCH_NOT_SET"),
        (["--url", "h:1", "--tls-key", "k.pem"], "--tls-cert and --tls-key belong together"),
        (["--url", "h:1", *CERTIFICATE], "--tls-cert needs --tls-ca"),
        (["--url", "h:1", "--detach", "--gpu", "7"], "so --detach, --gpu would have no effect"),
        (["--url", "h:1", "--replicas", "2"], "so --replicas would have no effect"),
        (["--url", "h:1", "--runtime", "docker", "--image", "i"], "so --image, --runtime would have no"),
    ],
)
def test_arguments_that_do_not_fit_are_named_before_anything_starts(
    store: Path, capsys: Any, arguments: list[str], expected: str
) -> None:
    assert up(store, *arguments) == 1
    said = capsys.readouterr().err
    assert expected in said and said.startswith("error: ") and said.count("\n") == 1
    assert deployment.names() == []


@pytest.mark.parametrize("command", ["down", "logs", "swap"])
def test_commands_without_a_deployment_say_so(capsys: Any, command: str) -> None:
    assert main([command]) == 1
    assert "error: no deployment runs" in capsys.readouterr().err


def test_status_without_a_deployment_says_how_to_start_one(capsys: Any) -> None:
    assert main(["status"]) == 0
    said = capsys.readouterr()
    assert said.err == "no deployment runs; start one with conch serve up --detach\n" and not said.out


def test_status_without_a_deployment_is_empty_for_programs(capsys: Any) -> None:
    assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {}
    assert main(["status", "nowhere"]) == 1

"""The health check of a service, asked from within its container."""

from __future__ import annotations

from pathlib import Path

import pytest

from conch.errors import ServiceUnavailableError
from conch.service.__main__ import main
from conch.service.health import ask_health
from conch.service.protocol import KEY_VARIABLE
from conch.service.service_config import ServiceConfig
from tests.certificates import make_certificates
from tests.fakes.training_service import Answer, fake_service
from tests.unit.service.test_client_tls import listening, server_context

RUNNING: Answer = (200, {"state": "running"})


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "key")


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_service_that_answers_is_healthy_wherever_it_listens(host: str) -> None:
    with fake_service(status=[RUNNING]) as fake:
        assert ask_health(ServiceConfig(port=port_of(fake.url), host=host)) == "running"
        [sent] = fake.sent_to("/status")
    assert sent["api-key"] == "key"


def test_command_asks_with_settings_of_the_environment_and_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_service(status=[RUNNING]) as fake:
        monkeypatch.setenv("CONCH_SERVICE_PORT", str(port_of(fake.url)))
        main(["health"])
        main(["health", "--port", str(port_of(fake.url)), "--api_key", "other"])
        assert [each["api-key"] for each in fake.sent_to("/status")] == ["key", "other"]
    assert capsys.readouterr().out == "running\nrunning\n"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, {"detail": "another secret"}), "refuses: another secret"),
        ((200, {"other": 1}), "does not answer"),
        ((200, []), "does not answer"),
        ((0, None), "does not answer"),
    ],
)
def test_service_that_answers_otherwise_is_not_healthy(answer: Answer, words: str) -> None:
    with fake_service(status=[answer]) as fake, pytest.raises(ServiceUnavailableError, match=words):
        ask_health(ServiceConfig(port=port_of(fake.url)))


def test_service_that_is_away_is_not_healthy() -> None:
    with fake_service(status=[RUNNING]) as fake:
        port = port_of(fake.url)
    with pytest.raises(ServiceUnavailableError, match=f"port {port}, does not answer: .*refused"):
        ask_health(ServiceConfig(port=port))


def test_service_with_tls_is_asked_by_its_own_certificate(tmp_path: Path) -> None:
    files = make_certificates(tmp_path, "somewhere.example")
    own = {"tls_cert": files.server, "tls_key": files.server_key}
    with listening(server_context(files), b'{"state": "none"}') as port:
        assert ask_health(ServiceConfig(port=port, **own)) == "none"
        other = {"tls_cert": files.stranger, "tls_key": files.stranger_key}
        with pytest.raises(ServiceUnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
            ask_health(ServiceConfig(port=port, **other))


def test_service_that_asks_for_certificates_is_healthy_where_it_listens(tmp_path: Path) -> None:
    files = make_certificates(tmp_path)
    own = {"tls_cert": files.server, "tls_key": files.server_key, "tls_ca": files.ca}
    with listening(server_context(files, asks=True)) as port:
        config = ServiceConfig(port=port, require_client_cert=True, **own)
        assert ask_health(config) == "listening"
    with pytest.raises(ServiceUnavailableError):
        ask_health(config)

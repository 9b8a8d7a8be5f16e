"""Settings of a server in environment variables, as containers have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from conch.errors import ConfigError
from conch.servers.settings import load_settings, pairs_from_environment
from conch.service.__main__ import main, with_environment
from conch.service.protocol import KEY_VARIABLE
from conch.service.service_config import SETTINGS_PREFIX, ServiceConfig


def test_variables_are_settings_with_their_types() -> None:
    environment = {
        "CONCH_SERVICE_PORT": "9001",
        "CONCH_SERVICE_OUTPUT_DIR": "/data",
        "CONCH_SERVICE_MODELS": '["models/start", "org/name"]',
        "CONCH_SERVICE_RESTART": "false",
        "CONCH_SERVICE_ROLLOUT": "{engine: vllm}",
        "CONCH_SERVICE_IDLE_S": "",
        "CONCH_SERVER_PARENT": "17",
        KEY_VARIABLE: "the-key",
    }
    pairs = pairs_from_environment(ServiceConfig, SETTINGS_PREFIX, environment, others=(KEY_VARIABLE,))
    config = load_settings(ServiceConfig, pairs)
    assert (config.port, config.output_dir, config.restart) == (9001, Path("/data"), False)
    assert config.models == ("models/start", "org/name")
    assert config.rollout.engine == "vllm"
    assert config.idle_s == ServiceConfig().idle_s
    assert not any("the-key" in pair for pair in pairs)


def test_variable_that_is_no_setting_is_refused_with_those_that_are() -> None:
    for name in ("CONCH_SERVICE_PROT", "CONCH_SERVICE_PORT_8000_TCP", "CONCH_SERVICE_API_KEY"):
        with pytest.raises(
            ConfigError, match=rf"{name} is no setting: there are {KEY_VARIABLE}, CONCH_SERVICE_PORT,"
        ):
            pairs_from_environment(ServiceConfig, SETTINGS_PREFIX, {name: "1"}, others=(KEY_VARIABLE,))


def test_variable_with_the_secret_is_no_setting() -> None:
    environment = {"CONCH_SERVICE_SECRET_ENV": "CONCH_SERVICE_MINE", "CONCH_SERVICE_MINE": "s"}
    assert pairs_from_environment(ServiceConfig, SETTINGS_PREFIX, environment) == [
        "secret_env=CONCH_SERVICE_MINE"
    ]


def test_command_line_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONCH_SERVICE_PORT", "9001")
    monkeypatch.setenv("CONCH_SERVICE_MAX_WAITING", "5")
    config = load_settings(ServiceConfig, with_environment(["port=9002"]))
    assert (config.port, config.max_waiting) == (9002, 5)


def test_help_is_shown_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CONCH_SERVICE_PROT", "9001")
    main(["--help"])
    assert "max_waiting: int" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="CONCH_SERVICE_PROT is no setting"):
        main(["--restart=false"])

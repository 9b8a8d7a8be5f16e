"""The command line of the service, and of the first service's name."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conch.errors import ConfigError, ServerStartError
from conch.servers.settings import load_settings, pairs_from_environment
from conch.service.__main__ import main, taking_key
from conch.service.protocol import KEY_VARIABLE
from conch.service.service_config import SETTINGS_PREFIX, ServiceConfig
from tests.launches import ROOT


def test_key_of_the_command_line_goes_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "old")
    assert taking_key(["api_key=new", "output_dir=/d"]) == ["output_dir=/d"]
    assert os.environ[KEY_VARIABLE] == "new"


def test_service_without_a_key_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=f"environment variable {KEY_VARIABLE}"):
        main(["--restart=false", "--output_dir", str(tmp_path)])


def test_service_beyond_this_machine_asks_for_a_key() -> None:
    assert ServiceConfig(host="0.0.0.0").secret_env == KEY_VARIABLE
    with pytest.raises(ValueError, match="trains models and downloads them"):
        ServiceConfig(host="0.0.0.0", secret_env=None)


@pytest.mark.parametrize(
    ("command", "folder"),
    [("conch.service", "."), ("grpo_server.uvicorn_main", "examples/remote")],
)
def test_help_lists_the_keys(command: str, folder: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", command, "--help"],
        cwd=ROOT / folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "output_dir: Path" in result.stdout


def test_service_whose_port_is_taken_says_so_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "key")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ServerStartError, match=f"`port` = {port} .* cannot be listened on"):
            main(["--restart=false", "--port", str(port), "--output_dir", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


def test_one_model_needs_no_list() -> None:
    [pair] = pairs_from_environment(ServiceConfig, SETTINGS_PREFIX, {"CONCH_SERVICE_MODELS": "/models/start"})
    assert load_settings(ServiceConfig, [pair]).models == ("/models/start",)
    assert load_settings(ServiceConfig, ['models=["a", "b"]']).models == ("a", "b")

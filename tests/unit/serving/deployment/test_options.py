"""The options of `conch serve`: from a command line to sections, and over to a detached supervisor."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from conch.cli import add_options, parse_options
from conch.config import Section
from conch.errors import ConfigError
from conch.serving.deployment.options import DownOptions, LogsOptions, StatusOptions, SwapOptions, UpOptions
from conch.serving.deployment.up import describe, plan

EVERY_OPTION = [
    "--model-store", "my store", "--model", "walks", "--model", "ens", "--name", "mine", "--detach",
    "--runtime", "apptainer", "--image", "x.sif", "--gpu", "7", "--gpu", "GPU-1f", "--replicas", "3",
    "--cpu-threads", "2", "--server-flag=--log-verbose=1", "--server-flag=--rate-limit=off",
    "--host", "0.0.0.0", "--grpc-port", "0", "--http-port", "8000", "--metrics-port", "0",
    "--tls-cert", "c.pem", "--tls-key", "k.pem", "--tls-ca", "ca.pem", "--require-client-cert",
    "--secret-env", "SECRET", "--ready-timeout", "inf", "--watch-interval", "0.2", "--max-restarts", "0",
    "--metrics-host", "0.0.0.0", "--allow-anyone", "--follow-store", "--log-max-mb", "1.5", "--log-keep", "0",
]  # fmt: skip


def parsed(section: type[Section], *arguments: str) -> Any:
    parser = argparse.ArgumentParser()
    add_options(parser, section)
    return parse_options(section, vars(parser.parse_args(arguments)))


def test_up_without_options_has_the_defaults_that_users_know() -> None:
    assert parsed(UpOptions, "--model", "walks").model_dump(mode="json") == {
        "model_store": "model_store",
        "models": ["walks"],
        "name": None,
        "detach": False,
        "placement": {
            "runtime": "bundled",
            "image": None,
            "url": None,
            "gpus": [],
            "replicas": 1,
            "cpu_threads": 1,
            "server_flags": [],
        },
        "network": {
            "host": "127.0.0.1",
            "grpc_port": 8001,
            "http_port": None,
            "metrics_port": None,
            "metrics_host": "127.0.0.1",
            "tls_cert": None,
            "tls_key": None,
            "tls_ca": None,
            "require_client_cert": False,
            "secret_env": None,
            "allow_anyone": False,
        },
        "supervision": {
            "ready_timeout": 120.0,
            "watch_interval": 30.0,
            "max_restarts": 5,
            "follow_store": False,
            "log_file": None,
            "log_max_mb": 10.0,
            "log_keep": 3,
        },
    }


def test_every_option_of_up_reaches_its_field() -> None:
    options = parsed(UpOptions, *EVERY_OPTION)
    unchanged = [
        f"{type(section).__name__}.{name}"
        for section in (options, options.placement, options.network, options.supervision)
        for name, field in type(section).model_fields.items()
        if getattr(section, name) == field.get_default(call_default_factory=True, validated_data={})
    ]

    assert unchanged == ["PlacementOptions.url", "SupervisionOptions.log_file"]  # which need others left out
    assert options.placement.gpus == ("7", "GPU-1f")
    assert options.placement.server_flags == ("--log-verbose=1", "--rate-limit=off")
    assert options.model_store == Path("my store")


def test_options_survive_the_way_to_a_detached_supervisor() -> None:
    options = parsed(UpOptions, *EVERY_OPTION)

    assert UpOptions.model_validate_json(options.model_dump_json()) == options


@pytest.mark.parametrize(
    ("section", "arguments", "expected"),
    [
        (DownOptions, [], {"name": None, "all": False, "timeout": 60.0}),
        (DownOptions, ["mine", "--timeout", "5"], {"name": "mine", "all": False, "timeout": 5.0}),
        (SwapOptions, ["mine"], {"name": "mine", "timeout": 600.0}),
        (
            LogsOptions,
            ["-f", "-n", "7"],
            {"name": None, "follow": True, "lines": 7, "replica": 0, "supervisor": False},
        ),
    ],
)
def test_options_of_other_commands_reach_their_fields(
    section: type[Section], arguments: list[str], expected: dict[str, object]
) -> None:
    assert parsed(section, *arguments).model_dump() == expected


@pytest.mark.parametrize(
    ("section", "arguments", "sentence"),
    [
        (LogsOptions, ["-n", "-1"], "--lines -1: at least 0 is needed"),
        (StatusOptions, ["--interval", "-0.5"], "--interval -0.5: at least 0 is needed"),
        (StatusOptions, ["--url", "h:1", "--tls-key", "k"], "--tls-cert and --tls-key belong together"),
        (
            UpOptions,
            ["--model", "a", "--replicas", "0", "--log-max-mb", "0"],
            "--replicas 0: at least 1 is needed; --log-max-mb 0: it must be above 0",
        ),
    ],
)
def test_options_that_do_not_fit_are_named_in_a_sentence(
    section: type[Section], arguments: list[str], sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(section, *arguments)
    assert str(caught.value) == sentence


def test_plan_has_replicas_with_ports_ten_apart_that_take_the_gpus_in_turn(tmp_path: Path) -> None:
    arguments = ["--replicas", "3", "--gpu", "4", "--gpu", "6", "--http-port", "8100", "--metrics-port", "0"]
    image = ["--runtime", "docker", "--image", "i"]
    servers = plan(parsed(UpOptions, "--model", "walks", *arguments, *image), tmp_path)

    assert [server.options.gpu for server in servers] == ["4", "6", "4"]
    assert [server.options.http_port for server in servers] == [8100, 8110, 8120]
    assert [server.options.metrics_port for server in servers] == [0, 0, 0]  # each takes a free one
    assert [server.log_file for server in servers] == [tmp_path / f"replica-{n}.log" for n in range(3)]


def test_description_of_a_deployment_names_its_store_by_the_whole_path() -> None:
    deployment = describe(parsed(UpOptions, "--model", "walks", "--secret-env", "SECRET"), "mine")

    assert deployment.model_store == Path("model_store").resolve()
    assert (deployment.name, deployment.models, deployment.secret_env) == ("mine", ("walks",), "SECRET")
    assert deployment.tls_ca is None and deployment.replicas == ()

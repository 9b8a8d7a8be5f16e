from __future__ import annotations

from pathlib import Path

import pytest

from conch.access.tls import ServerTls
from conch.addresses import is_loopback
from conch.errors import ServerStartError
from conch.serving.server.flags import ServerPaths, ServerSettings, known_flags, server_flags
from conch.serving.server.runtime import (
    ApptainerRuntime,
    BundledRuntime,
    DockerRuntime,
    apptainer_command,
    apptainer_environment,
    docker_command,
)

HELP = BundledRuntime().help_text()
PLACES = ServerPaths("/store", "/tmp/s/repository", "/backends", "conch_1_", "/c.pem", "/k.pem", "/ca.pem")
SETTINGS = ServerSettings(Path("/host/store"), ("walks",), grpc_port=8001)


def settings(**changes) -> ServerSettings:
    return ServerSettings(
        **{**dict(model_store=Path("/store"), models=("walks",), grpc_port=8001), **changes}
    )


def flags(asked: ServerSettings) -> list[str]:
    return server_flags(asked, PLACES, known_flags(HELP))


def test_server_listens_on_loopback_and_offers_grpc_alone() -> None:
    made = flags(SETTINGS)
    assert {"--grpc-address=127.0.0.1", "--grpc-port=8001", "--allow-http=0", "--allow-metrics=0"} <= {*made}
    assert {"--model-control-mode=explicit", "--load-model=walks", "--model-config-name=embedded"} <= {*made}
    assert not any("restricted" in flag or "ssl" in flag for flag in made)


def test_metrics_have_an_address_of_their_own() -> None:
    made = flags(settings(host="0.0.0.0", http_port=8000, metrics_port=8002, secret="s3"))
    assert {"--grpc-address=0.0.0.0", "--http-address=0.0.0.0", "--metrics-address=127.0.0.1"} <= {*made}
    assert "--metrics-address=10.0.0.7" in flags(settings(metrics_port=8002, metrics_host="10.0.0.7"))


def test_a_gpu_takes_the_production_configuration() -> None:
    assert "--model-config-name=embedded" not in flags(settings(gpu="3"))


def test_secret_guards_every_protocol_of_grpc_and_http() -> None:
    made = flags(settings(secret="s3", admin_secret="a1", http_port=8000))
    for flag in ("--grpc-restricted-protocol", "--http-restricted-api"):
        groups = [text.partition("=")[2] for text in made if text.startswith(flag)]
        names = [name for group in groups for name in group.split(":")[0].split(",")]
        every = (
            "health metadata inference shared-memory model-config model-repository statistics trace logging"
        )
        assert sorted(names) == sorted(every.split())
        assert groups[0].endswith(":conch=s3") and groups[1].endswith(":conch-admin=a1")
        assert "model-repository" in groups[1] and "shared-memory" in groups[1]


def test_mutual_tls_names_the_authority_and_plain_tls_does_not() -> None:
    tls = ServerTls(Path("c"), Path("k"), Path("ca"))
    assert {"--grpc-use-ssl=1", "--grpc-server-cert=/c.pem", "--grpc-server-key=/k.pem"} <= {
        *flags(settings(tls=tls))
    }
    assert not any("mutual" in flag for flag in flags(settings(tls=tls)))
    mutual = ServerTls(Path("c"), Path("k"), Path("ca"), require_client_cert=True)
    assert {"--grpc-use-ssl-mutual=1", "--grpc-root-cert=/ca.pem"} <= {*flags(settings(tls=mutual))}


def test_a_flag_of_another_release_is_named_before_anything_starts() -> None:
    with pytest.raises(ServerStartError, match=r"has no flag --allow-client-shm: .*another release"):
        flags(settings(extra=("--allow-client-shm=false",)))
    newer = known_flags(HELP + "\n  --allow-client-shm <boolean>\n")
    made = server_flags(settings(extra=("--allow-client-shm=false",)), PLACES, newer)
    assert made[-1] == "--allow-client-shm=false"


def test_a_needed_flag_that_a_release_lacks_is_named() -> None:
    with pytest.raises(ServerStartError, match=r"has no flag --model-config-name"):
        server_flags(SETTINGS, PLACES, known_flags(HELP) - {"model-config-name"})


def test_help_of_something_else_is_no_list_of_flags() -> None:
    with pytest.raises(ServerStartError, match="does not list its flags; it says: command not found"):
        known_flags("command not found")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *(("127.0.0.1", True), ("localhost", True), ("127.1.2.3", True), ("::1", True), ("[::1]", True)),
        *(("0.0.0.0", False), ("", False), ("::", False), ("127.example.com", False), ("10.0.0.1", False)),
    ],
)
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_apptainer_mounts_read_only_and_shows_the_gpu() -> None:
    tls = ServerTls(Path("/c/cert.pem"), Path("/c/key.pem"))
    asked = settings(gpu="7", tls=tls)
    command = apptainer_command("apptainer", Path("triton.sif"), asked, Path("/tmp/s"), ["--x=1"])
    assert command == [
        "apptainer", "exec", "--cleanenv", "--nv", "--bind=/store:/model_store:ro",
        "--bind=/tmp/s/repository:/repository:ro",
        "--bind=/c/cert.pem:/tls/cert.pem:ro", "--bind=/c/key.pem:/tls/key.pem:ro",
        "triton.sif", "tritonserver", "--x=1",
    ]  # fmt: skip
    environment = apptainer_environment({"PATH": "/bin"}, asked)
    assert environment["SINGULARITYENV_CUDA_VISIBLE_DEVICES"] == "7"
    assert environment["SINGULARITYENV_MALLOC_TRIM_THRESHOLD_"] == str(2**27)
    assert environment["APPTAINERENV_CUDA_VISIBLE_DEVICES"] == "7" and environment["PATH"] == "/bin"
    assert "--nv" not in apptainer_command("apptainer", Path("triton.sif"), settings(), Path("/tmp/s"), [])


def test_docker_stays_on_the_hosts_loopback_and_writes_nothing() -> None:
    command = docker_command(
        "docker", "triton:26.11", settings(gpu="7"), Path("/tmp/s"), ["--x=1"], "conch-1"
    )
    image = command.index("triton:26.11")
    assert command[image:] == ["triton:26.11", "tritonserver", "--x=1"]
    wanted = {"--rm", "--name=conch-1", "--network=host", "--read-only", "--volume=/store:/model_store:ro"}
    wanted |= {"--volume=/tmp/s/repository:/repository:ro"}
    assert wanted <= {*command[:image]}
    assert '--gpus="device=7"' in command and not any("CUDA_VISIBLE" in word for word in command)
    assert not any(
        word.startswith("--gpus")
        for word in docker_command("docker", "i", settings(), Path("/tmp/s"), [], "n")
    )


def test_docker_container_is_removed_by_name_though_its_command_is_killed(tmp_path, monkeypatch) -> None:
    (tmp_path / "docker").write_text("#!/bin/sh\n")
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    invocation = DockerRuntime("triton").invocation(settings(), tmp_path, [], "conch-1")
    assert invocation.end_command[1:] == ["rm", "--force", "conch-1"]


@pytest.mark.parametrize("runtime", [ApptainerRuntime(Path("triton.sif")), DockerRuntime("triton")])
def test_a_missing_program_is_named(runtime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerStartError, match=r"(apptainer or singularity|docker) is not installed"):
        runtime.check(settings())


def test_a_missing_image_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, script in (("apptainer", "exit 0"), ("docker", "echo 'No such image' >&2; exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ServerStartError, match=r"image .*none\.sif does not exist; build it"):
        ApptainerRuntime(tmp_path / "none.sif").check(settings())
    with pytest.raises(ServerStartError, match=r"docker has no image none .*No such image.*docker pull none"):
        DockerRuntime("none").check(settings())


def test_the_bundled_server_refuses_a_gpu() -> None:
    with pytest.raises(ServerStartError, match=r"serves on the CPU; for GPU 2 give a container image"):
        BundledRuntime().check(settings(gpu="2"))

"""Who is let in: TLS, mutual TLS and the secret, accepted and refused, up to the trainers' client."""

from __future__ import annotations

import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tritonclient.utils import InferenceServerException

from conch.access.tls import ClientTls, ServerTls
from conch.config import RewardAuthConfig, RewardClientConfig, RewardConfig, TlsConfig
from conch.errors import ConfigError, RewardUnavailableError, ServerStartError
from conch.rewards.served import TritonReward
from conch.serving.server.health import wait_until_ready
from conch.serving.server.server import ServerOptions, TritonServer
from conch.triton.channel import Access, open_client
from conch.types import Completion, Prompt, Rollout
from tests.certificates import Certificates, make_certificates
from tests.deployments import conch, detach
from tests.stores import store_model

MODEL = "lengths"
SECRET = "correct-horse-battery"
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
ROLLOUT = Rollout(Prompt("abc", (1,)), Completion("de", (), (), "length"), policy_version=0)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"), "localhost")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store")
    store_model(store, MODEL)
    return store


@pytest.fixture(scope="module")
def server(store: Path, certificates: Certificates) -> Iterator[TritonServer]:
    """TLS and a secret."""
    tls = ServerTls(certificates.server, certificates.server_key)
    with TritonServer(store, [MODEL], options=ServerOptions(tls=tls, secret=SECRET)) as server:
        yield server


@pytest.fixture(scope="module")
def mutual_server(store: Path, certificates: Certificates) -> Iterator[TritonServer]:
    """TLS with certificates on both sides."""
    tls = ServerTls(certificates.server, certificates.server_key, certificates.ca, require_client_cert=True)
    with TritonServer(store, [MODEL], options=ServerOptions(tls=tls)) as server:
        yield server


def reward(server: TritonServer, *, secret: bool = True, **tls: Path) -> TritonReward:
    """As a trainer makes it; the certificate is for `localhost`."""
    url = server.endpoint(MODEL).replace("127.0.0.1", "localhost")
    config = RewardConfig(
        auth=RewardAuthConfig(tls=TlsConfig(**tls), secret_env="REWARD_SECRET" if secret else None),
        client=RewardClientConfig(deadline_s=20),
    )
    return TritonReward(url, config)


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_SECRET", SECRET)


def scores(source: TritonReward) -> list[float]:
    source.check()
    return [result.scores["reward"] for result in source.submit([ROLLOUT]).result()]


def test_a_trainer_scores_over_tls_with_the_secret(server: TritonServer, certificates: Certificates) -> None:
    with reward(server, ca=certificates.ca) as source:
        assert scores(source) == [5.0]


def test_a_trainer_scores_over_mutual_tls(mutual_server: TritonServer, certificates: Certificates) -> None:
    pair = {"cert": certificates.client, "key": certificates.client_key}
    with reward(mutual_server, secret=False, ca=certificates.ca, **pair) as source:
        assert scores(source) == [5.0]


def refusal(source: TritonReward) -> str:
    with source, pytest.raises(RewardUnavailableError) as caught:
        source.check()
    return str(caught.value)


def test_a_wrong_authority_is_named(server: TritonServer, certificates: Certificates) -> None:
    assert "certificate is not signed by the authority" in refusal(reward(server, ca=certificates.other_ca))


def test_plain_text_against_tls_is_named(server: TritonServer) -> None:
    assert "or it speaks TLS (give reward.auth.tls.ca)" in refusal(reward(server))


def test_a_missing_secret_is_named(server: TritonServer, certificates: Certificates) -> None:
    message = refusal(reward(server, secret=False, ca=certificates.ca))
    assert "the server asks for a secret" in message and SECRET not in message


def test_a_wrong_secret_is_named(
    server: TritonServer, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_SECRET", "guessed")
    message = refusal(reward(server, ca=certificates.ca))
    assert "the server refuses the secret" in message and "guessed" not in message


def test_a_missing_client_certificate_is_named(
    mutual_server: TritonServer, certificates: Certificates
) -> None:
    message = refusal(reward(mutual_server, secret=False, ca=certificates.ca))
    assert "it probably asks for a client certificate" in message


def test_a_strangers_client_certificate_is_named(
    mutual_server: TritonServer, certificates: Certificates
) -> None:
    pair = {"cert": certificates.stranger, "key": certificates.stranger_key}
    message = refusal(reward(mutual_server, secret=False, ca=certificates.ca, **pair))
    assert "its authority did not sign the client's certificate" in message


def test_another_host_name_is_named(server: TritonServer, certificates: Certificates) -> None:
    config = RewardConfig(
        auth=RewardAuthConfig(tls=TlsConfig(ca=certificates.ca), secret_env="REWARD_SECRET"),
        client=RewardClientConfig(deadline_s=20),
    )
    assert "is for other host names" in refusal(TritonReward(server.endpoint(MODEL), config))


def test_tls_against_plain_text_is_named(store: Path, certificates: Certificates) -> None:
    with TritonServer(store, [MODEL]) as plain:
        message = refusal(reward(plain, secret=False, ca=certificates.ca))
    assert "the server does not speak TLS" in message


def test_http_asks_for_the_secret_too_and_keeps_loading_to_the_supervisor(store: Path) -> None:
    def status_of(path: str, **headers: str) -> int:
        request = urllib.request.Request(f"http://{server.http_url}/v2/{path}", headers=headers)
        request.method = "POST" if path.startswith("repository") else "GET"
        try:
            with NO_PROXY.open(request, timeout=60) as reply:
                return reply.status
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    with TritonServer(store, [MODEL], options=ServerOptions(http_port=0, secret=SECRET)) as server:
        assert status_of("health/ready") == 403 and status_of("health/ready", conch="guessed") == 403
        assert status_of("health/ready", conch=SECRET) == 200
        assert status_of(f"repository/models/{MODEL}/unload", conch=SECRET) == 403


def test_metrics_which_know_no_secret_are_on_loopback_whatever_the_host(store: Path) -> None:
    options = ServerOptions(metrics_port=0, secret=SECRET)
    with TritonServer(store, [MODEL], host="0.0.0.0", options=options) as server:
        port = int(server.metrics_url.split(":")[2].partition("/")[0])
        with NO_PROXY.open(server.metrics_url, timeout=60) as reply:
            assert reply.status == 200
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=60)
        grpc_port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.2", grpc_port), timeout=60):
            pass  # as the host says


def test_nobody_else_on_this_machine_loads_models(store: Path) -> None:
    with TritonServer(store, [MODEL]) as server:
        with open_client(server.url, Access()) as stranger:
            with pytest.raises(InferenceServerException, match="protocol is restricted"):
                stranger.load_model(MODEL)
            assert stranger.is_model_ready(MODEL)
        with open_client(server.url, server.access) as ours:
            ours.load_model(MODEL)


def test_a_server_for_everybody_is_refused_unless_it_is_asked_for(store: Path) -> None:
    arguments = ("up", "--model-store", str(store), "--model", MODEL, "--host", "0.0.0.0", "--grpc-port", "0")
    done = conch(*arguments)
    assert done.returncode == 1 and "--allow-anyone" in done.stderr and "Traceback" not in done.stderr
    options = ServerOptions(allow_anyone=True)
    with (
        TritonServer(store, [MODEL], host="0.0.0.0", options=options) as server,
        open_client(server.url, Access()) as anyone,
    ):
        assert anyone.is_model_ready(MODEL)


def test_http_beside_tls_is_refused(store: Path, certificates: Certificates) -> None:
    options = ServerOptions(tls=ServerTls(certificates.server, certificates.server_key), http_port=0)
    with pytest.raises(ServerStartError, match="Triton's HTTP port knows no TLS"):
        TritonServer(store, [MODEL], options=options).start()


def test_waiting_for_a_server_that_refuses_us_ends_at_once(
    server: TritonServer, certificates: Certificates
) -> None:
    access = Access(ClientTls(certificates.other_ca, server_name="localhost"), SECRET)
    with pytest.raises(ServerStartError, match="not signed by the authority"):
        wait_until_ready(server.url, server.stored, access, is_alive=lambda: True, deadline=float("inf"))


def test_the_secret_stands_neither_in_our_command_lines_nor_in_any_log(
    store: Path, certificates: Certificates
) -> None:
    files = ("--tls-cert", str(certificates.server), "--tls-key", str(certificates.server_key))
    running = detach(store, "guarded", *files, "--secret-env", "REWARD_SECRET")
    try:
        ours = [process for process in psutil.Process(running.pid).children(recursive=True)]
        lines = [" ".join(process.cmdline()) for process in [psutil.Process(running.pid), *ours]]
        carriers = [line for line in lines if SECRET in line]
        assert len(carriers) == 1 and "/tritonserver " in carriers[0]  # Triton has no other way
        folder = running.replicas[0].log.parent
        assert not any(SECRET in file.read_text() for file in folder.iterdir() if file.is_file())
        told = conch("status", "guarded", "--json", "--interval", "0.1")
        assert told.returncode == 0 and '"phase": "ready"' in told.stdout and '"requests": 1' in told.stdout
    finally:
        assert conch("down", "guarded").returncode == 0


def test_status_without_the_secret_says_which_variable_to_set(store: Path) -> None:
    detach(store, "guarded", "--secret-env", "REWARD_SECRET")
    try:
        del os.environ["REWARD_SECRET"]
        done = conch("status", "guarded")
        assert done.returncode == 1 and "environment variable REWARD_SECRET" in done.stderr
    finally:
        conch("down", "guarded")


def test_a_server_whose_certificate_is_unfit_does_not_start(store: Path, certificates: Certificates) -> None:
    files = ("--tls-cert", str(certificates.server), "--tls-key", str(certificates.client_key))
    done = conch("up", "--model-store", str(store), "--model", MODEL, *files)
    assert done.returncode == 1 and "they must be a pair" in done.stderr and "Traceback" not in done.stderr


def test_a_server_whose_secret_is_not_set_does_not_start(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REWARD_SECRET")
    done = conch("up", "--model-store", str(store), "--model", MODEL, "--secret-env", "REWARD_SECRET")
    assert done.returncode == 1 and "REWARD_SECRET" in done.stderr
    with pytest.raises(ConfigError, match="REWARD_SECRET"):
        TritonReward("localhost:1/m", RewardConfig(auth=RewardAuthConfig(secret_env="REWARD_SECRET")))

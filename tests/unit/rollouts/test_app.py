"""The port of a rollout server, on real sockets over the real server; vLLM's engine alone is a fake."""

from __future__ import annotations

import json
import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import httpx2
import pytest
import torch
from safetensors.torch import save_file

from conch.cli import to_yaml
from conch.config import AuthConfig, GenerationConfig, RolloutConfig, TlsConfig
from conch.errors import ConfigError, RolloutError, RolloutUnavailableError, ServerStartError
from conch.rollouts.protocol import GenerateRequest, LoraCapacity, PromptRequest, WeightUpdate, WeightVersion
from conch.rollouts.remote.client import ServerClient
from conch.rollouts.remote.pool import ServerPool
from conch.rollouts.serve import main as serve_main
from conch.rollouts.server_config import ServerConfig
from conch.rollouts.weight_sync import checkpoint_tensors
from conch.servers import listening
from tests.certificates import Certificates, make_certificates
from tests.fakes.vllm_engine import VOCABULARY, ServedVLLM, served
from tests.tiny import tiny_decoder

SECRET = "correct-horse-battery"
GUESS = "correct-horse-batterz"
ADDRESSES = [("GET", "/health"), ("POST", "/weights"), ("POST", "/generate"), ("GET", "/docs"), ("GET", "/x")]
VERSION = WeightVersion(source="run", version=3)
REQUEST = GenerateRequest(
    weights=VERSION,
    generation=GenerationConfig(max_new_tokens=4),
    greedy=True,
    eos_id=9,
    prompts=(PromptRequest(token_ids=(1, 2), seeds=(0,)),),
)


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLLOUT_SECRET", SECRET)


@pytest.fixture(scope="module")
def _open(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedVLLM]:
    with served(tmp_path_factory.mktemp("open"), max_request_mb=0.01) as server:
        yield server


@pytest.fixture
def open_server(_open: ServedVLLM) -> ServedVLLM:
    """On loopback, for everybody on this machine."""
    _open.server._weights = None
    return _open


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedVLLM]:
    """With a secret."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROLLOUT_SECRET", SECRET)
        with served(tmp_path_factory.mktemp("guarded"), secret_env="ROLLOUT_SECRET") as server:
            yield server


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return make_certificates(tmp_path, "127.0.0.1")


def ask(server: ServedVLLM, method: str, path: str, **settings: Any) -> tuple[int, str]:
    """Status and reason of an answer."""
    with httpx2.Client(trust_env=False, timeout=60) as client:
        reply = client.request(method, f"http://{server.address}{path}", **settings)
    return reply.status_code, reply.json().get("detail", "") if reply.content else ""


_clients: list[ServerClient] = []


@pytest.fixture(autouse=True)
def _close_clients() -> Iterator[None]:
    yield
    while _clients:
        _clients.pop().close()


def client_of(server: ServedVLLM, **auth: Any) -> ServerClient:
    _clients.append(ServerClient(server.address, 60.0, AuthConfig(**auth)))
    return _clients[-1]


# --------------------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize(("method", "path"), ADDRESSES)
@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({}, "asks for a secret"),
        ({"authorization": f"Bearer {GUESS}"}, "refuses the secret"),
        ({"authorization": SECRET}, "refuses the secret"),
        ({"authorization": "Bearer"}, "refuses the secret"),
        ({"authorization": b"Bearer \xff\xfe"}, "refuses the secret"),
    ],
)
def test_stranger_gets_nothing_from_any_address(
    guarded: ServedVLLM, method: str, path: str, headers: Any, reason: str
) -> None:
    status, detail = ask(guarded, method, path, headers=headers)
    assert status == 401 and reason in detail
    assert SECRET not in detail and GUESS not in detail and guarded.engine.paused == 0


def test_stranger_with_two_secrets_is_refused(guarded: ServedVLLM) -> None:
    headers = [("authorization", f"Bearer {GUESS}"), ("authorization", f"Bearer {SECRET}")]
    assert ask(guarded, "GET", "/health", headers=headers)[0] == 401


def test_nothing_of_a_strangers_body_is_read(guarded: ServedVLLM) -> None:
    with socket.create_connection(tuple_of(guarded), timeout=60) as stranger:
        stranger.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000000\r\n\r\n{")
        assert stranger.recv(4096).startswith(b"HTTP/1.1 401 ")
        assert hangs_up(stranger)


def tuple_of(server: ServedVLLM) -> tuple[str, int]:
    host, _, port = server.address.rpartition(":")
    return host, int(port)


def hangs_up(connection: socket.socket) -> bool:
    """True once the other side has ended the connection."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


def test_trainer_with_the_secret_is_let_in(guarded: ServedVLLM) -> None:
    assert client_of(guarded, secret_env="ROLLOUT_SECRET").health().weights is None


def test_trainer_is_told_which_secret_is_missing_or_wrong(
    guarded: ServedVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RolloutError, match=r"asks for a secret.*rollout\.auth\.secret_env"):
        client_of(guarded).health()
    monkeypatch.setenv("ANOTHER", GUESS)
    with pytest.raises(RolloutError, match="refuses the secret") as caught:
        client_of(guarded, secret_env="ANOTHER").health()
    assert not isinstance(caught.value, RolloutUnavailableError)  # asking again would not help
    assert GUESS not in str(caught.value)
    with pytest.raises(RolloutError, match="refuses the secret"):
        list(client_of(guarded, secret_env="ANOTHER").completions(REQUEST))


def test_secret_stands_in_no_configuration_and_no_log(
    guarded: ServedVLLM, caplog: pytest.LogCaptureFixture
) -> None:
    config = RolloutConfig(engine="vllm", urls=guarded.address, auth=AuthConfig(secret_env="ROLLOUT_SECRET"))
    with caplog.at_level(logging.DEBUG):
        client_of(guarded, secret_env="ROLLOUT_SECRET").health()
        ask(guarded, "GET", "/health", headers={"authorization": f"Bearer {GUESS}"})
    assert "secret_env: ROLLOUT_SECRET" in to_yaml(config)
    assert not any(each in text for each in (SECRET, GUESS) for text in (to_yaml(config), caplog.text))


def test_weights_reach_a_guarded_server(guarded: ServedVLLM) -> None:
    lm = tiny_decoder("gpt2")
    auth = AuthConfig(secret_env="ROLLOUT_SECRET")
    for weights in ("broadcast", "files"):
        config = RolloutConfig(engine="vllm", urls=guarded.address, weights=weights, auth=auth)
        pool = ServerPool(config, lambda: lm, source=f"run-{weights}", sends_weights=True)
        guarded.server._weights_dir = Path("/dev/shm")
        with pool.lease(1) as lease:
            (state,) = pool.push_weights(lease)
        assert state.client.health().weights == WeightVersion(source=f"run-{weights}", version=1)
        pool.close()
        expected = checkpoint_tensors(lm)
        assert guarded.engine.tensors.keys() == expected.keys()
        assert all(torch.equal(guarded.engine.tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "gpu1.example"])
def test_server_for_everybody_is_refused_unless_it_is_asked_for(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for argument in (f"host={host!r}", f"host={host!r}", "allow_anyone=false"):
        with pytest.raises(ConfigError, match=r"whoever reaches it .* `secret_env`, .* `allow_anyone=true`"):
            serve_main(["model=x", f"host={host!r}", argument])
    monkeypatch.delenv("ROLLOUT_SECRET", raising=False)
    with pytest.raises(ConfigError, match="ROLLOUT_SECRET, which is to hold the server's secret"):
        serve_main(["model=x", f"host={host!r}", "secret_env=ROLLOUT_SECRET", "restart=false"])


# -------------------------------------------------------------------------------------------------------- TLS


def test_trainer_speaks_tls_and_names_what_does_not_fit(tmp_path: Path, certificates: Certificates) -> None:
    files: dict[str, Any] = {"tls_cert": certificates.server, "tls_key": certificates.server_key}
    with served(tmp_path, secret_env="ROLLOUT_SECRET", **files) as server:
        trusted = TlsConfig(ca=certificates.ca)
        assert client_of(server, secret_env="ROLLOUT_SECRET", tls=trusted).health().workers == 1
        assert "asks for a secret" in refusal(server, tls=trusted)
        assert "not signed by the authority" in refusal(server, tls=TlsConfig(ca=certificates.other_ca))
        assert "if it speaks TLS, give `rollout.auth.tls.ca`" in refusal(server)


def test_broadcast_beside_tls_is_warned_of(
    certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    for weights, ca, warned in (("broadcast", certificates.ca, 1), ("files", certificates.ca, 0)):
        caplog.clear()
        auth = AuthConfig(tls=TlsConfig(ca=ca))
        config = RolloutConfig(engine="vllm", urls="127.0.0.1:1", weights=weights, auth=auth)
        ServerPool(config, lambda: tiny_decoder("gpt2"), source="run", sends_weights=True).close()
        assert caplog.text.count("weights that are broadcast travel in plain text") == warned


def test_certificate_for_another_name_is_named(tmp_path: Path) -> None:
    named = make_certificates(tmp_path, "gpu1.example")
    with served(tmp_path, tls_cert=named.server, tls_key=named.server_key) as server:
        assert "certificate is for other names" in refusal(server, tls=TlsConfig(ca=named.ca))


def test_tls_against_plain_text_is_named(open_server: ServedVLLM, certificates: Certificates) -> None:
    assert "the server does not speak TLS" in refusal(open_server, tls=TlsConfig(ca=certificates.ca))


def test_mutual_tls_turns_strangers_away(tmp_path: Path, certificates: Certificates) -> None:
    files: dict[str, Any] = {
        "tls_cert": certificates.server,
        "tls_key": certificates.server_key,
    }
    ca = certificates.ca
    with served(tmp_path, require_client_cert=True, tls_ca=ca, **files) as server:
        own = TlsConfig(ca=ca, cert=certificates.client, key=certificates.client_key)
        assert client_of(server, tls=own).health().workers == 1
        assert "if it asks for certificates, give `rollout.auth.tls.cert`" in refusal(
            server, tls=TlsConfig(ca=ca)
        )
        other = TlsConfig(ca=ca, cert=certificates.stranger, key=certificates.stranger_key)
        assert "its authority did not sign `rollout.auth.tls.cert`" in refusal(server, tls=other)


def refusal(server: ServedVLLM, **auth: Any) -> str:
    with pytest.raises(RolloutError) as caught:
        client_of(server, **auth).health()
    return str(caught.value)


def test_unfit_certificate_is_named_before_anything_is_loaded(
    tmp_path: Path, certificates: Certificates
) -> None:
    pair: dict[str, Any] = {"tls_cert": certificates.server, "tls_key": certificates.client_key}
    with pytest.raises(ServerStartError, match="they must be a pair"):
        listening.check_access(ServerConfig(model="x", **pair))
    bad = tmp_path / "bad.pem"
    bad.write_text("-----BEGIN CERTIFICATE-----\n")
    files: dict[str, Any] = {
        "tls_cert": certificates.server,
        "tls_key": certificates.server_key,
    }
    with pytest.raises(ServerStartError, match="holds no certificate authority"):
        listening.check_access(ServerConfig(model="x", tls_ca=bad, **files))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["tls_cert=c"], "`tls_cert` and `tls_key` belong together"),
        (["tls_ca=c"], "need `tls_cert` and `tls_key`"),
        (["tls_cert=c", "tls_key=k", "require_client_cert=true"], "needs `tls_ca`"),
        (["secret=abc"], "unknown key `secret`; did you mean `secret_env`"),
    ],
)
def test_half_a_guard_is_refused(arguments: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        serve_main(["model=x", *arguments])


# ------------------------------------------------------------------------------------------------------ files


def test_file_outside_of_the_folder_is_not_looked_at(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    secret_file = tmp_path / "elsewhere.safetensors"
    save_file({"w": torch.ones(2)}, secret_file)
    (folder / "link.safetensors").symlink_to(secret_file)
    with served(folder) as server:
        paths = [secret_file, folder / ".." / "elsewhere.safetensors", folder / "link.safetensors", "/etc/x"]
        for path in paths:
            with pytest.raises(RolloutError, match=rf"read from below {folder} alone"):
                client_of(server).update_weights(WeightUpdate(weights=VERSION, path=str(path)))
        assert not server.engine.tensors


def test_file_that_cannot_be_read_leaves_the_weights_as_they_are(tmp_path: Path) -> None:
    good, bad, absent = (tmp_path / f"{name}.safetensors" for name in ("good", "bad", "absent"))
    save_file({"w": torch.ones(2)}, good)
    bad.write_bytes(b"no safetensors")
    with served(tmp_path) as server:
        client = client_of(server)
        assert client.update_weights(WeightUpdate(weights=VERSION, path=str(good))).weights == VERSION
        for path, reason in ((bad, "cannot be read"), (absent, "no .* on this machine")):
            with pytest.raises(RolloutError, match=reason):
                client.update_weights(WeightUpdate(weights=VERSION, path=str(path)))
        assert client.health().weights == VERSION


def test_trainers_files_are_for_its_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conch.rollouts.weight_sync.SHARED_MEMORY", tmp_path)
    from conch.rollouts.weight_sync import SharedFile

    path = SharedFile("run").path(0, lambda: {"w": torch.ones(2)})
    assert path.parent.stat().st_mode & 0o077 == 0


# -------------------------------------------------------------------------------------------- bad requests


def body(**changes: Any) -> dict[str, Any]:
    return {**REQUEST.model_dump(mode="json"), **changes}


def prompt(**changes: Any) -> dict[str, Any]:
    return {"token_ids": [1], "seeds": [0], **changes}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read: `the body`: Field required"),
        (b"{", "is no JSON: "),
        (b"\xff\xfe", "is no JSON: "),
        (b"[" * 100_000, "request is larger"),
        (b"[" * 9_000, "body"),
        (b"[]", "cannot be read: `the body`: "),
        ({"weights": 1}, r"`weights`: .*\(\d more mistakes\)"),
        (body(prompts=[]), "`prompts`: "),
        (body(prompts=[prompt(token_ids=[])]), "`prompts.0.token_ids`: "),
        (body(prompts=[prompt(token_ids=[-1])]), "`prompts.0.token_ids.0`: "),
        (body(prompts=[prompt(token_ids=["a"])]), "`prompts.0.token_ids.0`: "),
        (body(prompts=[prompt(seeds=[2**40])]), "`prompts.0.seeds.0`: "),
        (body(prompts=[prompt(token_ids=[VOCABULARY])]), "has token 10, this server's model knows 10"),
        (body(prompts=[prompt(token_ids=[1] * 61)]), "do not fit this server's `max_model_len` of 64"),
        (body(eos_id=3), "ends a text with token 3"),
        (body(greedy="perhaps"), "`greedy`: "),
        (body(generation={"temperature": -1}), "`generation.temperature`: "),
    ],
)
def test_bad_request_is_one_sentence(open_server: ServedVLLM, content: Any, reason: str) -> None:
    open_server.server._weights = VERSION
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = {"content-type": "application/json"}
    status, detail = ask(open_server, "POST", "/generate", content=data, headers=headers)
    assert status in (400, 413)
    assert re.search(reason, detail), detail
    assert "\n" not in detail and len(detail) < 300
    assert client_of(open_server).health().weights == VERSION  # and it goes on


def test_too_many_completions_are_refused(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        server.server._weights = VERSION
        many = body(prompts=[prompt(seeds=[0] * 70_000)])
        status, detail = ask(server, "POST", "/generate", json=many)
        assert status == 400 and "asks for 70000 completions" in detail
        # Beyond what frameworks take by default, and below `max_request_mb`.
        status, detail = ask(server, "POST", "/generate", json={"x": "a" * 20_000_000})
        assert status == 400 and "cannot be read" in detail and len(detail) < 300


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "give `path`, or else"),
        ({"path": "/dev/shm/x", "host": "h", "port": 1, "token": "t", "tensors": "one"}, "give `path`, or"),
        ({"host": "h", "port": 70_000, "token": "t", "tensors": "one"}, "`port`: "),
        ({"host": "h", "port": 1, "token": "t", "tensors": "bad dtype"}, "`tensors.0.dtype`: "),
        ({"path": "/dev/shm/x", "part": "adapter"}, "takes no adapters"),
        ({"path": "/dev/shm/x", "part": "half"}, "`part`: "),
    ],
)
def test_bad_update_is_one_sentence(open_server: ServedVLLM, changes: dict[str, Any], reason: str) -> None:
    spec = {
        "name": "w",
        "dtype": "load" if changes.get("tensors") == "bad dtype" else "float32",
        "shape": [2],
    }
    if "tensors" in changes:
        changes = {**changes, "tensors": [spec]}
    update = {"weights": VERSION.model_dump(), **changes}
    status, detail = ask(open_server, "POST", "/weights", json=update)
    assert status == 400 and reason in detail


def test_trainer_that_is_gone_leaves_a_server_without_weights_that_says_so(tmp_path: Path) -> None:
    with served(tmp_path, deadline_s=1.0) as server:
        gone = {"host": "127.0.0.1", "port": 1, "token": "t", "tensors": []}
        spec = {"name": "w", "dtype": "float32", "shape": (2,)}
        update = WeightUpdate.model_validate({"weights": VERSION, **gone, "tensors": [spec]})
        with pytest.raises(RolloutUnavailableError, match="weights were not loaded: the trainer's store"):
            client_of(server).update_weights(update)
        assert client_of(server).health().weights is None and server.engine.paused == 0


def test_adapter_without_its_base_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(2)}, path)
    update = WeightUpdate(weights=VERSION, part="adapter", path=str(path))
    lora = LoraCapacity(rank=8, modules=("q_proj",))
    refused = pytest.raises(RolloutUnavailableError, match="the base of run is not here")
    with served(tmp_path, lora=lora) as server, refused:
        client_of(server).update_weights(update)


def test_request_with_a_body_that_never_ends_is_given_up(
    open_server: ServedVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_server.listener.config.app, "_body_s", 0.2)
    with socket.create_connection(tuple_of(open_server), timeout=60) as slow:
        slow.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{")
        assert slow.recv(4096).startswith(b"HTTP/1.1 408 ")
        assert hangs_up(slow)


@pytest.mark.parametrize("beginning", [b"", b"GET /health HTTP/1.1\r\nhost:"])
def test_headers_that_never_end_are_given_up(
    open_server: ServedVLLM, monkeypatch: pytest.MonkeyPatch, beginning: bytes
) -> None:
    monkeypatch.setattr(listening, "_HEADERS_S", 0.2)
    with socket.create_connection(tuple_of(open_server), timeout=60) as slow:
        slow.sendall(beginning)
        assert hangs_up(slow)


def test_connection_lives_on_between_two_requests(
    open_server: ServedVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "_HEADERS_S", 2.0)
    with socket.create_connection(tuple_of(open_server), timeout=60) as trainer:
        for _ in range(3):
            trainer.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            answer = trainer.recv(4096)
            while not answer.endswith(b"}"):
                answer += trainer.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200 ")


def test_failure_while_sampling_is_told(open_server: ServedVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    open_server.server._weights = VERSION

    async def fail(*_: Any, **__: Any) -> NoReturn:
        raise ValueError("vLLM wants\nnone of this")

    monkeypatch.setattr(open_server.sampler, "_complete", fail)
    with pytest.raises(RolloutUnavailableError, match=r"failed: vLLM wants$"):
        list(client_of(open_server).completions(REQUEST))

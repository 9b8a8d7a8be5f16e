"""The port of a reference server, on real sockets: who is let in, what a request may bring."""

from __future__ import annotations

import contextlib
import pickle
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from conch.config import TlsConfig
from conch.errors import ConfigError, DataError, ReferenceServerError
from conch.reference.protocol import LogprobReply, LogprobRequest, ReferenceHealth, decode, encode
from conch.reference.serve import main as serve_main
from conch.reference.server import ReferenceServer
from conch.servers.restart import ENGINE_DIED
from tests.certificates import make_certificates
from tests.footprint import wait_until
from tests.launches import ROOT, free_port
from tests.reference_servers import ServedReference, client_of, served
from tests.runs import policy

SECRET = "correct-horse-battery"
REQUEST = LogprobRequest(num_response=3, temperature=1.0)
ADDRESSES = [("GET", "/health"), ("POST", "/logprobs"), ("GET", "/docs"), ("GET", "/x")]


def rows(**changes: Tensor) -> dict[str, Tensor]:
    """Two samples of 2 and 3 prompt tokens and 3 and 1 response tokens."""
    ids = torch.tensor([[8, 1, 2, 3, 4, 5], [1, 2, 3, 4, 8, 8]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
    return {"input_ids": ids, "attention_mask": mask, **changes}


@pytest.fixture(scope="module")
def server() -> Iterator[ServedReference]:
    with served(policy(), max_request_mb=0.01) as running:
        yield running


def post(server: ServedReference, content: bytes) -> tuple[int, bytes]:
    with httpx2.Client(trust_env=False, verify=False, timeout=60) as client:
        reply = client.post(f"http://{server.address}/logprobs", content=content)
    return reply.status_code, reply.content


def test_logprobs_come_as_they_were_computed(server: ServedReference) -> None:
    status, content = post(server, encode(REQUEST, rows()))
    message, tensors = decode(LogprobReply, content)
    logprobs = tensors["logprobs"]
    assert status == 200 and message.digest == server.server.health().digest
    assert logprobs.dtype == torch.float64 and logprobs.shape == (2, 3)
    assert bool((logprobs[0] < 0).all()) and logprobs[1, 0] < 0 and bool((logprobs[1, 1:] == 0).all())
    expected = server.server.logprobs(REQUEST, rows())
    assert torch.equal(logprobs, expected)


def test_temperature_and_precision_are_the_requests(server: ServedReference) -> None:
    plain = server.server.logprobs(REQUEST, rows())
    content = encode(REQUEST.model_copy(update={"temperature": 0.5}), rows())
    other = decode(LogprobReply, post(server, content)[1])[1]["logprobs"]
    assert (other - plain).abs().max() > 0.01
    in_float32 = ReferenceServer(policy(dtype=torch.float32))
    cast = in_float32.logprobs(REQUEST.model_copy(update={"autocast": "bfloat16"}), rows())
    assert 1e-4 < (cast - in_float32.logprobs(REQUEST, rows())).abs().max() < 0.2


def test_weights_take_a_gradient_where_the_trainers_do(server: ServedReference) -> None:
    lm = server.server._lm
    for trained, count in ((-1, 28), (1, 12), (0, 0), (2, 24), (-1, 28)):
        server.server.logprobs(REQUEST.model_copy(update={"trained_layers": trained}), rows())
        assert sum(parameter.requires_grad for parameter in lm.parameters()) == count


BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "no safetensors file"),
    "JSON": (b'{"input_ids": [1]}', "no safetensors file"),
    "pickle": (pickle.dumps({"input_ids": [1]}), "no safetensors file"),
    "header beyond the end": (struct.pack("<Q", 2**40) + b"{}", "no safetensors file"),
    "no message": (save(rows()), "no safetensors file with a message"),
    "half a message": (
        save(rows(), metadata={"message": '{"num_response": 3}'}),
        "`temperature`: Field required",
    ),
    "unknown key": (
        save(rows(), metadata={"message": '{"num_response": 3, "temperature": 1, "x": 1}'}),
        "`x`: Extra inputs",
    ),
    "other tensors": (encode(REQUEST, {"input_ids": rows()["input_ids"]}), "holds other tensors"),
    "another type": (encode(REQUEST, rows(input_ids=rows()["input_ids"].int())), "are int64"),
    "another shape": (
        encode(REQUEST, rows(attention_mask=rows()["attention_mask"][:1])),
        "same two dimensions",
    ),
    "unknown token": (encode(REQUEST, rows(input_ids=rows()["input_ids"] + 90)), "the model knows 11 tokens"),
    "negative token": (encode(REQUEST, rows(input_ids=rows()["input_ids"] - 9)), "the model knows 11 tokens"),
    "no prompt": (encode(REQUEST.model_copy(update={"num_response": 6}), rows()), "hold no prompt before 6"),
    "hole": (
        encode(REQUEST, rows(attention_mask=torch.tensor([[1, 0, 1, 1, 1, 1]] * 2).bool())),
        "without holes",
    ),
    "hole behind": (
        encode(REQUEST, rows(attention_mask=torch.tensor([[1, 1, 1, 1, 0, 1]] * 2).bool())),
        "without holes",
    ),
    "empty prompt": (
        encode(REQUEST, rows(attention_mask=torch.tensor([[0, 0, 0, 1, 1, 1]] * 2).bool())),
        "no prompt is empty",
    ),
    "too long": (
        encode(REQUEST, {"input_ids": torch.ones(1, 17).long(), "attention_mask": torch.ones(1, 17).bool()}),
        "longer than the model's window of 16",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_refused_in_a_sentence(server: ServedReference, name: str) -> None:
    content, reason = BAD[name]
    status, reply = post(server, content)
    assert status == 400 and reason in reply.decode(), reply
    assert post(server, encode(REQUEST, rows()))[0] == 200


def test_request_beyond_the_limit_is_refused(server: ServedReference) -> None:
    status, reply = post(server, b"x" * 20_000)
    assert status == 413 and "`max_request_mb` = 0.01" in reply.decode()


def test_failed_pass_is_told_and_another_works(
    server: ServedReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(server.server, "logprobs", fail)
        status, reply = post(server, encode(REQUEST, rows()))
        assert status == 503 and "the forward pass failed: CUDA out of memory" in reply.decode()
    assert post(server, encode(REQUEST, rows()))[0] == 200


def test_messages_that_are_none_are_told_apart() -> None:
    with pytest.raises(DataError, match="no safetensors file"):
        decode(LogprobReply, b"{}")


# ---------------------------------------------------------------------------------------------- who is let in


def test_strangers_get_nothing_from_any_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFERENCE_SECRET", SECRET)
    with served(policy(), secret_env="REFERENCE_SECRET") as server:
        with httpx2.Client(trust_env=False, verify=False, timeout=60) as client:
            for method, path in ADDRESSES:
                for headers in ({}, {"authorization": "Bearer guess"}):
                    reply = client.request(method, f"http://{server.address}{path}", headers=headers)
                    assert reply.status_code == 401 and SECRET not in reply.text
        assert server.requests == 0
        with closing(client_of(server.address, secret_env="REFERENCE_SECRET")) as client:
            values = client.values("GET", "/health")
            assert client.parse(ReferenceHealth, values).vocabulary == 11
        with (
            closing(client_of(server.address)) as client,
            pytest.raises(ReferenceServerError, match=r"for a secret.*see `reference\.auth\.secret_env`"),
        ):
            client.values("GET", "/health")


def test_tls_is_spoken_and_what_does_not_fit_is_named(tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path, "127.0.0.1")
    files: dict[str, Any] = {"tls_cert": certificates.server, "tls_key": certificates.server_key}
    with served(policy(), **files) as server:
        with closing(client_of(server.address, tls=TlsConfig(ca=certificates.ca))) as client:
            assert client.values("GET", "/health")["device"] == "cpu"
        for tls, complaint in (
            (
                TlsConfig(ca=certificates.other_ca),
                r"not signed by the .* in `reference\.auth\.tls\.ca`",
            ),
            (TlsConfig(), r"if it speaks TLS, give `reference\.auth\.tls\.ca`"),
        ):
            with (
                closing(client_of(server.address, tls=tls)) as client,
                pytest.raises(ReferenceServerError, match=complaint),
            ):
                client.values("GET", "/health")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "gpu1.example"])
def test_server_for_everybody_is_refused_unless_it_is_asked_for(host: str) -> None:
    with pytest.raises(ConfigError, match=r"whoever reaches it has its GPU compute: .*`allow_anyone=true`"):
        serve_main(["model=x", f"host={host!r}"])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["model=x", "secret=abc"], "unknown key `secret`; did you mean `secret_env`"),
        (["model=x", "secret_env=NOT_SET_AT_ALL", "restart=false"], "NOT_SET_AT_ALL, which is to hold"),
        (["model"], "`model` is no setting: write key=value"),
    ],
)
def test_bad_command_lines_are_refused(arguments: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        serve_main(arguments)


FAULTY = """
import sys
import torch
from conch.reference import serve, server
def fail(*_):
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
server.ReferenceServer.logprobs = fail
serve.main([f"model={sys.argv[1]}", f"port={sys.argv[2]}", "dtype=float64", "restart=false"])
"""


def test_server_whose_gpu_has_failed_makes_way_for_another(tmp_path: Path) -> None:
    """With the exit code upon which the process above starts it again."""
    policy().save_pretrained(tmp_path)
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", FAULTY, str(tmp_path), str(port)], cwd=ROOT)
    try:
        content = encode(REQUEST, rows())
        with httpx2.Client(trust_env=False, verify=False, timeout=60) as client:
            replies: list[httpx2.Response] = []

            def has_answered() -> bool:
                assert process.poll() is None, "the server has ended"
                with contextlib.suppress(httpx2.ConnectError):
                    replies.append(client.post(f"http://127.0.0.1:{port}/logprobs", content=content))
                return bool(replies)

            wait_until(has_answered, lambda: "the server did not become ready", 240.0)
        assert replies[0].status_code == 503 and "illegal memory access" in replies[0].text
        assert process.wait(60) == ENGINE_DIED
    finally:
        process.kill()

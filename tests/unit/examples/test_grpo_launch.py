"""Commands and environments of what the GRPO example starts."""

from __future__ import annotations

import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from conch.config import load
from conch.errors import ConfigError, ServerStartError
from conch.reference.server_config import ReferenceServerConfig
from conch.rollouts.server_config import ServerConfig
from conch.servers.settings import load_settings
from examples.grpo.devices import DevicePlan, Wish, plan_devices
from examples.grpo.launch import (
    SECRET_VARIABLE,
    Server,
    accelerate_file,
    addresses,
    environment,
    run_training,
    running,
    servers_of,
    training_command,
)
from examples.grpo.settings import ExampleConfig
from examples.grpo.translation import run_config, translate
from tests.footprint import wait_until

TASK = Path("task.json")


def plan(num_gpus: int = 8, **asked: int) -> DevicePlan:
    """A plan of these numbers for `train`, `inference` and `ref`."""
    wishes = {f"{name}_model": Wish(number) for name, number in asked.items()}
    return plan_devices(wishes, has_reference=True, num_gpus=num_gpus)


def started(config: dict[str, Any], plan: DevicePlan, *, has_vllm: bool) -> list[Server]:
    """The servers of these settings."""
    settings = load(ExampleConfig, config)
    run = run_config(translate(settings, plan, has_vllm=has_vllm))
    return servers_of(settings, run, plan, has_vllm=has_vllm)


def read(server: Server) -> Any:
    """A server's settings, as it reads them from its command line."""
    section = {"rollout-server": ServerConfig, "reference-server": ReferenceServerConfig}[server.verb]
    words = server.command()
    return load_settings(section, words[words.index(server.verb) + 1 :])


@pytest.mark.parametrize("has_vllm", [True, False])
def test_servers_take_what_they_are_told(has_vllm: bool) -> None:
    config = {
        "model": {"name": "some/model", "revision": "v2", "trust_remote_code": True},
        "inference_model": {"gpu_memory_utilization": 0.7, "enforce_eager": True, "max_model_len": 4096},
        "env": {"num_envs": 4, "repeats": 16},
    }
    servers = started(config, plan(train=2, inference=2, ref=2), has_vllm=has_vllm)
    assert [(server.name, server.devices) for server in servers] == [
        *(("inference-0", (2,)), ("inference-1", (3,)), ("reference-0", (4,)), ("reference-1", (5,))),
    ]
    assert len({server.port for server in servers}) == 4
    sampler, reference = read(servers[0]), read(servers[2])
    assert (sampler.model, sampler.dtype, sampler.port) == ("some/model", "bfloat16", servers[0].port)
    assert (sampler.max_model_len, sampler.max_num_seqs) == (4096, 32)  # 4 * 16 over two copies
    if has_vllm:
        assert (sampler.engine, sampler.gpu_memory_utilization, sampler.enforce_eager) == ("vllm", 0.7, True)
        assert sampler.max_lora_rank == 8
    else:
        assert sampler.engine == "transformers"
    assert (reference.model, reference.dtype) == ("some/model", "bfloat16")
    assert {(each.revision, each.trust_remote_code) for each in (sampler, reference)} == {("v2", True)}
    told = addresses(servers)
    assert told["rollout.urls"] == f"{servers[0].url},{servers[1].url}"
    assert told["reference.urls"] == f"{servers[2].url},{servers[3].url}"
    assert {read(server).secret_env for server in servers} == {SECRET_VARIABLE}
    assert told["rollout.auth.secret_env"] == told["reference.auth.secret_env"] == SECRET_VARIABLE


def test_a_copy_of_the_sampler_may_take_several_devices() -> None:
    servers = started({"inference_model": {"tensor_parallel_size": 2}}, plan(inference=4), has_vllm=True)
    assert [server.devices for server in servers] == [(1, 2), (3, 4)]
    assert read(servers[0]).tensor_parallel_size == 2
    assert addresses(servers).keys() == {"rollout.urls", "rollout.auth.secret_env"}


def test_the_reference_holds_the_weights_that_training_starts_from() -> None:
    """In the weights' own precision, whatever is computed in."""
    config = {"train_model": {"lora": {"enabled": False}, "attn_implementation": "eager"}}
    (reference,) = started(config, plan(ref=1), has_vllm=False)
    assert (read(reference).dtype, read(reference).attention) == ("float32", "eager")


@pytest.mark.parametrize(
    ("visible", "devices", "told"),
    [(None, (2, 3), "2,3"), ("4,5,6,7", (2, 3), "6,7"), ("GPU-a,GPU-b", (1,), "GPU-b")],
)
def test_devices_are_those_of_the_parent(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, devices: tuple[int, ...], told: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert environment(plan(train=1), devices, "")["CUDA_VISIBLE_DEVICES"] == told
    assert environment(plan(0, train=1), devices, "")["CUDA_VISIBLE_DEVICES"] == ""


def test_training_processes_are_launched_as_conch_documents() -> None:
    config = load(ExampleConfig, {})
    alone = training_command(config, plan(train=1, ref=1), TASK)
    assert alone[1:] == [alone[1], "task.json"] and alone[1].endswith("examples/grpo/training.py")
    on_cpu = training_command(config, plan(0, train=2), TASK)
    assert on_cpu[1:5] == ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    on_gpus = training_command(config, plan(train=4), TASK)
    assert on_gpus[1:3] == ["-m", "accelerate.commands.launch"]
    assert str(accelerate_file("ddp")) in on_gpus and "4" in on_gpus


def test_an_accelerate_file_is_found_or_the_names_are_told(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.touch()
    assert accelerate_file(str(own)) == own
    with pytest.raises(ConfigError, match=r"= zero9: there is no such file; there are: .*ddp.*zero3"):
        accelerate_file("zero9")


LAUNCHER = """
import signal, subprocess, sys
rank = subprocess.Popen([sys.executable, *sys.argv[1:]])
def lose_patience(*_):
    rank.kill()
    sys.exit(1)
signal.signal(signal.SIGINT, lose_patience)
signal.signal(signal.SIGTERM, lose_patience)
sys.exit(1 if rank.wait() else 0)
"""
RANK = """
import pathlib, signal, sys, time
left = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: left.append(1))
pathlib.Path("ready").touch()
while not left:
    time.sleep(0.01)
time.sleep(0.5)  # of a step that goes on
pathlib.Path("saved").touch()
sys.exit(143)
"""


@pytest.mark.parametrize(
    ("number", "leaves"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_ranks_finish_their_step_however_soon_their_launcher_would_end_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, leaves: type[BaseException]
) -> None:
    monkeypatch.chdir(tmp_path)

    def interrupt() -> None:
        wait_until(Path("ready").exists, lambda: "no rank is there", 60.0)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(leaves) as left:
        run_training([sys.executable, "-c", LAUNCHER, "-c", RANK], plan(0, train=2), (0, 1), "")
    assert Path("saved").exists()
    if leaves is SystemExit:
        assert left.value.args == (143,)


@pytest.mark.parametrize("status", [200, 401])
def test_another_program_on_the_port_is_not_taken_for_the_server(tmp_path: Path, status: int) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        ours = Server("inference-0", "rollout-server", {"no_such_key": 1}, other.server_port, ())
        with (
            pytest.raises(ServerStartError, match="ended before it was ready"),
            running([ours], plan(0, inference=1), tmp_path, "a-secret"),
        ):
            pytest.fail("the run goes on with another program")
        other.shutdown()

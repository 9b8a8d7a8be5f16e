"""Servers of their own processes: sampled from, sent new weights, killed and started again."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from conch.config import GenerationConfig, RolloutConfig
from conch.errors import RolloutError
from conch.rollouts.hf.engine import HFEngine
from conch.rollouts.protocol import GenerateRequest, Health, PromptRequest, WeightUpdate, WeightVersion
from conch.rollouts.remote.client import ServerClient
from conch.rollouts.remote.engine import RemoteEngine
from conch.rollouts.remote.pool import ServerPool
from conch.rollouts.weight_sync import checkpoint_tensors
from conch.types import Prompt, Rollout
from tests.launches import ROOT, free_port
from tests.vllm.conftest import CACHE_BYTES, make_lm, prompts
from tests.vllm.test_colocated import TEXTS, assert_alike

READY_S = 400.0
"""Three processes import vLLM, on a machine that may have much else to do."""


class ServerProcess:
    """`python -m conch.rollouts.serve`, and what it started."""

    def __init__(self, model: Path, port: int, *settings: str) -> None:
        self.model = model
        self.settings = settings
        self.port = port
        self.address = f"127.0.0.1:{port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "conch.rollouts.serve", f"model={self.model}", f"port={self.port}"]
        settings = [f"kv_cache_memory_bytes={CACHE_BYTES}", "restart=false", *self.settings]
        self.process = subprocess.Popen([*command, *settings], cwd=ROOT)

    def family(self) -> list[psutil.Process]:
        """It and all below it."""
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def kill(self) -> None:
        """SIGKILL to the server alone; waits until those below it have left by themselves."""
        family = self.family()
        self.process.kill()
        self.process.wait()
        _, alive = psutil.wait_procs(family, timeout=30)
        for left_over in alive:
            left_over.kill()
        assert not alive, "what a killed server started lives on"

    def stop(self) -> None:
        """SIGTERM; nothing may be left."""
        family = self.family()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        _, alive = psutil.wait_procs(family, timeout=30)
        for left_over in alive:
            left_over.kill()
        assert not alive, "what a stopped server started lives on"


@pytest.fixture(scope="module")
def servers(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    """Two that are ready. Their folder holds other weights than the policy's."""
    folder = tmp_path_factory.mktemp("served")
    make_lm(tokenizer, 5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    running = ServerProcess(folder, free_port()), ServerProcess(folder, free_port())
    try:
        for server in running:
            client = ServerClient(server.address, READY_S)
            wait_until(client.health)
            client.close()
        yield running
    finally:
        for server in running:
            if server.process.poll() is None:
                server.stop()


def wait_until(answers: Callable[[], Any]) -> None:
    """Until it no longer raises what a server does that is away."""
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        with contextlib.suppress(RolloutError):
            answers()
            return
        time.sleep(0.5)
    raise AssertionError("the server did not become ready")


def pool_of(*servers: ServerProcess, lm: PreTrainedModel, **settings: Any) -> ServerPool:
    urls = ",".join(server.address for server in servers)
    config = RolloutConfig(engine="vllm", urls=urls, **settings)
    return ServerPool(config, lambda: lm, source=f"run-{time.monotonic_ns()}", sends_weights=True)


def engine_of(
    pool: ServerPool, tokenizer: PreTrainedTokenizerFast, version: Callable[[], int], **generation: Any
) -> RemoteEngine:
    config = GenerationConfig(**{"max_new_tokens": 24, "chunk_size": 8, **generation})
    return RemoteEngine(pool, tokenizer, config, version=version, deadline_s=READY_S)


def all_of(engine: Any, given: list[Prompt], **settings: Any) -> list[Rollout]:
    return [rollout for chunk in engine.generate(given, **settings) for rollout in chunk]


@pytest.mark.parametrize("weights", ["broadcast", "files"])
@pytest.mark.parametrize("stop", [(), ("g",)])
def test_greedy_completions_are_those_of_transformers_after_every_update(
    servers: tuple[ServerProcess, ServerProcess],
    tokenizer: PreTrainedTokenizerFast,
    weights: str,
    stop: tuple[str, ...],
) -> None:
    given = prompts(tokenizer, *TEXTS)
    for version in (3, 4):
        lm = make_lm(tokenizer, version)
        pool = pool_of(*servers, lm=lm, weights=weights)
        config = GenerationConfig(max_new_tokens=24, stop=stop)
        wanted = all_of(HFEngine(lambda lm=lm: lm, tokenizer, config, version=lambda: 0), given, greedy=True)
        served = engine_of(pool, tokenizer, lambda version=version: version, stop=stop)
        found = all_of(served, given, greedy=True)
        assert_alike(found, wanted)
        assert {rollout.policy_version for rollout in found} == {version}
        pool.close()


@pytest.mark.parametrize("goes_on", [False, True])
def test_new_weights_go_before_what_has_not_begun(
    goes_on: bool,
    servers: tuple[ServerProcess, ServerProcess],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    source = f"run-{time.monotonic_ns()}"
    with (
        tempfile.TemporaryDirectory(prefix="conch-test-", dir="/dev/shm") as folder,
        contextlib.closing(ServerClient(servers[0].address, READY_S)) as client,
    ):

        def update(version: int) -> Health:
            path = Path(folder) / f"{version}.safetensors"
            tensors = checkpoint_tensors(make_lm(tokenizer, version))
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
            weights = WeightVersion(source=source, version=version)
            return client.update_weights(WeightUpdate(weights=weights, path=str(path), goes_on=goes_on))

        slots = update(1).max_num_seqs
        request = GenerateRequest(
            weights=WeightVersion(source=source, version=1),
            or_later=True,
            generation=GenerationConfig(max_new_tokens=100),
            greedy=False,
            eos_id=22,
            prompts=(PromptRequest(token_ids=(0, 1, 2), seeds=tuple(range(3 * slots))),),
        )
        replies = client.completions(request)
        found = [next(replies)]
        assert update(2).weights == WeightVersion(source=source, version=2)
        found += replies
    assert len(found) == 3 * slots and found[0].version == 1
    assert {reply.version for reply in found} == {1, 2}
    for reply in found:
        runs = reply.version_runs
        assert not runs or sum(count for _, count in runs) == len(reply.token_ids)
        assert not runs or (goes_on and [version for version, _ in runs] == [1, 2])
    assert any(reply.version_runs for reply in found) == goes_on


def test_same_seed_samples_the_same_wherever_it_is_sampled(
    servers: tuple[ServerProcess, ServerProcess], tokenizer: PreTrainedTokenizerFast, lm: GPT2LMHeadModel
) -> None:
    given = prompts(tokenizer, *TEXTS * 4)
    found = []
    for asked in (servers, servers[:1]):
        pool = pool_of(*asked, lm=lm)
        torch.manual_seed(0)
        rollouts = all_of(engine_of(pool, tokenizer, lambda: 0), given)
        found.append([rollout.completion.token_ids for rollout in rollouts])
        pool.close()
    assert found[0] == found[1]


def test_nothing_is_lost_with_a_killed_server_and_it_gets_the_weights_when_it_is_back(
    servers: tuple[ServerProcess, ServerProcess], tokenizer: PreTrainedTokenizerFast, lm: GPT2LMHeadModel
) -> None:
    victim = servers[1]
    pool = pool_of(*servers, lm=lm)
    version = [0]
    engine = engine_of(pool, tokenizer, lambda: version[0], max_new_tokens=120)
    given = prompts(tokenizer, *[f"{a}{b}" for a in "abcdefghij" for b in "abcdefghijklmnop"])
    told: list[int] = []

    def kill_once(ended: Any) -> None:
        if not told:
            victim.kill()
        told.extend(ended)

    made = all_of(engine, given, on_finished=kill_once)
    assert [rollout.prompt for rollout in made] == given
    assert sorted(told) == list(range(len(given)))
    assert not pool.servers[1].holds(pool.weight_version(0))
    victim.start()
    wait_until(pool.servers[1].client.health)
    version[0] = 1
    assert {rollout.policy_version for rollout in all_of(engine, given)} == {1}
    assert pool.servers[1].client.health().weights == pool.weight_version(1)
    pool.close()


@pytest.mark.parametrize("part", ["server", "vLLM below it"])
def test_what_dies_is_started_again_and_gets_the_weights_by_itself(
    part: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, lm: GPT2LMHeadModel
) -> None:
    lm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    kept = ServerProcess(tmp_path, free_port(), "restart=true")
    pool = pool_of(kept, lm=lm)
    try:
        wait_until(pool.servers[0].client.health)
        (server,) = kept.family()[0].children()
        victim = server if part == "server" else engine_core(server)
        killed: list[int] = []

        def kill_once(_ended: Any) -> None:
            if not killed:
                killed.append(victim.pid)
                victim.kill()

        engine = engine_of(pool, tokenizer, lambda: 0, max_new_tokens=120)
        given = prompts(tokenizer, *[f"{a}{b}" for a in "abcdefghij" for b in "abcdefghijklmnop"])
        made = all_of(engine, given, on_finished=kill_once)
        assert [rollout.prompt for rollout in made] == given and killed
        (another,) = kept.family()[0].children()
        assert another.pid != server.pid
    finally:
        pool.close()
        kept.stop()


def test_vllm_that_is_killed_as_it_loads_is_started_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, lm: GPT2LMHeadModel
) -> None:
    lm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    kept = ServerProcess(tmp_path, free_port(), "restart=true")
    client = ServerClient(kept.address, READY_S)
    try:
        first, core = loading(kept)
        core.kill()
        wait_until(client.health)
        (server,) = kept.family()[0].children()
        assert server.pid != first.pid
    finally:
        client.close()
        kept.stop()


def loading(kept: ServerProcess) -> tuple[psutil.Process, psutil.Process]:
    """A server below its parent and vLLM's engine below that, as soon as it exists: it imports vLLM then."""
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        for process in kept.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                if any("spawn_main" in part for part in process.cmdline()):
                    server = process.parent()
                    assert server is not None
                    return server, process
        time.sleep(0.05)
    raise AssertionError("vLLM was not started")


def engine_core(server: psutil.Process) -> psutil.Process:
    """vLLM's engine, which a server talks to: the largest of the processes below it."""
    return max(server.children(), key=lambda process: process.memory_info().rss)


def test_server_with_other_weights_or_another_end_refuses(
    servers: tuple[ServerProcess, ServerProcess], tokenizer: PreTrainedTokenizerFast, lm: GPT2LMHeadModel
) -> None:
    pool = pool_of(servers[0], lm=lm)
    engine = engine_of(pool, tokenizer, lambda: 0)
    assert len(all_of(engine, prompts(tokenizer, "a"))) == 1
    engine._eos_id = 3
    with pytest.raises(
        RolloutError, match=r"ends a text with token 3, this server's with 22: serve the policy"
    ):
        all_of(engine, prompts(tokenizer, "a"))
    pool.close()
    lost = pool_of(servers[0], lm=lm, weights="files")
    lost._files["whole"].path = lambda *_: Path("/dev/shm/nowhere/0.safetensors")  # pyright: ignore[reportAttributeAccessIssue]
    no_file = r"no /dev/shm/nowhere/0.safetensors on this machine: set .*=broadcast"
    with pytest.raises(RolloutError, match=no_file), lost.lease(0) as lease:
        lost.push_weights(lease)
    lost.close()

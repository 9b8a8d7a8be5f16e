"""Samplers in actors of Ray: a run repeats, a killed actor costs nothing, and nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from conch.config import GenerationConfig, RolloutConfig, load
from conch.errors import ConfigError, RolloutError, RolloutUnavailableError
from conch.rollouts.protocol import Health, WeightUpdate, WeightVersion
from conch.rollouts.ray.check import LEAST_STORE_BYTES, Share, check_address
from conch.rollouts.ray.client import RayClient, SharedWeights
from conch.rollouts.ray.cluster import Cluster
from conch.rollouts.ray.janitor import processes_of
from conch.rollouts.ray.samplers import RaySamplers
from conch.rollouts.remote.engine import RemoteEngine
from conch.rollouts.remote.pool import ServerPool
from conch.types import Prompt
from tests.footprint import wait_until
from tests.launches import ROOT, finish, kill_all, start, torchrun
from tests.runs import TOKENIZER, async_grpo_trainer, grpo_trainer, parameters, policy
from tests.tiny import tiny_decoder, tiny_gpt2_config

PROMPTS = [Prompt("ab", (0, 1)), Prompt("c", (2,))] * 600
CLOCKED = ("time/", "reward/latency", "reward/wait", "reward/hidden")
LEFT_S = 120.0


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Cluster]:
    """One cluster for all runs of this process, which keep its connection."""
    one = Cluster.start(Share(2, 0.5, 0.0), LEAST_STORE_BYTES)
    yield one
    folder = one._folder
    one.leave()
    assert folder is not None and not folder.exists() and not processes_of(str(folder))


@pytest.fixture(scope="module")
def samplers(cluster: Cluster) -> Iterator[RaySamplers]:
    config = load(RolloutConfig, {"engine": "ray", "ray": {"samplers": 1, "num_cpus": 0.25, "num_gpus": 0}})
    lm = policy()
    actors = RaySamplers.start(config, lm, TOKENIZER, lm.dtype, None)
    yield actors
    actors.close()


def test_cluster_leaves_breakpoints_of_this_process_as_they_were(cluster: Cluster) -> None:
    assert os.environ.get("PYTHONBREAKPOINT") is None


def test_cluster_asks_for_a_token_and_keeps_its_files_to_itself(cluster: Cluster) -> None:
    assert cluster._folder is not None and cluster._folder.stat().st_mode & 0o077 == 0
    assert len(cluster.address.token) >= 32
    check_address(cluster.address.address)
    program = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print('in')"
    strangers = [
        subprocess.Popen(
            [sys.executable, "-c", program, cluster.address.address],
            env={
                **os.environ,
                "RAY_AUTH_MODE": "token" if token else "disabled",
                "RAY_AUTH_TOKEN": token,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for token in ("", "0" * 64)
    ]
    for stranger in strangers:
        written, _ = stranger.communicate(timeout=120)
        assert stranger.returncode != 0 and "in" not in written.splitlines(), written
    for process in processes_of(str(cluster._folder)):
        assert cluster.address.token.encode() not in Path(f"/proc/{process}/cmdline").read_bytes()


def test_killed_actor_loses_no_prompt_and_doubles_none(samplers: RaySamplers) -> None:
    config = load(RolloutConfig, {"engine": "ray"})
    lm = policy()
    pool = ServerPool(config, lambda: lm, source="run", sends_weights=True, actors=samplers.clients)
    generation = GenerationConfig(max_new_tokens=9, chunk_size=4)
    engine = RemoteEngine(pool, TOKENIZER, generation, version=lambda: 5, deadline_s=240.0)
    [client] = samplers.clients
    assert "sampler" in client.stacks()
    torch.manual_seed(1)
    undisturbed = [rollout for chunk in engine.generate(PROMPTS) for rollout in chunk]
    torch.manual_seed(1)
    rollouts, first_pid = [], client.pid()
    for chunk in engine.generate(PROMPTS):
        if not rollouts:
            os.kill(first_pid, signal.SIGKILL)
        rollouts += chunk
    assert client.pid() != first_pid
    assert [rollout.prompt for rollout in rollouts] == PROMPTS
    assert [one.completion.token_ids for one in rollouts] == [one.completion.token_ids for one in undisturbed]
    assert {rollout.policy_version for rollout in rollouts} == {5}
    pool.threads.shutdown()


def test_actor_that_does_not_answer_is_a_sentence(samplers: RaySamplers) -> None:
    client: RayClient = samplers.clients[0]
    process = client.pid()
    os.kill(process, signal.SIGSTOP)  # else it may answer in less than any deadline
    try:
        with pytest.raises(
            RolloutUnavailableError, match=r"^sampler-0 does not answer: no answer for 0\.2 s$"
        ):
            client._call("more", 10**6, timeout_s=0.2)
    finally:
        os.kill(process, signal.SIGCONT)


@pytest.mark.parametrize("name", ["ObjectStoreFullError", "OutOfDiskError"])
def test_weights_that_find_no_room_are_a_sentence(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Ray falls back to the disk where its store is full, so that it is the disk which is full in the end."""
    import ray
    from ray import exceptions

    def full(_value: object) -> None:
        raise getattr(exceptions, name)("Failed to put object")

    monkeypatch.setattr(ray, "put", full)
    update = WeightUpdate(weights=WeightVersion(source="run", version=3), handed=True)
    told = (
        r"^the weights, 2 MiB, fit neither .* raise `rollout\.ray\.object_store_memory` \(of a cluster .*\)$"
    )
    with pytest.raises(RolloutError, match=told) as caught:
        SharedWeights().ref(update, {"w": torch.zeros(2**19)})
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_weights_that_the_store_does_not_hold_are_refused_before_an_actor_starts(cluster: Cluster) -> None:
    ray = {"num_cpus": 0.25, "num_gpus": 0, "address": cluster.address.address}
    config = load(RolloutConfig, {"engine": "ray", "ray": ray})
    large = GPT2LMHeadModel(tiny_gpt2_config(TOKENIZER, vocab_size=2**20))
    told = r"^Ray's object store at \S+ = 80 MiB does not hold the policy's weights, \d+ MiB, .*`ray start"
    with pytest.raises(ConfigError, match=told):
        RaySamplers.start(config, large, TOKENIZER, large.dtype, None)


def test_more_than_the_cluster_has_is_refused_with_the_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    settings = {"engine": "ray", "ray": {"samplers": 2, "num_cpus": 1, "num_gpus": 0}}
    with pytest.raises(ConfigError, match=r"2 samplers x 1 CPUs = 2 CPUs, and the Ray cluster has 1: lower"):
        grpo_trainer(tmp_path, rollout=settings)


def test_run_repeats_to_the_last_bit(tmp_path: Path) -> None:
    runs: list[tuple[list[dict[str, Any]], torch.Tensor]] = []
    for name in ("one", "other"):
        settings = {"engine": "ray", "ray": {"num_cpus": 0.5, "num_gpus": 0}}
        trainer = grpo_trainer(tmp_path / name, rollout=settings)
        metrics = [dict(trainer.step()) for _ in range(3)]
        runs.append((metrics, parameters(trainer.lm)))
        trainer.close()
    (one, weights), (other, other_weights) = runs
    assert max(metrics["rollout/logprob_diff"] for metrics in one) < 1e-5
    assert torch.equal(weights, other_weights) and not torch.equal(weights, parameters(policy()))
    for left, right in zip(one, other, strict=True):
        assert left.keys() == right.keys()
        assert not {key for key in left if left[key] != right[key] and not key.startswith(CLOCKED)}


def test_policy_and_samplers_agree_on_log_probs_after_each_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conch.models.adapter._base_path", lambda _model: "base")
    sent: list[str] = []
    update = RayClient.update_weights

    def noted(client: RayClient, message: WeightUpdate, tensors: Any) -> Health:
        sent.append(message.part)
        return update(client, message, tensors)

    monkeypatch.setattr(RayClient, "update_weights", noted)
    trainer = async_grpo_trainer(
        tmp_path,
        lm=tiny_decoder("llama", dtype=torch.float32),
        model={"peft_config": {"r": 4, "target_modules": ["q_proj", "down_proj"]}},
        asynchronous={"max_staleness": 0},
        rollout={"engine": "ray", "ray": {"num_cpus": 0.5, "num_gpus": 0}},
        optimizer={"learning_rate": 0.1},
    )
    with closing(trainer):
        before = parameters(trainer.lm)
        differences = [trainer.step()["rollout/logprob_diff"] for _ in range(3)]
        assert not torch.equal(before, parameters(trainer.lm))
    assert max(differences) < 1e-5, differences
    assert sent == ["base", "adapter", "adapter", "adapter"]


@pytest.mark.slow
def test_two_ranks_share_an_actor(tmp_path: Path) -> None:
    program = ["tests/integration/ray_run.py", str(tmp_path), "2", "close"]
    output = finish(start([*torchrun(2), *program], PYTHONPATH=str(ROOT)))
    assert output.count("closed") == 2 and len(re.findall(r"^step", output, re.M)) == 2, output
    assert_nothing_is_left(output)


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_asynchronous_run_that_is_ended_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "tests/integration/ray_run.py", str(tmp_path), "1", "stay"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    output = ""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        try:
            assert run.stdout is not None
            while output.count("step") < 2:
                line = run.stdout.readline()
                assert line, output
                output += line
            end = os.killpg if number == signal.SIGINT else os.kill  # a terminal's goes to all of a run
            end(run.pid, number)
            output += run.stdout.read()
            code = run.wait(LEFT_S)
        finally:
            kill_all(run)
    assert_nothing_is_left(output)
    saved = [path.name for path in (tmp_path / "checkpoints").glob("step_*")]
    if number == signal.SIGKILL:
        assert (code, saved) == (-signal.SIGKILL, [])
        return
    # Python ends by SIGINT itself after a KeyboardInterrupt that nobody has caught.
    assert code == (143 if number == signal.SIGTERM else -signal.SIGINT)
    assert saved == [f"step_{output.count('step')}"], "the step that was under way is finished, and no other"


def assert_nothing_is_left(output: str) -> None:
    found = re.search(r"^folder (/\S+)$", output, re.M)
    assert found is not None, output
    folder = found[1]
    wait_until(lambda: not processes_of(folder) and not Path(folder).exists(), lambda: folder, LEFT_S)

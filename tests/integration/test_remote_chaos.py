"""What a training run survives: a network that breaks, a service and clients that are killed, and clients
that send what fits nothing. `tests/unit/service/test_exchange_chaos.py` has fifty runs with a stand-in for
the trainer, `benchmarks/chaos_remote.py` fifty with processes; here are few, some with their weights."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from benchmarks.chaos_parts import remote_ledger_faults
from conch.service.client import TrainingClient
from conch.service.protocol import KEY_VARIABLE
from tests.fakes.faulty_proxy import Fault, FaultyProxy
from tests.integration.remote_client import PROMPTS, vowels
from tests.launches import LONGEST_S, ROOT
from tests.services import KEY, Service, service, tiny_model, tiny_settings, weights_in

STEPS, PER_STEP = 8, 2
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def wire_to(running: Service) -> FaultyProxy:
    """What a client asks over; to be entered."""
    return FaultyProxy(f"127.0.0.1:{running.port}")


def address(wire: FaultyProxy) -> str:
    return f"http://{wire.url}"


def cut_off(wire: FaultyProxy, seconds: float) -> None:
    """Let nothing through for so long; what was on its way is lost, and its connections break."""
    wire.fault = Fault(swallow=True)
    time.sleep(seconds)
    wire.fault = Fault()
    wire.reset()


def trained(running: Service, model: Path, wire: FaultyProxy) -> Weights:
    """The weights of a run with one client, which asks over a wire; all is learned from in one order."""
    settings = tiny_settings(model, max_steps=STEPS, save_every=3, training_batch_size=PER_STEP)
    with TrainingClient(address(wire), KEY, retry_s=240.0, wait_s=20.0) as client:
        status = client.train(reward=vowels, prompts=PROMPTS, settings=settings)
        assert (status.state, status.model_version[1]) == ("finished", STEPS)
        check_ledger(running, status.run_id)
        client.get_model(running.output_dir / "model.zip")
    return weights_in((running.output_dir / "model.zip").read_bytes())


def check_ledger(running: Service, run_id: str) -> None:
    """Each update has learned from as many groups as it should, none of which another has learned from."""
    assert remote_ledger_faults(running.output_dir / "runs" / run_id, STEPS, PER_STEP) == []


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    folder = tmp_path_factory.mktemp("undisturbed")
    with service(folder / "runs") as running, wire_to(running) as wire:
        return trained(running, model, wire)


def assert_same(got: Weights, expected: Weights) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@contextmanager
def meanwhile(deed: Callable[[threading.Event], None]) -> Iterator[None]:
    """Inside, a thread does something until it is told that this is over; what it raises is raised here."""
    over, errors = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            deed(over)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(LONGEST_S)
    assert not thread.is_alive() and not errors, errors


def cut_again_and_again(wire: FaultyProxy, seconds: float, chance: random.Random) -> Callable[..., None]:
    def cut(over: threading.Event) -> None:
        while not over.wait(chance.uniform(0.0, 0.6)):
            cut_off(wire, seconds)

    return cut


def kill_at_random(running: Service, times: int, chance: random.Random) -> Callable[..., None]:
    def kill(over: threading.Event) -> None:
        for _ in range(times):
            if over.wait(chance.uniform(0.0, 1.5)):
                return
            running.kill()
            running.start()

    return kill


def post_nonsense(running: Service) -> Callable[..., None]:
    """Send again and again what fits nothing, under the ids of samples that another client has."""

    def bully(over: threading.Event) -> None:
        while not over.wait(0.05):
            try:
                run_id = running.status()["run_id"]
                for number in range(20):
                    ids = [f"{run_id}.{number}.{place}" for place in range(4)]
                    for body in (
                        {"sample_ids": ids, "token_hashes": ["x"] * 4, "rewards": [9.0] * 4},
                        {"sample_ids": ids, "token_hashes": ["x"] * 4, "rewards": [9.0]},
                        {"sample_ids": ids[:1] * 2, "token_hashes": ["x"] * 2, "rewards": [9.0] * 2},
                        {"completion_tokens": [[number], [1], [2], [3]], "rewards": [9.0] * 4},
                    ):
                        code, answer = running.post("/rewards", body)
                        assert code in (404, 409, 410, 422, 503) and answer["detail"], (code, answer)
            except httpx2.TransportError:
                pass  # the service is being killed

    return bully


def test_run_over_a_wire_that_breaks_ends_as_over_one_that_does_not(
    model: Path, undisturbed: Weights, tmp_path: Path
) -> None:
    with service(tmp_path / "runs") as running, wire_to(running) as wire:
        with meanwhile(cut_again_and_again(wire, 0.2, random.Random(0))), meanwhile(post_nonsense(running)):
            got = trained(running, model, wire)
        assert wire.accepted > 1
    assert_same(got, undisturbed)


@pytest.mark.slow  # the network is away for 20 s
def test_run_whose_network_is_cut_for_long_ends_as_one_whose_is_not(
    model: Path, undisturbed: Weights, tmp_path: Path
) -> None:
    def cut(over: threading.Event) -> None:
        time.sleep(0.7)
        cut_off(wire, 20.0)

    with service(tmp_path / "runs") as running, wire_to(running) as wire:
        with meanwhile(cut):
            got = trained(running, model, wire)
        assert wire.accepted > 1
    assert_same(got, undisturbed)


@pytest.mark.slow  # a service takes seconds to start
@pytest.mark.parametrize("seed", range(5))
def test_run_whose_service_is_killed_at_random_ends_as_one_whose_is_not(
    model: Path, undisturbed: Weights, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    with (
        service(tmp_path / "runs") as running,
        wire_to(running) as wire,
        meanwhile(kill_at_random(running, 3, chance)),
        meanwhile(post_nonsense(running)),
    ):
        got = trained(running, model, wire)
    assert_same(got, undisturbed)


def client_process(running: Service, url: str, what: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.remote_client", url, what],
        cwd=ROOT,
        env={**os.environ, KEY_VARIABLE: KEY},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow  # three processes, one of which is started again
@pytest.mark.parametrize("seed", range(3))
def test_run_of_two_clients_one_of_which_is_killed_ends_though_all_else_breaks_too(
    model: Path, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    settings: dict[str, Any] = {"max_steps": STEPS, "save_every": 3, "training_batch_size": PER_STEP}
    with service(tmp_path / "runs") as running, wire_to(running) as wire:
        with TrainingClient(running.url, KEY) as client:
            run_id = client.start(tiny_settings(model, lease_s=5.0, max_groups=4, **settings)).run_id
        doomed, other = (client_process(running, url, "trains") for url in (running.url, address(wire)))
        try:
            with (
                meanwhile(kill_at_random(running, 2, chance)),
                meanwhile(cut_again_and_again(wire, 0.2, chance)),
                meanwhile(post_nonsense(running)),
            ):
                time.sleep(chance.uniform(0.0, 0.5))
                doomed.kill()
                output, _ = other.communicate(timeout=LONGEST_S)
        finally:
            for process in (doomed, other):
                process.kill()
                process.communicate(timeout=30)
        assert output == "finished\n"
        check_ledger(running, run_id)

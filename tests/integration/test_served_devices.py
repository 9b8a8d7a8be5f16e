"""Reference and sampler on servers of their own processes: several ranks, servers that die and come back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.footprint import wait_until
from tests.launches import finish, start, torchrun
from tests.reference_servers import ReferenceProcess
from tests.runs import TOKENIZER, policy
from tests.transformers_servers import TransformersProcess

RANKS = 2
DTYPE = "dtype=float64"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all processes load."""
    folder = tmp_path_factory.mktemp("model")
    policy().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def references(model: Path) -> Iterator[list[ReferenceProcess]]:
    """Two servers that are ready."""
    running = [ReferenceProcess(model, DTYPE) for _ in range(2)]
    try:
        for server in running:
            server.wait()
        yield running
    finally:
        for server in running:
            server.stop()


def run(folder: Path, references: str, rollouts: str = "-") -> Any:
    folder.mkdir()
    program = ["-m", "tests.integration.served_devices_run", str(folder), references, rollouts]
    return start([*torchrun(RANKS), *program])


def outcome(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.slow
def test_two_ranks_on_two_servers_are_two_ranks_with_copies(
    tmp_path: Path, references: list[ReferenceProcess]
) -> None:
    finish(run(tmp_path / "kept", "-"))
    finish(run(tmp_path / "served", ",".join(server.address for server in references)))
    kept, served = outcome(tmp_path / "kept"), outcome(tmp_path / "served")
    assert served == kept
    assert served[0]["kl"][0] == 0.0 != served[0]["kl"][-1]


@pytest.mark.slow
def test_run_goes_on_where_its_only_server_is_killed_and_comes_back(
    tmp_path: Path, references: list[ReferenceProcess]
) -> None:
    victim = references[0]
    folder = tmp_path / "run"
    finish(run(tmp_path / "whole", victim.address))
    launcher = run(folder, victim.address)
    (folder / "pause").touch()
    paused = [folder / f"rank_{rank}.paused" for rank in range(RANKS)]
    wait_until(lambda: all(file.exists() for file in paused), lambda: "no step begins", 240.0)
    victim.kill()
    (folder / "pause").unlink()
    victim.start()
    output = finish(launcher)
    victim.wait()
    assert outcome(folder) == outcome(tmp_path / "whole")
    assert "reference server lost" in output


def test_run_is_sampled_and_measured_on_servers(
    tmp_path: Path, model: Path, references: list[ReferenceProcess]
) -> None:
    samplers = [TransformersProcess(model) for _ in range(2)]
    try:
        for server in samplers:
            server.wait()
        urls = ",".join(server.address for server in samplers)
        finish(run(tmp_path / "run", references[1].address, urls))
        first, second = outcome(tmp_path / "run")
        assert first["weights"] == second["weights"] and first["kl"][0] == 0.0
    finally:
        for server in samplers:
            server.stop()


def test_killed_server_is_started_again_by_the_process_above(model: Path) -> None:
    kept = ReferenceProcess(model, DTYPE, "restart=true")
    try:
        kept.wait()
        (below,) = psutil.Process(kept.process.pid).children()
        below.kill()
        below.wait(30)
        kept.wait()
        (another,) = psutil.Process(kept.process.pid).children()
        assert another.pid != below.pid
    finally:
        kept.stop()

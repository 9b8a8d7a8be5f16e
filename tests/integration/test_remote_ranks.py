"""A training service of two processes, as `torchrun` starts them: rank 0 has the clients, both train."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.footprint import wait_until
from tests.launches import LONGEST_S, ranks_of, torchrun
from tests.services import Service, service, tiny_model, tiny_settings, vowel_rewards, weights_in

PROMPTS = ["ab", "cd"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@contextmanager
def two_ranks(output_dir: Path, **settings: Any) -> Iterator[Service]:
    with service(output_dir, launcher=torchrun(2), **settings) as running:
        yield running


def begin(running: Service, model: Path, **changes: Any) -> None:
    code, reply = running.post("/start", tiny_settings(model, **changes).model_dump())
    assert code == 200, reply


def sampled(running: Service) -> list[dict[str, Any]]:
    """Groups of the prompts, sampled together."""
    code, reply = running.post("/completions/batch", {"requests": [{"prompt": each} for each in PROMPTS]})
    assert code == 200, reply
    return reply["replies"]


def reward(running: Service, groups: list[dict[str, Any]]) -> None:
    """Reward groups, and wait for the update that learns from them."""
    for group in groups:
        names = {name: group[name] for name in ("sample_ids", "token_hashes")}
        code, answer = running.post("/rewards", {**names, "rewards": vowel_rewards(group["completions"])})
        assert (code, answer["outcome"]) == (200, "whole"), answer
    reached = answer["model_version"][1]
    wait_until(
        lambda: running.status()["model_version"][1] >= reached, lambda: running.log.read_text()[-3000:]
    )


def update(running: Service) -> list[list[str]]:
    """Have the model make an update; returns the completions that it learned from."""
    groups = sampled(running)
    reward(running, groups)
    return [group["completions"] for group in groups]


def weights(running: Service) -> dict[str, torch.Tensor]:
    return weights_in(running.ask("POST", "/model", json={}).content)


def test_two_ranks_sample_and_learn_as_one_does(model: Path, tmp_path: Path) -> None:
    with two_ranks(tmp_path / "two") as two, service(tmp_path / "one") as one:
        begin(two, model), begin(one, model)
        for _ in range(4):
            assert update(two) == update(one)
        assert two.wait_for("finished")["counts"]["groups_learned"] == 8
        ours, theirs = weights(two), weights(one)
        assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-8) for name in theirs)
        assert two.terminate() in (0, 1, -signal.SIGTERM)  # what torchrun makes of SIGTERM is its own


def test_run_that_cannot_start_is_refused_and_the_next_one_trains(model: Path, tmp_path: Path) -> None:
    with two_ranks(tmp_path / "runs") as running:
        refused = tiny_settings(tmp_path / "nothing").model_dump()
        code, reply = running.post("/start", refused)
        assert code == 422 and "nothing" in reply["detail"], reply
        begin(running, model)
        update(running)
        assert running.post("/stop")[1]["status"] == "stopped"
        begin(running, model)
        update(running)
        assert running.status()["state"] == "running"


@pytest.mark.slow
def test_service_that_loses_a_rank_ends_and_the_next_one_goes_on(model: Path, tmp_path: Path) -> None:
    with (
        two_ranks(tmp_path / "killed", forks=False) as running,
        two_ranks(tmp_path / "whole") as undisturbed,
    ):
        for each in (running, undisturbed):
            begin(each, model)
            update(each)
            update(each)
        groups = sampled(running)
        _, other = ranks_of(running.process)  # pyright: ignore[reportArgumentType]
        other.send_signal(signal.SIGKILL)
        assert running.process.wait(LONGEST_S) != 0
        running.start()
        assert running.wait_for("running")["model_version"][1] <= 2
        reward(running, groups)
        update(undisturbed)
        assert update(running) == update(undisturbed)
        ours, theirs = weights(running), weights(undisturbed)
        assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-8) for name in theirs)

"""Two gloo processes find what one process finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.invariance import scenarios
from tests.launches import ROOT, finish, start, torchrun

Found = dict[str, Any]

BOUNDS = {"grpo": 1e-6, "stale": 1e-6, "regression": 1e-6, "pairs": 1e-6}
"""Relative bounds where float32 takes part: rewards and their statistics. All else is float64."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Found]]:
    """What each of two processes found, by scenario."""
    folder = tmp_path_factory.mktemp("two_ranks")
    script = Path(scenarios.__file__)
    finish(start([*torchrun(2), str(script), str(folder)], PYTHONPATH=str(ROOT)))
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]


def assert_same(found: Found, expected: Found, rtol: float, atol: float) -> None:
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)  # names the key itself


def test_there_are_truly_two_processes(ranks: list[dict[str, Found]], tmp_path: Path) -> None:
    for found in (rank["processes"] for rank in ranks):
        assert found["world_size"] == found["engine"] == 2
        assert found["refused"].startswith("DistributedError: 3 processes were asked for, 2 run")
    alone = scenarios.processes(tmp_path)["refused"]
    assert alone.startswith("DistributedError: 2 processes were asked for, 1 run")


@pytest.mark.parametrize("name", ["sft", "regression", "pairs", "ilql", "ppo", "grpo", "stale", "moments"])
def test_two_ranks_find_what_one_finds(ranks: list[dict[str, Found]], tmp_path: Path, name: str) -> None:
    expected = getattr(scenarios, name)(tmp_path)
    for rank in ranks:
        assert_same(rank[name], expected, rtol=BOUNDS.get(name, 1e-10), atol=1e-10)


def test_gradients_are_equal_to_float64(ranks: list[dict[str, Found]], tmp_path: Path) -> None:
    expected = scenarios.sft(tmp_path)["parameters"]
    for rank in ranks:
        torch.testing.assert_close(rank["sft"]["parameters"], expected, rtol=1e-10, atol=1e-12)


def test_ranks_draw_and_sample_differently(ranks: list[dict[str, Found]]) -> None:
    first, second = (rank["rank_dependent"] for rank in ranks)
    assert sorted([*first["rows"], *second["rows"]]) == list(range(8))
    assert first["outputs"] != second["outputs"]


def test_ranks_agree_after_a_step_that_started_on_policy(ranks: list[dict[str, Found]]) -> None:
    first, second = (rank["rank_dependent"] for rank in ranks)
    assert torch.equal(first["parameters"], second["parameters"])
    for found in (first["first"], second["first"]):
        assert found["ratio"] == pytest.approx(1.0, abs=1e-5)
        assert found["approx_kl"] == pytest.approx(0.0, abs=1e-9)
        assert found["clip_fraction"] == 0.0


def test_ranks_evaluate_unequal_shares(ranks: list[dict[str, Found]]) -> None:
    first, second = (rank["uneven_evaluation"] for rank in ranks)
    assert first.keys() == second.keys()
    for name in first:  # one prompt has no standard error: NaN on both
        assert first[name] == pytest.approx(second[name], rel=0, abs=0, nan_ok=True)
    assert first["many"]["eval/kl"] == first["one"]["eval/kl"] == 0.0


def test_a_broken_gradient_on_one_rank_is_skipped_on_all(ranks: list[dict[str, Found]]) -> None:
    for rank in ranks:
        assert rank["broken_gradient"] == {"skipped": True, "moved": False}


def test_a_failure_on_one_rank_is_raised_on_all(ranks: list[dict[str, Found]]) -> None:
    first, second = (rank["failures"] for rank in ranks)
    assert first["together"].startswith("DistributedError: 1 of 2 processes failed")
    assert second["together"] == "ConfigError: here"
    assert first["step"].startswith("RewardInvalidError: 4 of 8 samples") and "other ranks" in first["step"]
    assert second["step"].startswith("RewardInvalidError: 4 of 8 samples") and "nan" in second["step"]
    for found in (first, second):
        assert found["indivisible"] == (
            "ConfigError: `ppo.rollouts_per_step` = 9 does not divide among 2 processes: take 8 or 12"
        )

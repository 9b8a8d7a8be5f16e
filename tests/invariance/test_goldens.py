"""Today's runs give the numbers that were recorded."""

from __future__ import annotations

import pytest

from tests.invariance import goldens


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    return goldens.runs(tmp_path_factory.mktemp("goldens"))


@pytest.mark.parametrize("name", ["sft", "regression", "pairs", "ilql", "ppo", "grpo", "rft"])
def test_a_run_gives_what_was_recorded(found: dict[str, list[dict[str, float]]], name: str) -> None:
    recorded = goldens.read()
    assert len(found[name]) == goldens.STEPS
    for step, expected in zip(found[name], recorded["runs"][name], strict=True):
        # Float64 on any processor, with room for three updates to carry a rounding on; see `goldens`.
        assert step == pytest.approx(expected, rel=1e-10, abs=1e-12), f"recorded with {recorded['versions']}"

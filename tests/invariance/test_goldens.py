"""Today's runs give the numbers that were recorded."""

from __future__ import annotations

import pytest

from tests.invariance import goldens


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    return goldens.runs(tmp_path_factory.mktemp("goldens"))


@pytest.mark.parametrize("name", ["sft", "regression", "pairs", "ilql", "ppo"])
def test_a_run_gives_what_was_recorded(found: dict[str, list[dict[str, float]]], name: str) -> None:
    recorded = goldens.read()
    # Other versions of the libraries round otherwise; a changed formula shows all the same.
    tolerance = 1e-4 if recorded["stamp"] == goldens.stamp() else 1e-2
    assert len(found[name]) == goldens.STEPS
    for step, expected in zip(found[name], recorded["runs"][name], strict=True):
        assert step == pytest.approx(expected, rel=tolerance, abs=1e-6)

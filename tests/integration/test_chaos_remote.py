"""Short forms of the benchmarks that disturb remote runs, and of the one that lets a service live long."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.chaos_remote import drawn_faults, one_run
from benchmarks.remote_soak import soak
from tests.services import tiny_model


@pytest.mark.slow  # four processes, some of which are started again
@pytest.mark.parametrize("kinds", [("client", "bad client"), ("service", "network")])
def test_run_that_is_disturbed_passes(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    assert all(kind in {*drawn_faults(0), *drawn_faults(1), *drawn_faults(2)} for kind in kinds)
    outcome = one_run(tmp_path / "run", tiny_model(tmp_path / "model"), seed=3, steps=12, kinds=kinds)
    assert outcome.faults == () and outcome.reward is not None
    assert ("bad client" in kinds) == (outcome.deeds > 0)


@pytest.mark.slow  # a service starts, and trains for seconds
def test_soak_looks_at_a_service_that_trains_on_every_sample(tmp_path: Path) -> None:
    looks = soak(tmp_path, 1200, 3)
    assert [look.samples for look in looks] == [40, 400, 800, 1200]
    assert all(look.uss > 50e6 and look.files > 3 for look in looks)

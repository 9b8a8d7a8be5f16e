"""Short forms of the long benchmarks: PPO whose server keeps dying, and a client that lives long."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import chaos, soak
from conch.serving.server.server import TritonServer
from tests.faults import MODEL


@pytest.mark.slow
def test_ppo_ends_the_same_however_often_its_server_is_killed(tmp_path: Path) -> None:
    tally = chaos.chaos(tmp_path, runs=2, seed=0, steps=3, longest_up_s=0.3)
    assert tally.differences == ("", "")
    assert sum(tally.kills) > 0


@pytest.mark.parametrize("changed", ["metrics.jsonl", "checkpoints/step_3/heads.safetensors"])
def test_chaos_sees_a_difference_in_metrics_and_weights(tmp_path: Path, changed: str) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "checkpoints" / "step_3").mkdir(parents=True)
        (tmp_path / name / "checkpoints" / "step_3" / "heads.safetensors").write_text("1")
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 1, "time/score_s": 1}\n')
    one = chaos.Outcome.of(tmp_path / "one")
    (tmp_path / "two" / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 1, "time/score_s": 2}\n')
    assert one.difference(chaos.Outcome.of(tmp_path / "two")) == ""
    (tmp_path / "two" / changed).write_text('{"step": 1, "reward/mean": 2}\n')
    assert one.difference(chaos.Outcome.of(tmp_path / "two")) != ""


def test_client_that_lives_long_holds_no_more_files_or_threads(hash_server: TritonServer) -> None:
    report = soak.soak(hash_server.endpoint(MODEL), 1000, looks=4)
    assert [look.requests for look in report.looks] == [250, 500, 750, 1000]
    assert not report.leaks

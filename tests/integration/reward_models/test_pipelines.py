"""The replicas by themselves: each pipeline gives finite scores that tell answers apart."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.integration.reward_models.processes import PROCESSES
from tests.integration.reward_models.replica import Replica


@pytest.mark.parametrize(
    "replica", [each for each in PROCESSES if not each.refused], ids=lambda each: each.name
)
def test_a_pipeline_tells_answers_apart(tmp_path: Path, replica: Replica) -> None:
    pipeline = replica.build(tmp_path)
    scores = [tuple(pipeline(messages)) for messages in replica.dialogues]

    assert all(math.isfinite(score) for row in scores for score in row)
    assert len({tuple(round(score, 3) for score in row) for row in scores}) == len(scores)
    assert (tmp_path / "config.json").is_file() and (tmp_path / "tokenizer.json").is_file()

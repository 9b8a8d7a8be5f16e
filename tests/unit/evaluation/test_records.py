"""Evaluations kept on disk."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from conch.errors import DataError
from conch.evaluation.records import (
    EvaluatedSample,
    EvaluationRecord,
    read_record,
    record_path,
    records_of,
    write_record,
)

SAMPLES = (
    EvaluatedSample(0, "a\u2028b", "grün\n", 2, {"reward": 1.5}, {"a": 1.0, "b": 2.0}, {"answer": [7]}),
    EvaluatedSample(0, [{"role": "user", "content": "hi"}], "", 0, {"reward": None}, {"a": 1.0, "b": None}),
)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = record_path(tmp_path, 20, "@beta=1")
    record = EvaluationRecord(20, SAMPLES, {"eval/kl": 0.5}, "@beta=1", {"reward": "rm"})
    write_record(path, record)
    assert read_record(path) == record


def test_scores_of_another_source_stand_beside_and_what_is_none_is_nan() -> None:
    record = EvaluationRecord(1, SAMPLES).with_scores("gold", [math.nan, 2.0], "judge")
    assert [sample.scores for sample in record.samples] == [
        {"reward": 1.5, "gold": None},
        {"reward": None, "gold": 2.0},
    ]
    assert math.isnan(record.column("gold")[0]) and record.column("gold")[1] == 2.0
    assert record.sources == {"gold": "judge"}


def test_variance_is_of_the_population_of_members_that_scored() -> None:
    assert [sample.variance for sample in SAMPLES] == [0.25, 0.0]
    assert EvaluatedSample(0, "", "", 0, {}).variance is None


def test_records_come_in_the_order_of_steps_and_of_one_variant(tmp_path: Path) -> None:
    for step, variant in ((1_000_000, ""), (20, ""), (3, "@beta=1")):
        write_record(record_path(tmp_path, step, variant), EvaluationRecord(step, (), variant=variant))
    (tmp_path / "evaluations" / "notes.txt").write_text("mine")
    assert [read_record(path).step for path in records_of(tmp_path)] == [20, 1_000_000]
    assert [read_record(path).step for path in records_of(tmp_path / "evaluations", "@beta=1")] == [3]
    assert records_of(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no evaluation that this release"),
        ('{"conch_evaluation": 2}\n', "no evaluation that this release"),
        ('{"conch_evaluation": 1, "step": 1}\n{"pro', "line 2"),
        ('{"conch_evaluation": 1, "step": 1}\n{"prompt": 1}\n', "damaged"),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "step_000001.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_record(path)
    assert str(path) in str(caught.value)

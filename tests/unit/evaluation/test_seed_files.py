"""Evaluations in the files of the code of reward-model ensembles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conch.errors import ConfigError, DataError
from conch.evaluation.records import EvaluatedSample, EvaluationRecord, record_path, write_record
from conch.evaluation.seed_files import (
    evaluation_files,
    read_evaluation,
    read_seed_file,
    write_evaluation,
    write_seed_file,
    write_seed_files,
)

# As json.dump and, after the gold scores, `datasets` write it: nulls and NaN where a row lacks something.
FOREIGN = [
    {
        "instruction": "Name a fruit.",
        "answers": ["plum", "plum", "an apple"],
        "proxy_scores": [1.5, 0.5, float("nan")],
        "ensemble_variance": [0.25, 0.75, 0.5],
        "kl_list": [0.0, 3.0],
        "note": "mine",
    },
    {
        "instruction": "Add.",
        "input": "2 and 3",
        "answers": ["5"],
        "proxy_scores": [2.0],
        "ensemble_variance": [0.5],
        "kl_list": None,
        "gold_scores": None,
    },
]
CHAT: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
TOLD = {"instruction": "Name it.", "input": "A, B", "id": 7}
RECORD = EvaluationRecord(
    40,
    (
        EvaluatedSample(0, "<q>Who?<a>", "me", 1, {"reward": 1.0, "gold": None}, {"a": 0.0, "b": 2.0}),
        EvaluatedSample(0, "<q>Who?<a>", "me", 1, {"reward": 2.0, "gold": 5.0}, {"a": 2.0, "b": None}),
        EvaluatedSample(1, CHAT, "Grün.", 3, {"reward": None, "gold": 4.0}, {"a": 1.0, "b": 1.0}, TOLD),
    ),
    {"eval/kl": 0.75},
    "@beta=1",
    {"reward": "the mean of a, b", "gold": "judge"},
)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    path = tmp_path / "eval-3.json"
    path.write_text(json.dumps(FOREIGN))
    return path


def test_a_foreign_file_is_read_answer_by_answer(foreign: Path) -> None:
    record = read_seed_file(foreign)
    assert [(sample.prompt, sample.input, sample.output) for sample in record.samples] == [
        (0, "Name a fruit.", "plum"),
        (0, "Name a fruit.", "plum"),
        (0, "Name a fruit.", "an apple"),
        (1, "Add.\n2 and 3", "5"),
    ]
    assert [sample.scores for sample in record.samples] == [
        {"reward": 1.5},
        {"reward": 0.5},
        {"reward": None},
        {"reward": 2.0},
    ]
    assert record.step == 3 and record.metrics == {"eval/members_variance": 0.5}


def test_scores_are_added_and_all_else_of_the_file_stays(foreign: Path) -> None:
    record = read_evaluation(foreign).with_scores("gold", [3.0, 4.0, None, 6.0], "judge")
    write_evaluation(foreign, record.with_scores("other", [0.0, 1.0, 2.0, 3.0], "another"))
    first, second = json.loads(foreign.read_text())
    assert (first["gold_scores"], second["gold_scores"]) == ([3.0, 4.0, None], [6.0])
    assert first["other_scores"] == [0.0, 1.0, 2.0]
    assert first["note"] == "mine" and first["kl_list"] == [0.0, 3.0] and "kl" not in first
    assert first["proxy_scores"][:2] == [1.5, 0.5] and second["input"] == "2 and 3"
    assert first["sources"] == {"gold": "judge", "other": "another"}
    assert [sample.scores.get("gold") for sample in read_evaluation(foreign).samples] == [3.0, 4.0, None, 6.0]


def test_a_record_comes_back_as_it_went(tmp_path: Path) -> None:
    path = tmp_path / "eval-2.json"
    write_seed_file(path, RECORD, kls=[0.0, 0.5, 0.75])
    back = read_seed_file(path)
    assert back.samples == RECORD.samples and back.sources == RECORD.sources
    assert (back.step, back.variant, back.metrics["eval/kl"]) == (40, "@beta=1", 0.75)
    rows = json.loads(path.read_text())
    assert [row["instruction"] for row in rows] == ["<q>Who?<a>", "Name it."] and rows[1]["input"] == "A, B"
    write_seed_file(path, EvaluationRecord(0, (EvaluatedSample(0, CHAT, "me", 1, {}),)), kls=[0.0])
    assert json.loads(path.read_text())[0]["instruction"] == "Who?"
    assert rows[0]["answers"] == ["me", "me"] and rows[0]["proxy_scores"] == [1.0, 2.0]
    assert rows[0]["ensemble_variance"] == [1.0, 0.0] and rows[0]["kl_list"] == [0.0, 0.5, 0.75]
    assert rows[0]["gold_scores"] == [None, 5.0] and "kl_list" not in rows[1]


def test_an_order_of_answers_changes_nothing_of_what_belongs_together(tmp_path: Path) -> None:
    for name, samples in (("eval-0.json", RECORD.samples), ("eval-1.json", RECORD.samples[::-1])):
        write_seed_file(tmp_path / name, EvaluationRecord(1, samples), kls=[None])
    one, other = (read_seed_file(tmp_path / f"eval-{number}.json").samples for number in (0, 1))

    def together(samples: Any) -> list[Any]:
        return sorted(
            (str(sample.input), sample.output, *map(str, sample.scores.values())) for sample in samples
        )

    assert together(one) == together(other) and len(one) == 3


def test_a_run_without_an_ensemble_has_no_variance(tmp_path: Path) -> None:
    write_seed_file(
        tmp_path / "eval-0.json",
        EvaluationRecord(0, (EvaluatedSample(0, "a", "b", 1, {"reward": 1.0}),)),
        kls=[None],
    )
    (row,) = json.loads((tmp_path / "eval-0.json").read_text())
    assert row["ensemble_variance"] == [0.0] and row["instruction"] == row["prompt"] == "a"


def test_a_text_that_utf8_has_no_place_for_is_written_all_the_same(tmp_path: Path) -> None:
    sample = EvaluatedSample(0, "a", "grün \ud83d", 1, {"reward": 1.0})
    write_seed_file(tmp_path / "eval-0.json", EvaluationRecord(0, (sample,)), kls=[None])
    write_evaluation(tmp_path / "eval-0.json", read_evaluation(tmp_path / "eval-0.json"))
    assert read_seed_file(tmp_path / "eval-0.json").samples == (sample,)


def test_evaluations_of_a_run_are_numbered_with_the_kl_of_each_so_far(tmp_path: Path) -> None:
    for step, kl in ((0, 0.0), (100, 1.5), (1000, 2.5)):
        write_record(
            record_path(tmp_path, step),
            EvaluationRecord(step, RECORD.samples, {"eval/kl": kl}),
        )
    assert evaluation_files(tmp_path) == evaluation_files(tmp_path / "evaluations")
    written = write_seed_files(evaluation_files(tmp_path), tmp_path / "eval")
    assert [path.name for path in written] == ["eval-0.json", "eval-1.json", "eval-2.json"]
    assert json.loads(written[2].read_text())[0]["kl_list"] == [0.0, 1.5, 2.5]
    assert [read_seed_file(path).step for path in written] == [0, 100, 1000]
    assert evaluation_files(tmp_path / "eval") == written


def test_files_come_in_the_order_of_their_numbers_and_variants(tmp_path: Path) -> None:
    for number in (10, 9):
        (tmp_path / f"eval-{number}.json").write_text(json.dumps(FOREIGN))
    (tmp_path / "notes.json").write_text("{}")
    assert [path.name for path in evaluation_files(tmp_path)] == ["eval-9.json", "eval-10.json"]
    for step, variant in ((20, ""), (3, "@beta=1"), (3, "")):
        write_record(record_path(tmp_path, step, variant), RECORD)
    names = [path.name for path in evaluation_files(tmp_path)]
    assert names == ["step_000003.jsonl", "step_000020.jsonl", "step_000003@beta=1.jsonl"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is damaged"),
        ('{"a": 1}', "holds no list of rows"),
        ("[]", "holds no rows"),
        ('[{"instruction": "a"}]', "row 0 has no text `instruction` with a list of `answers`"),
        ('[{"instruction": "a", "answers": []}]', "row 0 has no text"),
        (
            '[{"instruction": "a", "answers": ["b"], "proxy_scores": [1, 2]}]',
            "has 1 answers, and `proxy_scores`",
        ),
        ('[{"instruction": "a", "answers": ["b"], "member_scores": {"x": []}}]', "one score of each member"),
    ],
)
def test_a_file_of_another_format_is_told_in_a_sentence(content: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "eval-0.json"
    path.write_text(content)
    with pytest.raises(DataError, match=sentence) as caught:
        read_evaluation(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_folder_without_evaluations_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither step_<n>.jsonl nor eval-<k>.json"):
        evaluation_files(tmp_path)
    (tmp_path / "evaluations").mkdir()
    with pytest.raises(ConfigError, match="did you mean"):
        evaluation_files(tmp_path / "evaluation")
    write_record(record_path(tmp_path, 0), EvaluationRecord(0, ()))
    with pytest.raises(DataError, match="holds no samples"):
        read_evaluation(record_path(tmp_path, 0))

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from conch.converters.cases import Case, Sample, build_cases, requests_of
from conch.converters.checkpoint import Checkpoint, read_checkpoint
from conch.converters.parity import CaseResult, ParityReport
from conch.converters.reference import Reference, compare, golden_of
from conch.errors import ConversionError
from tests.tiny import reward_checkpoint

PAD, EOS = 21, 22


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return read_checkpoint(str(reward_checkpoint(tmp_path_factory.mktemp("checkpoint"))))


def samples(cases: list[Case]) -> list[Sample]:
    return [sample for case in cases for sample in case.samples]


@pytest.mark.parametrize("form", ["text", "token"])
def test_build_cases_covers_every_length_and_batch_size(checkpoint: Checkpoint, form) -> None:
    cases = build_cases(checkpoint, form, max_batch_size=64)

    assert {len(sample.ids) for sample in samples(cases)} == set(range(1, 17))
    assert {1, 2, 7, 32} <= {len(case.samples) for case in cases}


def test_build_cases_stays_within_the_models_batch_size(checkpoint: Checkpoint) -> None:
    assert max(len(case.samples) for case in build_cases(checkpoint, "token", max_batch_size=5)) <= 5


def test_build_cases_climbs_a_ladder_of_lengths_in_a_long_window(tmp_path: Path) -> None:
    long = read_checkpoint(str(reward_checkpoint(tmp_path, n_positions=1000)))
    lengths = {len(sample.ids) for sample in samples(build_cases(long, "token", max_batch_size=64))}

    assert {1, 2, 3, 999, 1000} <= lengths and len(lengths) < 32


def test_build_cases_of_text_hold_unicode_nothing_and_too_much(checkpoint: Checkpoint) -> None:
    texts = {
        sample.text: sample.ids for sample in samples(build_cases(checkpoint, "text", max_batch_size=64))
    }

    assert texts[""] == (EOS,)
    assert any("漢" in text for text in texts)
    longest = max(texts, key=len)
    assert len(longest) > 32 and len(texts[longest]) == 16 and texts[longest][-1] == EOS


def test_requests_of_tokens_pad_on_the_side_of_the_case() -> None:
    pair = (Sample("", (1, 2, 3)), Sample("", (4,)))
    right, left = requests_of([Case("r", pair), Case("l", pair, left_padded=True)], "token", PAD)

    assert right == {"input_ids": [[1, 2, 3], [4, PAD, PAD]], "attention_mask": [[1, 1, 1], [1, 0, 0]]}
    assert left == {"input_ids": [[1, 2, 3], [PAD, PAD, 4]], "attention_mask": [[1, 1, 1], [0, 0, 1]]}


def test_compare_divides_the_error_by_large_scores_only(checkpoint: Checkpoint) -> None:
    large = Reference(replace(checkpoint, mean=(0.0,), std=(1e-3,)), normalise=True)
    small = Reference(replace(checkpoint, mean=(0.0,), std=(1e3,)), normalise=True)
    for reference, expected in ((large, 1e-2 / abs(large.scores((0, 1))[0])), (small, 1e-2)):
        (right,) = reference.scores((0, 1))
        report = compare(
            [Case("one", (Sample("", (0, 1)),))], [{"scores": [[right + 1e-2]]}], reference, "float32"
        )
        assert report.worst.max_error == pytest.approx(expected, rel=1e-3)
    assert abs(large.scores((0, 1))[0]) > 10
    assert not report.ok and "FAILED" in report.table()


@pytest.mark.parametrize("reply", [{"error": "boom"}, {"scores": [[math.nan]]}, {"scores": [[math.inf]]}])
def test_compare_never_passes_a_score_that_is_none(checkpoint: Checkpoint, reply: dict) -> None:
    reference = Reference(checkpoint, normalise=False)
    report = compare([Case("one", (Sample("", (0, 1)),))], [reply], reference, "bfloat16")

    assert not report.ok and report.worst.max_error == math.inf


def test_compare_wants_a_sample_without_tokens_refused(checkpoint: Checkpoint) -> None:
    reference = Reference(checkpoint, normalise=False)
    empty = [Case("empty", (Sample("", ()),))]

    assert compare(empty, [{"error": "row 0 has no tokens"}], reference, "float32").ok
    assert not compare(empty, [{"scores": [[0.0]]}], reference, "float32").ok


def test_report_shows_the_worst_of_cases_with_one_name() -> None:
    lines = CaseResult("a", 1, 1e-3, "bad").merged(CaseResult("a", 2, 1e-7))
    report = ParityReport((lines,), 1e-5)

    assert (lines.samples, lines.max_error, lines.problem) == (3, 1e-3, "bad")
    assert "bad" in report.table()


def test_golden_of_holds_eight_samples_of_several_lengths(checkpoint: Checkpoint) -> None:
    cases = build_cases(checkpoint, "text", max_batch_size=64)
    golden = golden_of(cases, "text", Reference(checkpoint, normalise=False), "float32")

    assert len(golden.samples) == 8
    assert len({len(sample.text or "") for sample in golden.samples}) > 4


def test_reference_names_the_length_at_which_the_checkpoint_itself_fails(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConversionError, match="fails on a sample of 17 tokens"):
        Reference(checkpoint, normalise=False).scores((0,) * 17)

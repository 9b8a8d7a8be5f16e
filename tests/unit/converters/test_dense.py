"""Conversions with scores of steps or tokens: what is refused, compared and written down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import ByT5Tokenizer

from conch.converters.checkpoints.reader import RewardCheckpoint, read_checkpoint
from conch.converters.checkpoints.rules import check_dense
from conch.converters.options import ConversionOptions, ReadOptions
from conch.converters.parity.compare import ExpectedScores, compare
from conch.converters.parity.inputs import Sample
from conch.converters.parity.reference import expected_scores, golden_of
from conch.converters.parity.samples import ParityCase, build_cases
from conch.errors import ConversionError
from tests.checkpoints import classifier, process_reward

STEPS = ReadOptions(step_separator=";", granularity="step")
TOKENS = ReadOptions(granularity="token")


def check(checkpoint: RewardCheckpoint, form: Any) -> None:
    check_dense(checkpoint.rules, checkpoint.tokenizer, form)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A process reward of each kind."""
    folder = tmp_path_factory.mktemp("dense")
    process_reward(folder / "steps", "qwen2")
    classifier(folder / "encoder", "bert")
    classifier(folder / "decoder", "llama")
    classifier(folder / "two", "llama", num_labels=2, id2label={0: "kind", 1: "true"})
    return folder


@pytest.mark.parametrize(
    ("name", "reading", "expected"),
    [
        (
            "decoder",
            ReadOptions(granularity="step"),
            r"is no process reward model .* --granularity token",
        ),
        ("encoder", TOKENS, "its tokens cannot be scored: .* more than one linear layer"),
        (
            "steps",
            STEPS.model_copy(update={"granularity": "token"}),
            "scores every token, so none separates steps",
        ),
        ("steps", ReadOptions(granularity="step"), "say with --step_separator .* or score every token"),
    ],
)
def test_read_checkpoint_refuses_dense_scores_that_there_are_not(
    folder: Path, name: str, reading: ReadOptions, expected: str
) -> None:
    with pytest.raises(ConversionError, match=expected):
        read_checkpoint(str(folder / name), reading)


@pytest.mark.parametrize(
    ("name", "reading", "expected"),
    [
        ("two", TOKENS, "serves one reward, and these are kind, true: say with --reward which"),
        ("steps", STEPS.model_copy(update={"template": "{text} ok"}), "behind {text} only {eos} may stand"),
        ("steps", STEPS.model_copy(update={"template": "q;{text}"}), "holds the step separator"),
    ],
)
def test_check_dense_refuses_what_has_no_place_in_the_text(
    folder: Path, name: str, reading: ReadOptions, expected: str
) -> None:
    with pytest.raises(ConversionError, match=expected):
        check(read_checkpoint(str(folder / name), reading), "text")


def test_check_dense_wants_a_tokenizer_that_knows_the_characters_of_a_token(folder: Path) -> None:
    slow = replace(read_checkpoint(str(folder / "steps"), STEPS), tokenizer=ByT5Tokenizer())
    with pytest.raises(ConversionError, match=r"ByT5Tokenizer does not tell .* use --form token"):
        check(slow, "text")
    check(slow, "token")


def test_check_dense_refuses_conversations_as_text(folder: Path) -> None:
    steps = read_checkpoint(str(folder / "steps"), STEPS)
    update = {"template": "chat", "reads": "dialogues"}
    chat = replace(steps, rules=steps.rules.model_copy(update=update))
    with pytest.raises(ConversionError, match="with the template `chat` there is none"):
        check(chat, "text")
    check(chat, "token")


def test_check_dense_takes_any_template_where_samples_only_are_scored(folder: Path) -> None:
    reading = ReadOptions(step_separator=";", template="{text};")
    check(read_checkpoint(str(folder / "steps"), reading), "text")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({**dict(STEPS), "backend": "onnx"}, "--granularity step needs --backend python"),
        ({**dict(TOKENS), "backend": "torchscript", "form": "token"}, "--granularity token needs"),
    ],
)
def test_options_that_no_dense_model_can_have_are_refused_before_it_is_read(
    changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConversionError, match=expected):
        ConversionOptions(**changes)


# ---------------------------------------------------------------------------------------------- comparison

CASES = [ParityCase("both", (Sample("", (0,), (1,)), Sample("", (1, 2), (1, 2))))]
EXPECTED = ExpectedScores({(0,): (0.5,), (1, 2): (0.1,)}, {(0,): ((1, 0.5),), (1, 2): ((1, 0.1), (2, 0.9))})
REPLY = {"scores": [[0.5], [0.1]], "step_scores": [[0.5], [0.1, 0.9]], "step_ends": [[1], [1, 2]]}


def test_compare_gives_steps_a_line_of_their_own() -> None:
    report = compare(CASES, [REPLY | {"step_scores": [[0.5], [0.1, 0.7]]}], EXPECTED, "float32")
    sample, steps = report.results

    assert (sample.name, sample.max_difference) == ("both", 0.0)
    assert (steps.name, steps.max_difference) == ("both: each step", pytest.approx(0.2))
    assert steps.mean_difference == pytest.approx(0.2 / 3)
    assert not report.ok


def test_compare_fails_steps_that_end_elsewhere() -> None:
    assert compare(CASES, [REPLY], EXPECTED, "float32").ok
    report = compare(CASES, [REPLY | {"step_ends": [[1], [1, 3]]}], EXPECTED, "float32")
    assert not report.ok and report.worst.problem == "steps end elsewhere"
    fewer = REPLY | {"step_scores": [[0.5], [0.1]], "step_ends": [[1], [1]]}
    assert compare(CASES, [fewer], EXPECTED, "float32").worst.problem == "steps end elsewhere"


def test_compare_shows_a_step_whose_score_depends_on_its_batch() -> None:
    alone = ParityCase("alone", (Sample("", (1, 2), (1, 2)),))
    reply = {"scores": [[0.1]], "step_scores": [[0.1, 0.95]], "step_ends": [[1, 2]]}
    other = REPLY | {"step_scores": [[0.5], [0.1, 0.81]]}
    report = compare([alone, *CASES], [reply, other], EXPECTED, "bfloat16")

    assert report.worst.name == "alone against in a batch"
    assert report.worst.max_difference == pytest.approx(0.14)


def test_golden_samples_hold_the_scores_of_their_steps(folder: Path) -> None:
    checkpoint = read_checkpoint(str(folder / "steps"), STEPS)
    cases = build_cases(checkpoint, "text", max_batch_size=4)
    golden = golden_of(cases, "text", expected_scores(checkpoint, cases), "float32")

    assert max(len(sample.step_ends or ()) for sample in golden.samples) > 1
    for sample in golden.samples:
        assert sample.text is not None and sample.step_ends is not None and sample.step_scores is not None
        assert len(sample.step_ends) == len(sample.step_scores)
        assert sample.scores == (min(sample.step_scores),)
        assert sample.step_ends[-1] <= len(sample.text)

from __future__ import annotations

import json
import math
import string
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from conch.converters.checkpoints.reader import RewardCheckpoint, read_checkpoint
from conch.converters.options import ReadOptions
from conch.converters.parity.budget import longest_compared
from conch.converters.parity.compare import ExpectedScores, compare, samples_above_tolerance
from conch.converters.parity.inputs import Sample
from conch.converters.parity.reference import expected_scores, golden_of, rounding_of, rounding_of_failures
from conch.converters.parity.report import BATCH_CONSISTENCY, TOLERANCES, CaseResult, ParityReport
from conch.converters.parity.samples import ParityCase, build_cases, requests_of
from conch.converters.parity.subprocess_model import SubprocessModel, score_in_sequence
from conch.converters.to_triton import to_triton
from conch.errors import ConversionError
from tests.checkpoints import LETTERS, classifier, process_reward, tokenizer_for
from tests.tiny import reward_checkpoint

PAD, EOS = 21, 22


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> RewardCheckpoint:
    return read_checkpoint(str(reward_checkpoint(tmp_path_factory.mktemp("checkpoint"))))


def samples(cases: list[ParityCase]) -> list[Sample]:
    return [sample for case in cases for sample in case.samples]


@pytest.mark.parametrize("form", ["text", "token"])
def test_build_cases_covers_every_length_and_batch_size(checkpoint: RewardCheckpoint, form) -> None:
    cases = build_cases(checkpoint, form, max_batch_size=64)

    assert {len(sample.ids) for sample in samples(cases)} == set(range(1, 17))
    assert {1, 2, 7, 32} <= {len(case.samples) for case in cases}


def test_build_cases_stays_within_the_models_batch_size(checkpoint: RewardCheckpoint) -> None:
    assert max(len(case.samples) for case in build_cases(checkpoint, "token", max_batch_size=5)) <= 5


def test_build_cases_climbs_a_ladder_of_lengths_in_a_long_window(tmp_path: Path) -> None:
    long = read_checkpoint(str(reward_checkpoint(tmp_path, n_positions=1000)))
    lengths = {len(sample.ids) for sample in samples(build_cases(long, "token", max_batch_size=64))}

    assert {1, 2, 3, 999, 1000} <= lengths and len(lengths) < 32


def test_build_cases_of_text_hold_unicode_nothing_and_too_much(checkpoint: RewardCheckpoint) -> None:
    texts = {
        sample.text: sample.ids for sample in samples(build_cases(checkpoint, "text", max_batch_size=64))
    }

    assert texts[""] == (EOS,)
    assert any("漢" in text for text in texts)
    longest = max(texts, key=len)
    assert len(longest) > 32 and len(texts[longest]) == 16 and texts[longest][-1] == EOS


def test_build_cases_of_text_reach_the_lengths_wanted_where_the_tokenizer_joins_letters(
    tmp_path: Path,
) -> None:
    folder = reward_checkpoint(tmp_path, letters=string.ascii_letters, n_positions=200)
    joining = Tokenizer(BPE(unk_token="a"))
    joining.train_from_iterator(
        ["the cat sat on the mat and ran"], BpeTrainer(vocab_size=40, special_tokens=["<eos>", "<pad>"])
    )
    PreTrainedTokenizerFast(tokenizer_object=joining, eos_token="<eos>", pad_token="<pad>").save_pretrained(
        folder
    )
    cases = build_cases(read_checkpoint(str(folder)), "text", max_batch_size=64)

    alone = [case.samples[0] for case in cases if case.name.startswith("alone")]
    assert len({len(sample.ids) for sample in alone}) > 16
    assert 198 <= max(len(sample.ids) for sample in alone) <= 200


def test_compare_forgives_no_bit_of_difference_in_a_batch_to_what_is_batch_invariant() -> None:
    cases = [
        ParityCase("alone", (Sample("a", (1,)),)),
        ParityCase("two", (Sample("a", (1,)), Sample("b", (2,)))),
    ]
    expected = ExpectedScores({(1,): (0.5,), (2,): (0.25,)})
    replies = [{"scores": [[0.5]]}, {"scores": [[0.5 + 1e-7], [0.25]]}]

    assert compare(cases, replies, expected, "float32").ok
    exact = compare(cases, replies, expected, "float32", batch_invariant=True)
    assert not exact.ok and exact.worst.name == BATCH_CONSISTENCY and "not alike" in exact.table()


def test_requests_of_tokens_pad_on_the_side_of_the_case() -> None:
    pair = (Sample("", (1, 2, 3)), Sample("", (4,)))
    right, left = requests_of([ParityCase("r", pair), ParityCase("l", pair, left_padded=True)], "token", PAD)

    assert right == {"input_ids": [[1, 2, 3], [4, PAD, PAD]], "attention_mask": [[1, 1, 1], [1, 0, 0]]}
    assert left == {"input_ids": [[1, 2, 3], [PAD, PAD, 4]], "attention_mask": [[1, 1, 1], [0, 0, 1]]}


def one(*ids: int) -> list[ParityCase]:
    return [ParityCase("one", (Sample("", ids),))]


@pytest.mark.parametrize(("right", "error"), [(40.0, 0.5 / 40.0), (0.25, 0.5), (-40.0, 0.5 / 40.0)])
def test_compare_divides_the_error_by_large_scores_only(right: float, error: float) -> None:
    report = compare(one(0, 1), [{"scores": [[right + 0.5]]}], ExpectedScores({(0, 1): (right,)}), "float32")

    assert report.worst.max_error == pytest.approx(error)
    assert report.worst.max_difference == report.worst.mean_difference == pytest.approx(0.5)
    assert not report.ok and "FAILED" in report.table()


def test_compare_gives_the_largest_and_the_mean_difference_over_samples_and_rewards() -> None:
    cases = [ParityCase("two", (Sample("", (0,)), Sample("", (1,))))]
    expected = ExpectedScores({(0,): (1.0, 2.0), (1,): (3.0, 4.0)})
    (line,) = compare(cases, [{"scores": [[1.0, 2.4], [2.8, 4.2]]}], expected, "bfloat16").results

    assert line.max_difference == pytest.approx(0.4)
    assert line.mean_difference == pytest.approx((0.0 + 0.4 + 0.2 + 0.2) / 4)
    assert line.max_error == pytest.approx(0.4 / 2.0)


def test_compare_shows_a_score_that_depends_on_its_batch() -> None:
    """Each is within the tolerance of the original, but they are too far from each other."""
    alone, together = (
        ParityCase("alone", (Sample("", (0,)),)),
        ParityCase("both", (Sample("", (0,)), Sample("", (1,)))),
    )
    replies = [{"scores": [[1.08]]}, {"scores": [[0.92], [1.0]]}]
    report = compare([alone, together], replies, ExpectedScores({(0,): (1.0,), (1,): (1.0,)}), "bfloat16")

    assert report.worst.name == BATCH_CONSISTENCY and not report.ok
    assert report.worst.max_difference == pytest.approx(0.16)
    assert report.total.max_difference == pytest.approx(0.08)


@pytest.mark.parametrize("reply", [{"error": "boom"}, {"scores": [[math.nan]]}, {"scores": [[math.inf]]}])
def test_compare_never_passes_a_score_that_is_none(reply: dict) -> None:
    report = compare(one(0, 1), [reply], ExpectedScores({(0, 1): (0.0,)}), "bfloat16")

    assert not report.ok and report.worst.max_error == math.inf


def test_compare_wants_a_sample_without_tokens_refused() -> None:
    assert compare(one(), [{"error": "row 0 has no tokens"}], ExpectedScores({}), "float32").ok
    assert not compare(one(), [{"scores": [[0.0]]}], ExpectedScores({}), "float32").ok


def test_report_shows_the_worst_of_cases_with_one_name() -> None:
    lines = CaseResult("a", 1, 1e-3, problem="bad").merged(CaseResult("a", 2, 1e-7))
    report = ParityReport((lines,), 1e-5)

    assert (lines.samples, lines.max_error, lines.problem) == (3, 1e-3, "bad")
    assert "bad" in report.table()


def test_golden_of_holds_eight_samples_of_several_lengths(checkpoint: RewardCheckpoint) -> None:
    cases = build_cases(checkpoint, "text", max_batch_size=64)
    golden = golden_of(cases, "text", expected_scores(checkpoint, cases), "float32")

    assert len(golden.samples) == 8
    assert len({len(sample.text or "") for sample in golden.samples}) > 4


def test_reference_names_the_length_at_which_the_checkpoint_itself_fails(
    checkpoint: RewardCheckpoint,
) -> None:
    with pytest.raises(ConversionError, match="fails on a sample of 17 tokens"):
        expected_scores(checkpoint, one(*(0,) * 17))


def test_build_cases_of_a_process_reward_hold_texts_of_several_steps(tmp_path: Path) -> None:
    process_reward(tmp_path, "llama")
    steps = read_checkpoint(str(tmp_path), ReadOptions(step_separator=";"))
    counts = {
        sample.ids.count(LETTERS.index(";"))
        for sample in samples(build_cases(steps, "text", max_batch_size=8))
    }

    assert len(counts) > 5


def test_build_cases_of_conversations_want_other_texts_refused(tmp_path: Path) -> None:
    classifier(tmp_path, "llama")
    tokenizer = tokenizer_for("llama")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}<eos>"
    tokenizer.save_pretrained(tmp_path)
    cases = build_cases(
        read_checkpoint(str(tmp_path), ReadOptions(template="chat")), "text", max_batch_size=8
    )
    texts = {sample.text: sample.ids for sample in samples(cases)}

    assert texts["no JSON"] == ()
    without_content = {
        ids for text, ids in texts.items() if text.count('"content": ""') == text.count('"content"') > 0
    }
    assert without_content == {(EOS,)}
    assert max(len(ids) for ids in texts.values()) == 32


def test_score_in_sequence_feeds_each_model_the_replies_of_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "import json, sys\n"
        "numbers = [request['n'] for request in json.load(sys.stdin)['requests']]\n"
        "json.dump([{'error': 'three'} if n == 3 else {'n': n + 1} for n in numbers], sys.stdout)\n"
    )
    requests = [{"n": 1}, {"n": 3}, {"n": 2}, {"n": 5}]
    with SubprocessModel(tmp_path) as first, SubprocessModel(tmp_path) as second:
        replies = score_in_sequence([first, second], requests, "cpu")

    assert replies == [{"n": 3}, {"error": "three"}, {"error": "three"}, {"n": 7}]


@pytest.mark.parametrize(("read", "ok"), [([1, 2, 3], True), ([1, 2, 4], False), ([1, 2], False)])
def test_compare_wants_the_very_tokens_of_a_sample_that_is_too_long_to_score(
    read: list[int], ok: bool
) -> None:
    long = ParityCase("long", (Sample("abc", (1, 2, 3)),), only_ids=True)
    short = ParityCase("short", (Sample("a", (1,)),))
    replies: list[dict[str, Any]] = [{"ids": [read]}, {"scores": [[0.5]]}]
    report = compare([long, short], replies, ExpectedScores({(1,): (0.5,)}), "float32")

    assert report.ok is ok
    assert ok or "other tokens are read from place 2 of 3 on" in report.table()


def test_what_is_read_of_a_long_sample_is_compared_where_its_score_is_not(tmp_path: Path) -> None:
    """And the eos that closes it is among the tokens."""
    long = read_checkpoint(str(reward_checkpoint(tmp_path, n_positions=2100)))
    cases = build_cases(long, "text", max_batch_size=4)
    asked = [case for case in cases if case.only_ids]

    assert [len(case.samples[0].ids) for case in asked] == [2100, 2100]
    assert len(asked[0].samples[0].text) > 2100 > len(asked[1].samples[0].text)
    assert all(case.samples[0].ids[-1] == EOS for case in asked)
    assert max(len(case.samples) for case in cases if any(len(s.ids) > 2048 for s in case.samples)) == 1
    assert {"only_ids": True}.items() <= requests_of(asked, "text", PAD)[0].items()


def test_the_ladder_of_compared_lengths_ends_where_they_take_too_long(tmp_path: Path) -> None:
    small = reward_checkpoint(tmp_path / "small", n_positions=16)
    model = read_checkpoint(str(small)).model
    assert longest_compared(model, 100) == 100
    assert longest_compared(model, 3000) == 3000
    assert 3000 < longest_compared(model, 32_768) == longest_compared(model, 32_768) < 32_768
    model.config.n_layer = 4000
    assert longest_compared(model, 32_768) == 2048


def test_score_in_sequence_hands_token_ids_that_were_asked_for_to_no_other_model(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "import json, sys\n"
        "requests = json.load(sys.stdin)['requests']\n"
        "json.dump([{'ids': [[1]]} if 'only_ids' in each else {'n': 1} for each in requests], sys.stdout)\n"
    )
    with SubprocessModel(tmp_path) as first, SubprocessModel(tmp_path) as second:
        replies = score_in_sequence([first, second], [{"only_ids": True}, {}], "cpu")

    assert replies == [{"ids": [[1]]}, {"n": 1}]


def with_a_token_that_rounds_badly(folder: Path) -> tuple[RewardCheckpoint, Sample]:
    """A checkpoint in which the last token of a sample has an embedding far from 0, most digits of which the
    norms take off again; and the sample."""
    letters = string.ascii_letters + string.digits  # so many that a letter is in few samples
    checkpoint = read_checkpoint(str(reward_checkpoint(folder, letters=letters)))
    cases = build_cases(checkpoint, "token", max_batch_size=64)
    distinct = {sample.key: sample for sample in samples(cases)}
    holders = Counter(token for sample in distinct.values() for token in {*sample.ids})
    with_letters = [sample for sample in distinct.values() if sample.ids and sample.ids[-1] < len(letters)]
    sample = min(with_letters, key=lambda sample: (holders[sample.ids[-1]], sample.key))
    assert holders[sample.ids[-1]] <= len(distinct) / 8
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wte.weight"][sample.ids[-1]] += 3000.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return read_checkpoint(str(folder)), sample


def test_sample_that_the_original_rounds_as_badly_refuses_no_conversion(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint, bad = with_a_token_that_rounds_badly(tmp_path / "checkpoint")
    options = {"dtype": "float16", "model_store": str(tmp_path / "store"), "form": "token"}
    with caplog.at_level("WARNING", logger="conch"):
        conversion = to_triton(checkpoint.source, name="rm", **options)
    assert conversion.path is not None
    warnings = [record.message for record in caplog.records if "rounds its score as badly" in record.message]
    start = f"a sample of {len(bad.ids)} tokens is compared to "
    assert any(warning.startswith(start) for warning in warnings)
    golden = json.loads((conversion.path / "golden.json").read_text())
    assert list(bad.ids) not in [each["input_ids"] for each in golden["samples"]]


def test_rounding_of_a_usual_sample_is_far_below_the_tolerance(tmp_path: Path) -> None:
    checkpoint, bad = with_a_token_that_rounds_badly(tmp_path)
    cases = build_cases(checkpoint, "token", max_batch_size=64)
    usual = [sample for sample in samples(cases) if bad.ids[-1] not in sample.ids]
    rounding = rounding_of(checkpoint, [bad, *usual], "float32")
    assert all(0 < rounding[sample.key] < TOLERANCES["float32"] for sample in usual)
    assert rounding[bad.key] > 10 * max(rounding[sample.key] for sample in usual)
    coarser = rounding_of(checkpoint, [bad], "bfloat16")[bad.key] / rounding[bad.key]
    assert coarser == pytest.approx(2**16)


def test_difference_that_rounding_explains_is_no_error_and_one_above_it_is(
    checkpoint: RewardCheckpoint,
) -> None:
    one, other = samples(build_cases(checkpoint, "token", max_batch_size=64))[:2]
    cases = [ParityCase("alone", (one,)), ParityCase("both", (one, other))]
    expected = ExpectedScores({one.key: (0.5,), other.key: (1.0,)})
    replies = [{"scores": [[0.5]]}, {"scores": [[0.5 + 1e-3], [1.0]]}]
    assert samples_above_tolerance(cases, replies, expected, "float32") == {one.key: one}
    assert compare(cases, replies, expected, "float32", rounding={one.key: 2e-3}).ok
    for rounding in ({}, {one.key: 1e-4}, {other.key: 1.0}):
        assert not compare(cases, replies, expected, "float32", rounding=rounding).ok
    lost = [{"scores": [[0.5]]}, {"scores": [[math.nan], [1.0]]}]
    assert samples_above_tolerance(cases, lost, expected, "float32") == {}
    assert not compare(cases, lost, expected, "float32", rounding={one.key: 2e-3}).ok


def test_rounding_explains_neither_a_wrong_score_nor_many(checkpoint: RewardCheckpoint) -> None:
    cases = [case for case in build_cases(checkpoint, "token", max_batch_size=64) if not case.only_ids]
    expected = expected_scores(checkpoint, cases)
    wrong = samples(cases)[5]

    def replies(keys: set[tuple[int, ...]]) -> list[dict[str, Any]]:
        moved = {key: [score + 1e-3 * (key in keys) for score in row] for key, row in expected.scores.items()}
        return [{"scores": [moved[sample.key] for sample in case.samples]} for case in cases]

    def read() -> RewardCheckpoint:
        asked.append("read")
        return checkpoint

    asked: list[str] = []
    assert rounding_of_failures(cases, replies({wrong.key}), expected, "float32", read) == {}
    assert asked == ["read"]
    assert rounding_of_failures(cases, replies({*expected.scores}), expected, "float32", read) == {}
    assert rounding_of_failures(cases, replies(set()), expected, "float32", read) == {}
    assert asked == ["read"]

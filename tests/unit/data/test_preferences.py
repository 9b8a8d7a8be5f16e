"""Judged rows: what is refused, what is held out, and what a reward model reads of them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from conch.data.files import Rows
from conch.data.preferences import (
    PreferencePair,
    RowForm,
    ScoredText,
    TextEncoder,
    check_rows,
    check_texts,
    collate_judgements,
    hold_out,
    template_for,
)
from conch.errors import DataError
from tests.runs import EOS, PAD, TOKENIZER
from tests.tiny import char_tokenizer

SCORED = [{"text": "abc", "score": 0.5}, {"text": "h", "score": -1}]
SEVERAL = [
    {"text": "abc", "scores": {"kind": 1, "brief": 0.5}},
    {"text": "h", "scores": {"brief": 2.0, "kind": -1.0}},
]
PAIRS = [{"chosen": "abc", "rejected": "cb"}, {"chosen": "h", "rejected": "gfedcb", "margin": 1.5}]
NAMED = [
    {"chosen": "a", "rejected": "b", "objective": "kind"},
    {"chosen": "c", "rejected": "d", "objective": "brief"},
    {"chosen": "e", "rejected": "f", "objective": "kind"},
]


@pytest.mark.parametrize(
    ("rows", "form"),
    [
        (SCORED, RowForm(compares=False)),
        (SEVERAL, RowForm(compares=False, objectives=("kind", "brief"))),
        (PAIRS, RowForm(compares=True)),
        (NAMED, RowForm(compares=True, objectives=("kind", "brief"))),
    ],
)
def test_form_is_what_rows_have_in_common(rows: list[Any], form: RowForm) -> None:
    assert check_rows(rows) == form
    assert form.reward_names == (form.objectives or ("reward",))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([*SCORED, {"text": "a"}], r"row 2: its score None is not a finite number"),
        ([*SCORED, PAIRS[0]], r'row 2 has no string "text".*chosen, rejected'),
        ([PAIRS[0], {"chosen": "a"}], r'row 1 has no string "rejected"'),
        ([PAIRS[0], SCORED[0]], r'row 1 has no string "chosen"'),
        ([{"text": 3, "score": 1.0}], r'row 0 has no string "text"'),
        (["just text"], r"row 0 is no dict.*just text"),
        ([SCORED[0], "just text"], r"row 1 is no dict"),
        ([{"text": "a", "score": float("nan")}], "row 0: its score nan"),
        ([{"text": "a", "score": "5"}], "row 0: its score '5'"),
        ([*SEVERAL, {"text": "a", "scores": {"kind": 1}}], r'row 2 .* "scores" .* kind, brief \(kind\)'),
        ([*SEVERAL, SCORED[0]], r'row 2 does not have the "scores"'),
        ([{"text": "a", "scores": {"kind": None}}], "row 0: its score None for kind"),
        ([{"text": "a", "scores": {"a,b": 1}}], "objective 'a,b': a name"),
        ([{**PAIRS[0], "objective": ["kind"]}], r"objective \['kind'\]: a name"),
        ([*NAMED, PAIRS[0]], r'row 3 has the objective None.*kind, brief.*needs an "objective"'),
        ([{**PAIRS[0], "margin": "far"}], "row 0: its margin 'far'"),
        ([{**PAIRS[0], "margin": -1.0}], r"row 0: its margin -1\.0 .*at least 0"),
        ([{**PAIRS[0], "margin": float("inf")}], "row 0: its margin inf"),
    ],
)
def test_bad_rows_are_refused_by_number(rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_rows(rows)


@pytest.mark.parametrize(
    ("like", "rows", "message"),
    [
        (SCORED, PAIRS, r'evaluation row 0 has no string "text"'),
        (SCORED, SEVERAL, "evaluation row 0: its score None"),
        (NAMED, [{**PAIRS[0], "objective": "loud"}], "evaluation row 0 has the objective 'loud'"),
        (PAIRS, NAMED, "evaluation row 0 has the objective 'kind', training rows have none"),
    ],
)
def test_evaluation_rows_must_be_like_training_rows(like: list[Any], rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_rows(rows, like=check_rows(like), what="evaluation row")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "at least one"),
        ("abc", "a list"),
        (["a", 3], r"reference text 1 is neither a string nor a dialogue \(got int\)"),
    ],
)
def test_bad_reference_texts_are_refused(texts: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_texts(texts)


# --------------------------------------------------------------------------------------------------- held out


def test_hold_out_takes_the_share_and_shares_nothing() -> None:
    rows = [ScoredText((number,), (float(number),)) for number in range(10)]
    train, held_out = hold_out(rows, 0.3, seed=1)
    assert len(held_out) == 3 and len(train) == 7
    assert sorted(row.token_ids for row in [*train, *held_out]) == [(number,) for number in range(10)]
    assert hold_out(rows, 0.3, seed=1) == (train, held_out)
    assert hold_out(rows, 0.3, seed=2)[1] != held_out


def test_hold_out_keeps_repetitions_together() -> None:
    texts = [ScoredText((number % 4,), (float(number),)) for number in range(20)]
    train, held_out = hold_out(texts, 0.5, seed=0)
    assert len({row.identity for row in held_out}) == 2 and len(train) == len(held_out) == 10
    assert not {row.identity for row in train} & {row.identity for row in held_out}
    # Whoever is preferred, it is the same question.
    pairs = [PreferencePair((1,), (2,)), PreferencePair((2,), (1,)), PreferencePair((3,), (4,))]
    for seed in range(4):
        train, _ = hold_out(pairs, 0.5, seed)
        assert (pairs[0] in train) == (pairs[1] in train)


def test_hold_out_refuses_to_leave_nothing_to_train_on() -> None:
    rows = [ScoredText((number,), (0.0,)) for number in range(4)]
    with pytest.raises(DataError, match=r"eval_fraction` = 0.99 holds out all 4 different rows"):
        hold_out(rows, 0.99, seed=0)
    with pytest.raises(DataError, match=r"holds out all 1 different rows.*`reward_model\.eval_fraction=0`"):
        hold_out(rows[:1], 0.05, seed=0)


def test_hold_out_of_few_rows_takes_one() -> None:
    rows = [ScoredText((number,), (0.0,)) for number in range(4)]
    train, held_out = hold_out(rows, 0.05, seed=0)
    assert (len(train), len(held_out)) == (3, 1)


# ----------------------------------------------------------------------------------------------------- tokens


def encoder(max_length: int | None, template: str = "{text}{eos}", side: str = "right") -> TextEncoder:
    tokenizer = char_tokenizer("abcdefgh")
    tokenizer.truncation_side = side
    return TextEncoder(tokenizer, template, max_length)


@pytest.mark.parametrize(
    ("template", "side", "expected"),
    [
        # A text of 5 letters and its eos in a space of 4: the eos stays.
        ("{text}{eos}", "right", [0, 1, 2, EOS]),
        ("{text}{eos}", "left", [2, 3, 4, EOS]),
        ("{text}", "right", [0, 1, 2, 3]),
        ("h{text}{eos}", "right", [7, 0, 1, EOS]),
    ],
)
def test_long_texts_lose_their_end_or_beginning_but_not_eos(
    template: str, side: str, expected: list[int]
) -> None:
    short, long = encoder(4, template, side).encode(["a", "abcde"])
    assert list(long) == expected
    assert len(short) < 4


def test_long_texts_keep_the_tokens_that_a_tokenizer_adds() -> None:
    tokenizer = char_tokenizer("abcdefgh")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A <eos>", special_tokens=[("<unk>", EOS + 1), ("<eos>", EOS)]
    )
    assert TextEncoder(tokenizer, "{text}", 4).encode(["abcde"]) == [(EOS + 1, 0, 1, EOS)]


def test_cut_texts_are_counted_in_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    several = encoder(3)
    several.encode(["a", "abcd", "ab"])
    several.encode_rows([{"chosen": "abc", "rejected": "b"}], RowForm(compares=True))
    with caplog.at_level(logging.WARNING):
        several.report_cuts()
        encoder(9).report_cuts()
    assert caplog.messages == ["2 of 5 texts cut to 3 tokens on the right"]


def test_a_text_without_tokens_is_refused() -> None:
    assert encoder(4).encode([""]) == [(EOS,)]
    with pytest.raises(DataError, match=r"the text '' has no tokens"):
        encoder(4, "{text}").encode(["a", ""])


def test_rows_without_tokens_are_named_whatever_was_left_out_before_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = framed("$A")
    tokenizer.chat_template = "{% if messages[0].content == 'h' %}{{ raise_exception('no h') }}{% endif %}b"
    refused = [{"role": "user", "content": "h"}]
    rows = [{"text": refused, "score": 1}, {"text": "a", "score": 1}, {"text": "", "score": 0}]
    places = [f"d.jsonl line {number}" for number in (1, 2, 5)]
    for given, name in ((rows, "row 2"), (Rows(rows, places), "d.jsonl line 5")):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="conch"):
            TextEncoder(tokenizer, "{text}", None).encode_rows(given, RowForm(compares=False))
        assert f"1 of 2 rows left out: {name}: the text '' has no tokens" in caplog.text
    with pytest.raises(DataError, match=r"^text 1: the text '' has no tokens"):
        encoder(4, "{text}").encode(["a", ""])


def test_rows_keep_their_numbers_in_the_order_of_objectives() -> None:
    several = TextEncoder(TOKENIZER, "{text}", None)
    assert several.encode_rows(SEVERAL, check_rows(SEVERAL)) == [
        ScoredText((0, 1, 2), (1.0, 0.5)),
        ScoredText((7,), (-1.0, 2.0)),
    ]
    assert several.encode_rows(PAIRS, check_rows(PAIRS))[1] == PreferencePair(
        (7,), (6, 5, 4, 3, 2, 1), 1.5, 0
    )
    named = several.encode_rows(NAMED, check_rows(NAMED))
    assert [row.objective for row in named if isinstance(row, PreferencePair)] == [0, 1, 0]


def test_pairs_are_padded_on_the_right_side_by_side() -> None:
    batch = collate_judgements([PreferencePair((1,), (2, 3), 0.5, 1), PreferencePair((4, 5, 6), (7,))], PAD)
    assert batch.input_ids.tolist() == [[[1, PAD, PAD], [2, 3, PAD]], [[4, 5, 6], [7, PAD, PAD]]]  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(batch.attention_mask, batch.input_ids != PAD)  # pyright: ignore[reportAttributeAccessIssue]
    assert batch.margins.tolist() == [0.5, 0.0]  # pyright: ignore[reportAttributeAccessIssue]
    assert batch.objectives.tolist() == [1, 0]  # pyright: ignore[reportAttributeAccessIssue]


# ------------------------------------------------------------------------ special tokens, dialogues, refusals


def framed(single: str) -> PreTrainedTokenizerFast:
    """Letters, with <unk> for a BOS where `single` has it, and <eos>."""
    tokenizer = char_tokenizer("abcdefgh")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<unk>", EOS + 1), ("<eos>", EOS)]
    )
    tokenizer.bos_token = "<unk>"
    return tokenizer


BOS = EOS + 1


@pytest.mark.parametrize(
    ("single", "template", "text", "expected"),
    [
        ("<unk> $A", "{text}{eos}", "ab", (BOS, 0, 1, EOS)),
        ("<unk> $A", "{text}{eos}", "<unk>ab<eos>", (BOS, 0, 1, EOS)),
        ("<unk> $A <eos>", "{text}", "ab", (BOS, 0, 1, EOS)),
        ("<unk> $A <eos>", "{text}", "<unk>ab<eos>", (BOS, 0, 1, EOS)),
        ("<unk> $A <eos>", "{text}{eos}", "ab", (BOS, 0, 1, EOS)),
        ("$A", "{text}{eos}", "ab<eos>", (0, 1, EOS)),
        ("$A", "h{text}{eos}", "ab", (7, 0, 1, EOS)),
    ],
)
def test_no_special_token_stands_twice_around_a_text(
    single: str, template: str, text: str, expected: tuple[int, ...]
) -> None:
    assert TextEncoder(framed(single), template, None).encode([text]) == [expected]


SPOKEN = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]


@pytest.mark.parametrize("template", ["chat", "{text}", "{text}{eos}"])
def test_a_dialogue_has_the_special_tokens_of_its_template_alone(template: str) -> None:
    tokenizer = framed("<unk> $A <eos>")
    tokenizer.chat_template = "<unk>{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    assert TextEncoder(tokenizer, template, None).encode([SPOKEN]) == [(BOS, 0, 1, EOS, 2, 3, EOS)]


def test_a_template_of_dialogues_takes_no_text() -> None:
    tokenizer = framed("$A")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match=r"text 0 is a string, and the template `chat` takes dialogues"):
        TextEncoder(tokenizer, "chat", None).encode(["ab"])


def test_rows_of_dialogues_are_read_by_the_chat_template_unless_told_otherwise() -> None:
    tokenizer = framed("$A")
    pair = {"chosen": SPOKEN, "rejected": [*SPOKEN[:1], {"role": "assistant", "content": "c"}]}
    texts = {"chosen": "ab", "rejected": "a"}
    form = check_rows([pair])
    assert template_for([pair], form, tokenizer) == "chat"
    assert template_for([texts], form, tokenizer) == "{text}{eos}"
    with pytest.raises(DataError, match="row 1 is of texts, row 0 is not: a reward model reads one or"):
        template_for([pair, texts], form, tokenizer)
    with pytest.raises(DataError, match=r"^d\.jsonl line 4 is of texts, d\.jsonl line 1 is not"):
        template_for(Rows([pair, texts], ["d.jsonl line 1", "d.jsonl line 4"]), form, tokenizer)


def test_pairs_that_cutting_makes_equal_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"chosen": "aabc", "rejected": "aabd"}, {"chosen": "bbc", "rejected": "cbc"}]
    form = check_rows(rows)
    with caplog.at_level(logging.WARNING, logger="conch"):
        (left,) = encoder(3).encode_rows(rows, form)
    assert isinstance(left, PreferencePair) and left.chosen == (1, 1, EOS)
    assert "1 of 2 pairs left out: their texts are equal once tokenised and cut" in caplog.text
    with pytest.raises(DataError, match="the two texts of each of the 1 pairs are equal once tokenised and"):
        encoder(3).encode_rows(rows[:1], form)


def test_rows_that_a_template_refuses_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = framed("$A")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    refused = [{"role": "system", "content": "h"}, *SPOKEN]
    rows = [{"chosen": SPOKEN, "rejected": SPOKEN[:1]}, {"chosen": SPOKEN, "rejected": refused}]
    with caplog.at_level(logging.WARNING, logger="conch"):
        (left,) = TextEncoder(tokenizer, "chat", None).encode_rows(rows, check_rows(rows))
    assert isinstance(left, PreferencePair) and left.chosen == (0, 1, 2, 3)
    assert "1 of 2 rows left out: the chat template does not take row 1: no system" in caplog.text

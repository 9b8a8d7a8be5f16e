"""Samples for supervised training: ids and masks by hand."""

from __future__ import annotations

import copy
import logging
from typing import Any, Literal

import pytest

from conch.data.files import Rows
from conch.data.samples import TokenizedSample, collate, tokenize_samples
from conch.data.text import TextCodec
from conch.errors import DataError
from tests.runs import EOS, PAD, TOKENIZER


def tokenize(
    *samples: Any,
    max_tokens: int | None = None,
    side: Literal["left", "right"] = "left",
    encoder_decoder: bool = False,
) -> list[tuple[list[int], list[int]]]:
    codec = TextCodec(TOKENIZER, encoder_decoder=encoder_decoder)
    made = tokenize_samples(samples, codec, max_tokens=max_tokens, truncation_side=side)
    return [(list(sample.token_ids), [int(learned) for learned in sample.loss_mask]) for sample in made]


def made(*samples: Any) -> list[TokenizedSample]:
    return tokenize_samples(samples, TextCodec(TOKENIZER), max_tokens=None, truncation_side="left")


def test_strings_are_learned_from_their_second_token_to_eos() -> None:
    assert tokenize("abc", "h") == [([0, 1, 2, EOS], [0, 1, 1, 1]), ([7, EOS], [0, 1])]


def test_of_pairs_the_completion_is_learned() -> None:
    pair = {"prompt": "abc", "completion": "de"}
    assert tokenize(pair) == [([0, 1, 2, 3, 4, EOS], [0, 0, 0, 1, 1, 1])]


def test_a_pair_without_prompt_is_learned_like_a_string() -> None:
    assert tokenize({"prompt": "", "completion": "abc"}) == tokenize("abc")


def test_an_eos_that_stands_in_the_text_is_not_doubled() -> None:
    assert tokenize("ab<eos>", {"prompt": "a", "completion": "<eos>"}) == [
        ([0, 1, EOS], [0, 1, 1]),
        ([0, EOS], [0, 1]),
    ]


def test_a_bos_that_the_tokenizer_does_not_add_is_not_added() -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    (sample,) = tokenize_samples(["ab"], TextCodec(tokenizer), max_tokens=None, truncation_side="left")
    assert sample.token_ids == (0, 1, EOS)


def test_collate_aligns_responses_and_masks_padding() -> None:
    batch = collate(made("abc", {"prompt": "def", "completion": "g"}), PAD)
    assert batch.input_ids.tolist() == [[PAD, PAD, 0, 1, 2, EOS], [3, 4, 5, 6, EOS, PAD]]
    assert batch.attention_mask.int().tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]
    assert batch.loss_mask.int().tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.response_ids.tolist() == [[1, 2, EOS], [6, EOS, PAD]]


def test_collate_keeps_gaps_in_what_is_learned() -> None:
    batch = collate([TokenizedSample((0, 1, 2, 3), (False, True, False, True))], PAD)
    assert batch.loss_mask.int().tolist() == [[1, 0, 1]]


def test_the_first_token_is_never_learned() -> None:
    batch = collate([TokenizedSample((0, 1), (True, True)), TokenizedSample((2,), (True,))], PAD)
    assert batch.input_ids.tolist() == [[0, 1], [2, PAD]]
    assert batch.loss_mask.int().tolist() == [[1], [0]]


def test_collate_of_nothing_learned_still_has_a_column() -> None:
    batch = collate([TokenizedSample((0, 1), (False, False))], PAD)
    assert batch.input_ids.tolist() == [[0, 1, PAD]]
    assert batch.loss_mask.int().tolist() == [[0]]


def test_an_eos_that_is_also_the_pad_stays_learned() -> None:
    batch = collate(made("abc", "d"), pad_token_id=EOS)
    assert batch.loss_mask.int().tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("side", "string", "pair"),
    [
        ("left", ([2, 3, 4, EOS], [1, 1, 1, 1]), ([1, 2, 3, EOS], [0, 0, 1, 1])),
        ("right", ([0, 1, 2, 3], [0, 1, 1, 1]), ([0, 1, 2, 3], [0, 0, 0, 1])),
    ],
)
def test_long_samples_are_cut_on_the_given_side_and_counted(
    side: Literal["left", "right"], string: Any, pair: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = tokenize("abcde", "a", {"prompt": "abc", "completion": "d"}, max_tokens=4, side=side)
    assert found == [string, ([0, EOS], [0, 1]), pair]
    (message,) = caplog.messages
    assert message.startswith("2 of 3 samples have more than 4 tokens (the longest 6): cut on the " + side)
    assert "; 0 dropped" in message


def test_samples_with_nothing_left_to_learn_are_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = tokenize({"prompt": "abcd", "completion": "e"}, "gh", max_tokens=4, side="right")
    assert found == [([6, 7, EOS], [0, 1, 1])]
    assert caplog.messages[0].endswith("cut on the right; 1 dropped, of which nothing to be learned was left")


def test_a_sample_may_fill_the_window(caplog: pytest.LogCaptureFixture) -> None:
    assert len(tokenize("abcdef", max_tokens=7)[0][0]) == 7
    assert not caplog.messages


def test_where_nothing_is_left_of_any_sample_it_is_an_error() -> None:
    with pytest.raises(DataError, match=r"no sample has a learned token among the 4 .* now right"):
        tokenize({"prompt": "abcd", "completion": "e"}, max_tokens=4, side="right")


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "list of samples is empty"),
        ("abc", "samples are one string"),
        (["", ""], "none of the 2 samples can be used: sample 0 is empty once tokenised; sample 1 is"),
        ([{"prompt": "a", "completion": ""}], "completion of sample 0 is empty"),
        (["a", 3], "sample 1 is neither a string, nor a dict"),
        ([{"prompt": "a"}], "sample 0 is neither"),
        ([{"prompt": None, "completion": "a"}], 'sample 0 has null for "prompt"'),
        ([{"prompt": "a", "completion": ["b"]}], "sample 0 is neither"),
        ([{"messages": []}], "sample 0 is neither"),
        ([[{"role": "user"}]], "sample 0 is neither"),
        ([["a", "b"]], "sample 0 is neither"),
    ],
)
def test_bad_samples_are_refused_by_number(samples: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenize_samples(samples, TextCodec(TOKENIZER), max_tokens=7, truncation_side="left")


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ("abc", 'sample 0 is no pair; an encoder-decoder .* "prompt" and "completion"'),
        ([{"role": "user", "content": "a"}], "sample 0 is no pair"),
        ({"prompt": "", "completion": "a"}, "prompt of sample 0 is empty"),
    ],
)
def test_encoder_decoders_take_pairs_alone(sample: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenize(sample, encoder_decoder=True)
    assert tokenize({"prompt": "a", "completion": "b"}, encoder_decoder=True) == [([0, 1, EOS], [0, 1, 1])]


@pytest.mark.parametrize("sample", ["abc", 3])
def test_a_bad_sample_of_a_file_is_named_by_its_line(sample: Any) -> None:
    rows, codec = Rows([sample], ["rows.jsonl line 7"]), TextCodec(TOKENIZER, encoder_decoder=True)
    with pytest.raises(DataError, match=r"^rows\.jsonl line 7 is n"):
        tokenize_samples(rows, codec, max_tokens=None, truncation_side="left")

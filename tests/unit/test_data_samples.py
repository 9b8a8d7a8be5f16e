"""Samples for supervised training: ids and masks by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from conch.data.samples import collate, tokenize_samples
from conch.errors import DataError
from tests.runs import EOS, PAD, TOKENIZER


def tokenize(*samples: Any, max_tokens: int | None = None) -> list[tuple[list[int], list[int]]]:
    made = tokenize_samples(samples, TOKENIZER, max_tokens=max_tokens)
    return [(list(sample.token_ids), [int(learned) for learned in sample.loss_mask]) for sample in made]


def test_strings_are_learned_from_their_second_token_to_eos() -> None:
    assert tokenize("abc", "h") == [([0, 1, 2, EOS], [0, 1, 1, 1]), ([7, EOS], [0, 1])]


def test_of_pairs_the_completion_is_learned() -> None:
    pair = {"prompt": "abc", "completion": "de"}
    assert tokenize(pair) == [([0, 1, 2, 3, 4, EOS], [0, 0, 0, 1, 1, 1])]


def test_a_pair_without_prompt_is_learned_like_a_string() -> None:
    assert tokenize({"prompt": "", "completion": "abc"}) == tokenize("abc")


def test_special_tokens_of_the_tokenizer_are_not_added() -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    assert tokenize_samples(["ab"], tokenizer, max_tokens=None)[0].token_ids == (0, 1, EOS)


def test_collate_pads_right_and_masks_padding() -> None:
    samples = tokenize_samples(["abc", {"prompt": "d", "completion": "e"}], TOKENIZER, max_tokens=None)
    batch = collate(samples, PAD)
    assert batch.input_ids.tolist() == [[0, 1, 2, EOS], [3, 4, EOS, PAD]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.loss_mask.int().tolist() == [[0, 1, 1, 1], [0, 1, 1, 0]]


def test_an_eos_that_is_also_the_pad_stays_learned() -> None:
    batch = collate(tokenize_samples(["abc", "d"], TOKENIZER, max_tokens=None), pad_token_id=EOS)
    assert batch.loss_mask.int().tolist() == [[0, 1, 1, 1], [0, 1, 0, 0]]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "list of samples is empty"),
        (["a", ""], "sample 1 is empty"),
        ([{"prompt": "a", "completion": ""}], "completion of sample 0 is empty"),
        (["a", 3], "sample 1 is neither a string nor a dict"),
        ([{"prompt": "a"}], "sample 0 is neither"),
        ([{"prompt": None, "completion": "a"}], "sample 0 is neither"),
        ([{"prompt": "a", "completion": ["b"]}], "sample 0 is neither"),
        (["abc", "abcdefg"], "sample 1 has 8 tokens, its eos included; the model's window holds 7"),
    ],
)
def test_bad_samples_are_refused_by_number(samples: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenize_samples(samples, TOKENIZER, max_tokens=7)


def test_a_sample_may_fill_the_window() -> None:
    assert len(tokenize("abcdef", max_tokens=7)[0][0]) == 7

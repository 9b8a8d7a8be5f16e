"""Samples as turns: which tokens are actions, how batches lie, what truncation leaves, what is refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from conch.data.multi_turn import TurnSample, collate_turns, tokenize_turns
from conch.errors import DataError
from tests.runs import EOS, PAD, TOKENIZER


def tokenize(*samples: Any, max_tokens: int | None = None, **options: Any) -> list[TurnSample]:
    given = {"truncation_side": "left", **options}
    return tokenize_turns(samples, TOKENIZER, max_tokens=max_tokens, **given)


def actions(sample: TurnSample) -> list[int]:
    """The token ids that are actions."""
    return [token for token, is_action in zip(sample.token_ids, sample.is_action, strict=True) if is_action]


@pytest.mark.parametrize(
    ("sample", "token_ids", "chosen"),
    [
        ("abc", (0, 1, 2, EOS), [1, 2, EOS]),
        ("a", (0, EOS), [EOS]),
        (("ab", "cd"), (0, 1, 2, 3, EOS), [2, 3, EOS]),
        (["ab", ""], (0, 1, EOS), [EOS]),
        (["a", "bc", "def", "g"], (0, 1, 2, 3, 4, 5, 6, EOS), [1, 2, 6, EOS]),
        (["a", "b", "", "c"], (0, 1, 2, EOS), [1, 2, EOS]),
        (["a", "b<eos>"], (0, 1, EOS), [1, EOS]),
        (["a", "b<eos>", "c", "d"], (0, 1, EOS, 2, 3, EOS), [1, EOS, 3, EOS]),
    ],
)
def test_actions_are_the_tokens_of_outputs_and_the_end(
    sample: Any, token_ids: tuple[int, ...], chosen: list[int]
) -> None:
    (made,) = tokenize(sample)
    assert made.token_ids == token_ids
    assert actions(made) == chosen


def test_responses_of_a_batch_begin_in_one_column() -> None:
    batch = collate_turns(tokenize(("ab", "c"), "defg", ("a", "b", "cd", "e")), PAD)
    assert batch.input_ids.tolist() == [
        [0, 1, 2, EOS, PAD, PAD, PAD],
        [PAD, 3, 4, 5, 6, EOS, PAD],
        [PAD, 0, 1, 2, 3, 4, EOS],
    ]
    assert batch.attention_mask.int().tolist() == [
        [1, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 1, 1],
    ]
    assert batch.action_mask.int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 1, 1]]
    assert batch.num_response == 5
    assert torch.equal(batch.response_ids, batch.input_ids[:, 2:])


def test_left_truncation_keeps_the_end_and_needs_a_state_before_each_action() -> None:
    kept, cut, all_prompt_gone = tokenize("ab", ("abc", "def"), ("a", "bcdefg"), max_tokens=5)
    assert kept.token_ids == (0, 1, EOS)
    assert cut.token_ids == (2, 3, 4, 5, EOS) and actions(cut) == [3, 4, 5, EOS]
    # d was an action; the state it was chosen in is gone, so it has become the prompt.
    assert all_prompt_gone.token_ids == (3, 4, 5, 6, EOS) and actions(all_prompt_gone) == [4, 5, 6, EOS]


def test_right_truncation_keeps_the_beginning() -> None:
    (cut,) = tokenize(("abc", "def"), max_tokens=5, truncation_side="right")
    assert cut.token_ids == (0, 1, 2, 3, 4) and actions(cut) == [3, 4]


def test_truncation_is_counted_in_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="conch"):
        tokenize("ab", "abcde", "abcdefg", max_tokens=4)
    (record,) = caplog.records
    assert "2 of 3 samples are longer than the 4 tokens" in record.getMessage()
    assert "the longest has 8" in record.getMessage() and "on the left" in record.getMessage()


def test_samples_that_fit_are_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    tokenize("abc", max_tokens=4)
    assert not caplog.records


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "list of samples is empty"),
        (["a", 5], "sample 1 is neither a string nor a list of strings"),
        ([{"prompt": "a", "output": "b"}], r"sample 0 is neither .*\(got dict\)"),
        ([["a", "b", "c"]], "sample 0 has 3 turns: give prompts and outputs by turns"),
        ([["a", "b"], []], "sample 1 has 0 turns"),
        ([["a", None]], "sample 0 is neither"),
        (["a", ""], "sample 1 is empty once tokenised"),
        ([["", "b"]], "first prompt of sample 0 is empty"),
    ],
)
def test_samples_of_another_form_are_refused_by_number(samples: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenize(*samples)


def test_one_string_instead_of_samples_is_refused() -> None:
    with pytest.raises(DataError, match="the samples are one string"):
        tokenize_turns("abc", TOKENIZER, max_tokens=None, truncation_side="left")


def test_sample_whose_actions_are_all_cut_off_is_refused_with_a_remedy() -> None:
    with pytest.raises(
        DataError, match=r"sample 1 has no action left: the first 3 of its 6.*truncation_side"
    ):
        tokenize("ab", ("abcd", "e"), max_tokens=3, truncation_side="right")


@pytest.mark.parametrize(
    ("sample", "message"),
    [("abc", "sample 0 is one string; an encoder-decoder"), (["a", "b", "c", "d"], "sample 0 has 4 turns")],
)
def test_pairs_only_takes_pairs_only(sample: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenize(sample, pairs_only=True)
    assert actions(tokenize(("a", "b"), pairs_only=True)[0]) == [1, EOS]

"""Samples as turns: which tokens are actions, how batches lie, what truncation leaves, what is refused."""

from __future__ import annotations

import logging
from typing import Any, Literal

import pytest
import torch

from conch.data.files import Rows
from conch.data.multi_turn import cut_turns, tokenize_turns
from conch.data.samples import TokenizedSample, collate
from conch.data.text import TextCodec
from conch.errors import DataError
from tests.runs import EOS, PAD, TOKENIZER

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def tokenize(
    *samples: Any,
    max_tokens: int | None = None,
    truncation_side: Literal["left", "right"] = "left",
    encoder_decoder: bool = False,
) -> list[TokenizedSample]:
    made, _ = tokenize_turns(samples, TextCodec(TOKENIZER, encoder_decoder=encoder_decoder))
    return made if max_tokens is None else cut_turns(made, max_tokens, truncation_side)[0]


def actions(sample: TokenizedSample) -> list[int]:
    """The token ids that are actions."""
    return [token for token, is_action in zip(sample.token_ids, sample.loss_mask, strict=True) if is_action]


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
    batch = collate(tokenize(("ab", "c"), "defg", ("a", "b", "cd", "e")), PAD)
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
    assert batch.loss_mask.int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 1, 1]]
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
        (["", ""], "none of the 2 samples can be used: sample 0 is empty once tokenised; sample 1 is"),
        ([["", "b"]], "the first prompt of sample 0 is empty"),
    ],
)
def test_samples_of_another_form_are_refused_by_number(samples: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenize(*samples)


def test_one_string_instead_of_samples_is_refused() -> None:
    with pytest.raises(DataError, match="the samples are one string"):
        tokenize_turns("abc", TextCodec(TOKENIZER))


def test_a_sample_whose_actions_are_all_cut_off_is_left_out_with_a_remedy(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made, _ = tokenize_turns(["ab", ("abcd", "e"), "cd"], TextCodec(TOKENIZER))
    with caplog.at_level(logging.WARNING, logger="conch"):
        left, indices = cut_turns(made, 3, "right")
    assert (indices, [sample.token_ids for sample in left]) == ([0, 2], [(0, 1, EOS), (2, 3, EOS)])
    assert "1 of 3 samples left out: sample 1 has no action left: the first 3 of its 6" in caplog.text
    with pytest.raises(
        DataError, match=r"none of the 1 samples can be used: .* `tokenizer\.truncation_side=left`"
    ):
        cut_turns(made[1:2], 3, "right")


def test_samples_that_a_tokenizer_refuses_are_left_out_with_their_numbers() -> None:
    made, indices = tokenize_turns(["ab", "", ("", "b"), "c"], TextCodec(TOKENIZER))
    assert (indices, [sample.token_ids for sample in made]) == ([0, 3], [(0, 1, EOS), (2, EOS)])


@pytest.mark.parametrize(
    ("sample", "message"),
    [("abc", "sample 0 is one string; an encoder-decoder"), (["a", "b", "c", "d"], "sample 0 has 4 turns")],
)
def test_pairs_only_takes_pairs_only(sample: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenize(sample, encoder_decoder=True)
    assert actions(tokenize(("a", "b"), encoder_decoder=True)[0]) == [1, EOS]


@pytest.mark.parametrize(
    "sample", ["abc", ["a", "b", "c", "d"], ["a"], 3, {"messages": MESSAGES, "tools": 3}]
)
def test_a_bad_sample_of_a_file_is_named_by_its_line(sample: Any) -> None:
    rows = Rows([sample], ["rows.jsonl line 7"])
    with pytest.raises(DataError, match=r"^rows\.jsonl line 7 "):
        tokenize_turns(rows, TextCodec(TOKENIZER, encoder_decoder=True))

"""What a list of prompts may hold, and what is said about one that will not do."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import pytest

from conch.config import DataConfig, TokenizerConfig
from conch.data.files import Rows
from conch.data.prompts import make_prompts, usable_prompts
from conch.data.text import TextCodec
from conch.errors import DataError
from conch.types import Prompt
from tests.tiny import char_tokenizer

TOKENIZER = char_tokenizer("abcdef")


def make(prompts: Any, max_tokens: int | None = 4, **config: Any) -> list[Prompt]:
    return make_prompts(prompts, TextCodec(TOKENIZER), TokenizerConfig(**config), max_tokens=max_tokens)


def test_strings_become_token_ids() -> None:
    assert make(["ab", "c"]) == [Prompt("ab", (0, 1)), Prompt("c", (2,))]


def test_other_keys_of_a_dict_become_metadata() -> None:
    [prompt] = make([{"prompt": "ab", "answer": 4, "source": "web"}])

    assert (prompt.text, prompt.token_ids) == ("ab", (0, 1))
    assert prompt.metadata == {"answer": 4, "source": "web"}


@pytest.mark.parametrize(
    ("prompts", "wanted"),
    [
        ([], "the list of prompts is empty: give at least one prompt"),
        ("abc", "the prompts are one string: give a list of prompts"),
        (["", ""], "none of the 2 prompts can be used: prompt 0 is empty once tokenised; prompt 1 is"),
        (["a", 7], r'prompt 1 is neither a string nor a dict with a "prompt" string or dialogue \(got int\)'),
        ([{"text": "a"}], r"prompt 0 is neither .* \(got NoneType\)"),
        ([{"prompt": ["a"]}], r"prompt 0 is neither .* \(got list\)"),
        (["abcde", "a", "abcdef"], r"2 of 3 prompts are longer than the 4 tokens .* \(prompt 2 has 6\)"),
    ],
)
def test_bad_prompts_are_refused_in_one_sentence(prompts: Any, wanted: str) -> None:
    unchecked = inspect.unwrap(make_prompts)  # without the check of types that tests add
    with pytest.raises(DataError, match=wanted) as caught:
        unchecked(prompts, TextCodec(TOKENIZER), TokenizerConfig(), max_tokens=4)
    assert "\n" not in str(caught.value)


def test_the_longest_prompt_is_named_by_its_place_whatever_was_left_out_before_it() -> None:
    rows = ["", "a", "abcdef"]
    with pytest.raises(DataError, match=r"1 of 2 prompts are longer .* \(prompt 2 has 6\)"):
        make(rows)
    with pytest.raises(DataError, match=r"\(data\.jsonl line 4 has 6\)"):
        make(Rows(rows, [f"data.jsonl line {number}" for number in (1, 2, 4)]))


def test_a_prompt_that_is_too_long_offers_what_leaves_it_out() -> None:
    rows = ["a", "abcdef", "ab"]
    with pytest.raises(DataError, match=r"leave training prompts out with `data\.max_tokens=4`"):
        make(rows)
    usable = usable_prompts(rows, TextCodec(TOKENIZER), lengths=DataConfig(max_tokens=4))
    assert [prompt.text for prompt in usable] == ["a", "ab"] and usable.places == ["prompt 0", "prompt 2"]


def test_a_bad_prompt_of_a_file_is_named_by_its_line() -> None:
    with pytest.raises(DataError, match=r"^rows\.jsonl line 7 is neither"):
        make(Rows([{"prompt": ["a"]}], ["rows.jsonl line 7"]))


def test_longest_prompt_that_fits_is_taken() -> None:
    assert len(make(["abcd"])[0].token_ids) == 4


def test_prompts_of_any_length_fit_a_model_without_a_window() -> None:
    assert len(make(["abcdef" * 100], max_tokens=None)[0].token_ids) == 600


@pytest.mark.parametrize(
    ("side", "text", "ids"), [("left", "cdef", (2, 3, 4, 5)), ("right", "abcd", (0, 1, 2, 3))]
)
def test_long_prompts_are_cut_where_the_config_allows_it(
    side: str,
    text: str,
    ids: tuple[int, ...],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("conch"), "propagate", True)
    rows = ["ab", {"prompt": "abcdef", "answer": 4}]
    short, long = make(rows, truncate_prompts=True, truncation_side=side)

    assert short == Prompt("ab", (0, 1))
    assert long == Prompt(text, ids, {"answer": 4}), "text, ids and metadata stay together"
    assert f"1 of 2 prompts cut to 4 tokens on the {side}" in caplog.text


def test_prompts_are_cut_to_a_length_below_what_the_window_leaves() -> None:
    (prompt,) = make(["abcdef"], truncate_prompts=True, max_prompt_tokens=2)
    assert prompt.text == "ef"
    with pytest.raises(DataError, match=r"longer than the 2 tokens .* or `tokenizer\.max_prompt_tokens`"):
        make(["abcdef"], max_tokens=None, max_prompt_tokens=2)

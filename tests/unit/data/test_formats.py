"""Rows of public datasets: what each trainer makes of every form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conch.config import DataConfig
from conch.data.files import read_rows
from conch.data.formats import judgement_form, listed, prompt_form, rewarded_form, sample_form
from conch.data.preferences import judgement
from conch.errors import DataError

ASKED = [{"role": "user", "content": "sky?"}]
BLUE = [{"role": "assistant", "content": "blue"}]
GREEN = [{"role": "assistant", "content": "green"}]


@pytest.mark.parametrize(
    ("row", "sample"),
    [
        ("abc", "abc"),
        ({"text": "abc", "source": "x"}, "abc"),
        ({"messages": [*ASKED, *BLUE]}, {"messages": [*ASKED, *BLUE]}),
        ({"prompt": "a", "completion": "b", "id": 3}, {"prompt": "a", "completion": "b"}),
        ({"prompt": ASKED, "completion": BLUE}, {"prompt": ASKED, "completion": BLUE}),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "completion": "b"}),
        ({"chosen": "ab", "rejected": "ac"}, "ab"),
        ({"chosen": [*ASKED, *BLUE], "rejected": [*ASKED, *GREEN]}, {"messages": [*ASKED, *BLUE]}),
    ],
)
def test_sample_of_every_form(row: Any, sample: Any) -> None:
    made = sample_form(row)
    assert made == sample


@pytest.mark.parametrize(
    "row",
    [3, None, [], {"prompt": "a"}, {"completion": "b"}, {"prompt": ASKED, "completion": 3}, {"text": 3}],
)
def test_what_is_no_sample_is_refused(row: Any) -> None:
    with pytest.raises(DataError, match="is neither a string"):
        sample_form(row)


def test_a_dialogue_with_a_string_is_refused_with_the_remedy() -> None:
    with pytest.raises(DataError, match=r'needs a "prompt" and a "completion" .*apply_chat_template=true'):
        sample_form({"prompt": ASKED, "completion": "b"})


def test_prompts_keep_their_other_keys() -> None:
    assert prompt_form("a") == "a"
    assert prompt_form({"prompt": ASKED, "answer": 3}) == {"prompt": ASKED, "answer": 3}
    for row in ({"prompt": 3}, {"text": "a"}, 3, [*ASKED]):
        with pytest.raises(DataError, match="is neither a string nor a dict"):
            prompt_form(row)


@pytest.mark.parametrize(
    ("row", "made"),
    [
        ({"chosen": "ab", "rejected": "ac", "margin": 1}, {"chosen": "ab", "rejected": "ac", "margin": 1}),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"chosen": "ab", "rejected": "ac"}),
        (
            {"prompt": ASKED, "chosen": BLUE, "rejected": GREEN},
            {"chosen": [*ASKED, *BLUE], "rejected": [*ASKED, *GREEN]},
        ),
        ({"prompt": "a", "completion": "b", "label": True}, {"text": "ab", "score": 1.0}),
        ({"prompt": "a", "completion": "b", "label": False}, {"text": "ab", "score": 0.0}),
        ({"prompt": "a", "text": "b", "score": 0.5}, {"text": "ab", "score": 0.5}),
    ],
)
def test_judgement_of_every_form(row: Any, made: Any) -> None:
    assert judgement_form(row) == made
    assert judgement(row) == made


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": ASKED, "chosen": "b", "rejected": "c"}, 'needs a "prompt" and a "chosen" that are both'),
        (
            {"prompt": "a", "completion": "b", "label": "good"},
            "has the label 'good': it must be true or false",
        ),
        ({"chosen": "ab"}, 'has no "rejected" text beside "chosen"'),
        ({"chosen": "ab", "rejected": "ac", "margin": -1}, "its margin -1 is not a finite number"),
        ({"text": "ab", "score": float("nan")}, "its score nan is not a finite number"),
    ],
)
def test_what_is_no_judgement_is_refused_in_words_that_follow_its_name(row: Any, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        judgement(row)
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize(
    ("row", "made"),
    [
        ({"sample": ["a", "b"], "reward": 0.3}, [(["a", "b"], 0.3)]),
        ({"prompt": "a", "completion": "b", "label": True}, [(["a", "b"], 1.0)]),
        ({"prompt": "a", "completion": "b", "label": 0}, [(["a", "b"], -1.0)]),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, [(["a", "b"], 1.0), (["a", "c"], -1.0)]),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is black."},
            [(["The sky is", " blue."], 1.0), (["The sky is", " black."], -1.0)],
        ),
        (
            {"chosen": [*ASKED, *BLUE], "rejected": [*ASKED, *GREEN]},
            [({"prompt": ASKED, "completion": BLUE}, 1.0), ({"prompt": ASKED, "completion": GREEN}, -1.0)],
        ),
    ],
)
def test_rewarded_samples_of_every_form(row: Any, made: Any) -> None:
    assert rewarded_form(row) == made


def test_an_answer_is_never_empty_where_one_text_begins_with_the_other() -> None:
    (chosen, _), (rejected, _) = rewarded_form({"chosen": "I am", "rejected": "I am not"})
    assert (chosen, rejected) == (["I", " am"], ["I", " am not"])


@pytest.mark.parametrize("row", ["a", {"chosen": "ab", "rejected": 3}, {"chosen": "a", "rejected": "b"}, {}])
def test_what_has_no_reward_is_refused(row: Any) -> None:
    with pytest.raises(DataError):
        rewarded_form(row)


def test_rows_of_datasets_are_listed_and_its_dicts_refused() -> None:
    from datasets import Dataset, DatasetDict

    split = Dataset.from_list([{"text": "a"}, {"text": "b"}])
    assert listed(split, "samples") == [{"text": "a"}, {"text": "b"}]
    assert listed(split["text"], "samples") == ["a", "b"]
    assert listed(split.to_iterable_dataset(), "samples") == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(DataError, match="the samples are a dict of train: give one of its values"):
        listed(DatasetDict({"train": split}), "samples")
    with pytest.raises(DataError, match="the samples are one string"):
        listed("abc", "samples")


@pytest.mark.parametrize(
    ("form", "row", "null"),
    [
        (prompt_form, {"prompt": None, "n": 1}, "prompt"),
        (sample_form, {"prompt": None, "completion": "b"}, "prompt"),
        (sample_form, {"prompt": "a", "completion": None}, "completion"),
        (sample_form, {"messages": None}, "messages"),
        (judgement, {"prompt": "a", "chosen": None, "rejected": "b"}, "chosen"),
        (judgement, {"text": "a", "score": None}, "score"),
        (rewarded_form, {"prompt": "a", "completion": "b", "label": None}, "label"),
        (rewarded_form, {"sample": ["a", "b"], "reward": None}, "reward"),
    ],
)
def test_a_value_that_is_null_is_no_missing_column(form: Any, row: Any, null: str) -> None:
    with pytest.raises(DataError, match=f'^has null for "{null}": give a value') as error:
        form(row)
    assert "data.columns" not in str(error.value)


def test_a_null_under_a_named_column_is_told_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": null, "answer": "b"}\n', encoding="utf-8")
    columns = {"prompt": "question", "completion": "answer"}
    for spoken in (None, True):
        config = DataConfig(columns=columns, apply_chat_template=spoken)
        with pytest.raises(DataError, match='line 1 has null for "prompt"'):
            read_rows(file, config, form=sample_form)


def test_null_columns_of_another_form_change_nothing() -> None:
    row = {"prompt": None, "completion": None, "messages": [*ASKED, *BLUE]}
    assert sample_form(row) == {"messages": [*ASKED, *BLUE]}
    assert judgement({"text": "a", "score": 1.0, "chosen": None, "rejected": None})["score"] == 1.0

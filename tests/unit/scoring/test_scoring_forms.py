"""From rows to samples: which columns are taken, and what of them a reward is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from conch.errors import ConfigError, DataError
from conch.rewards import RewardSource
from conch.rewards.function import FunctionReward
from conch.rewards.score import rollout_of
from conch.scoring.forms import Request, form_of
from conch.scoring.reading import InputRow
from conch.types import RewardResult, Rollout


class Reader(RewardSource):
    """A reward that is never asked."""

    def __init__(self, reads: str = "texts") -> None:
        self.name, self.reads = "reader", reads

    def check(self) -> None:
        return

    def submit(self, rollouts: Sequence[Rollout]) -> Future[list[RewardResult]]:
        raise AssertionError


def asked(*values: Any, source: RewardSource | None = None, **settings: Any) -> list[Request]:
    rows = [InputRow(f"line {number}", value) for number, value in enumerate(values, start=1)]
    source = source or Reader()
    form = form_of(rows, source, **{"columns": {}, **settings})
    return [form.request(row, [source]) for row in rows]


def texts(request: Request) -> list[str]:
    assert not request.problem
    return [sample.sample for sample in request.samples]


def said(request: Request) -> list[list[str]]:
    """Contents of the messages of each sample."""
    return [
        [each["content"] for each in sample.dialogue.messages]
        for sample in request.samples
        if sample.dialogue
    ]


@pytest.mark.parametrize(
    ("row", "columns", "text"),
    [
        ("a", {}, "a"),
        ({"text": "a", "prompt": "no"}, {}, "a"),
        ({"prompt": "a", "completion": "b"}, {}, "ab"),
        ({"question": "a", "response": "b"}, {}, "ab"),
        ({"review": "a", "stars": 3}, {}, "a"),
        ({"q": "a", "r": {"best": "b"}, "text": "no"}, {"prompt": "q", "completion": "r.best"}, "ab"),
        ({"question": "a", "answer": "b\n#### 1"}, {}, "ab\n#### 1"),
        ({"question": "a", "answer": "b\n#### 1", "mine": "c"}, {"completion": "mine"}, "ac"),
        ({"instruction": "a", "input": "", "output": "b"}, {}, "ab"),
    ],
)
def test_a_sample_is_found_under_usual_names_and_those_that_are_given(
    row: Any, columns: dict[str, str], text: str
) -> None:
    (request,) = asked(row, columns=columns)
    assert texts(request) == [text] and request.num_chosen is None


def test_an_answer_in_parts_is_scored_by_its_text() -> None:
    user, parts = {"role": "user", "content": "q"}, [{"type": "text", "text": part} for part in ("a", " b")]
    answer = {"role": "assistant", "content": parts}
    for row in ([user, answer], {"prompt": [user], "completion": [answer]}):
        (request,) = asked(row, source=Reader("both"))
        assert [sample.completion.text for sample in request.samples] == ["a b"]
    pictured = {**answer, "content": [*parts, {"type": "image"}]}
    for row in ([user, pictured], {"prompt": [user], "completion": [pictured]}):
        with pytest.raises(DataError, match="is a dialogue whose last message has a part of type image"):
            rollout_of(row)


@pytest.mark.parametrize("row", ["a b", {"text": "a b"}])
def test_a_whole_text_is_what_a_reward_of_completions_looks_at(row: Any) -> None:
    (sample,) = asked(row)[0].samples
    assert (sample.prompt.text, sample.completion.text) == ("", "a b")


def test_an_answer_with_more_than_a_text_is_looked_at_by_its_text() -> None:
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "reasoning_content": "easy"},
    ]
    (sample,) = asked({"messages": messages}, source=Reader("dialogues"))[0].samples
    assert sample.completion.text == "a"
    assert sample.dialogue is not None and list(sample.dialogue.messages) == messages


def test_names_that_were_taken_are_kept_to_be_told() -> None:
    rows = [InputRow("line 1", {"question": "a", "response": "b"})]
    assert form_of(rows, Reader(), columns={}).taken == {"prompt": "question", "completion": "response"}
    rows = [InputRow("line 1", {"question": "a", "chosen": "b", "rejected": "c"})]
    assert form_of(rows, Reader(), columns={}).taken == {"prompt": "question"}


HH = "\n\nHuman: hi\n\nAssistant: "


@pytest.mark.parametrize(
    ("row", "samples"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["ab", "ac"]),
        ({"chosen": HH + "b", "rejected": HH + "c"}, [HH + "b", HH + "c"]),
        ({"prompt": "a b", "chosen": "a b c", "rejected": "a b d"}, ["a b c", "a b d"]),
        ({"prompt": "a", "chosen": ["b", "bb"], "rejected": ["c", "d"]}, ["ab", "abb", "ac", "ad"]),
        ({"question": "a", "chosen": "b", "rejected": "c"}, ["ab", "ac"]),
        ({"chosen": "good", "rejected": "bad"}, ["good", "bad"]),
    ],
)  # fmt: skip
def test_pairs_become_their_texts(row: Any, samples: list[str]) -> None:
    (request,) = asked(row)
    assert texts(request) == samples
    chosen = row["chosen"]
    assert request.num_chosen == (len(chosen) if isinstance(chosen, list) else 1)


def test_a_prompt_that_both_texts_of_a_pair_share_is_a_prompt() -> None:
    (request,) = asked({"chosen": HH + "b", "rejected": HH + "c"})
    assert [sample.prompt.text for sample in request.samples] == [HH.rstrip(" ")] * 2
    assert [sample.completion.text for sample in request.samples] == [" b", " c"]


def test_a_reward_that_reads_dialogues_gets_messages() -> None:
    chat = Reader("dialogues")
    (pair,) = asked({"chosen": HH + "b", "rejected": HH + "c"}, source=chat)
    assert said(pair) == [["hi", "b"], ["hi", "c"]]
    (bench,) = asked({"prompt": "a", "chosen": "b", "rejected": "c", "subset": "s", "id": 3}, source=chat)
    assert said(bench) == [["a", "b"], ["a", "c"]] and (bench.subset, bench.id) == ("s", 3)
    (second,) = asked({"prompt": "a", "chosen": ["b"], "rejected": ["c", "d"]}, source=chat)
    assert said(second) == [["a", "b"], ["a", "c"], ["a", "d"]] and second.in_lists == (True, True)
    user, assistant = ({"role": role, "content": role} for role in ("user", "assistant"))
    (whole,) = asked({"messages": [user, assistant]}, source=chat)
    assert said(whole) == [["user", "assistant"]] and whole.samples[0].completion.text == "assistant"
    trl = {"prompt": [user], "chosen": [assistant], "rejected": [{**assistant, "content": "worse"}]}
    (apart,) = asked(trl, source=chat)
    assert said(apart) == [["user", "assistant"], ["user", "worse"]]


def test_a_dialogue_for_a_reward_that_reads_texts_is_that_rows_problem() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    good, bad = asked({"text": "a"}, {"messages": messages})
    assert not good.problem and "is a dialogue, and the model reads texts" in bad.problem


def test_a_row_of_another_kind_in_the_midst_is_that_rows_problem() -> None:
    first, second, third = asked(
        {"prompt": "a", "chosen": "b", "rejected": "c"}, {"text": "a"}, {"chosen": "a", "rejected": None}
    )
    assert not first.problem and 'has no "chosen" and "rejected"' in second.problem
    assert "nothing is preferred" in third.problem


def test_what_none_of_the_first_rows_has_is_an_error() -> None:
    with pytest.raises(DataError, match=r"line 1 has the keys odd"):
        asked({"odd": 1}, {"odd": 2})
    with pytest.raises(ConfigError, match=r"--prompt qq: line 1 has no such column \(columns: q, a\)"):
        asked({"q": "a", "a": "b"}, columns={"prompt": "qq"})
    with pytest.raises(ConfigError, match="--subset kind"):
        asked({"chosen": "a", "rejected": "b"}, subset="kind")


def test_cells_of_a_table_may_hold_lists() -> None:
    cell = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "[1]"}]'
    (request,) = asked({"messages": cell, "text": None}, source=Reader("dialogues"), from_text=True)
    assert said(request) == [["a", "[1]"]]
    (pair,) = asked({"prompt": "p", "chosen": "a", "rejected": '["b", "c"]'}, from_text=True)
    assert texts(pair) == ["pa", "pb", "pc"]


def test_a_function_gets_the_columns_that_it_takes() -> None:
    def takes_answer(samples: Any, prompts: Any, outputs: Any, answer: Any) -> list[float]:
        return [0.0] * len(samples)

    with FunctionReward(takes_answer) as source:
        row = {"question": "a", "answer": "b\n#### 1", "samples": 3, "other": 4}
        (request,) = asked(row, source=source)
        assert request.samples[0].prompt.metadata == {"answer": "b\n#### 1"}
    (request,) = asked(row)
    assert request.samples[0].prompt.metadata["other"] == 4


def test_rows_that_a_verifier_cannot_judge_are_refused_before_it_is_asked() -> None:
    class Strict(Reader):
        def check_row(self, row: Any) -> None:
            if "answer" not in row:
                raise DataError("has no `answer`")

    with pytest.raises(DataError, match=r"line 1 has no `answer` \(reader scores by it\)"):
        asked({"text": "a"}, source=Strict())
    assert not asked({"text": "a", "key": "7"}, source=Strict(), columns={"answer": "key"})[0].problem

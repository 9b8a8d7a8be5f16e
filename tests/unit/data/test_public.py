"""Rows with the keys that public datasets have, in words of our own: what each trainer makes of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import Dataset

from conch.config import DataConfig, load
from conch.data.files import renamed
from conch.data.formats import (
    judgement_form,
    listed,
    prompt_form,
    prompt_metadata,
    rewarded_form,
    sample_form,
)
from conch.data.preferences import judgement
from conch.data.public import hh_messages, public_form
from conch.errors import DataError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


HI, HELLO, GO = user("hi there"), assistant("hello"), assistant("go away")
PARTS: dict[str, Any] = {"role": "user", "content": [{"type": "text", "text": t} for t in ("hi ", "there")]}
QUOTED: dict[str, Any] = {"role": "user", "content": [{"type": "text", "text": "it's\nso"}]}
RATED = {"helpfulness": 4, "correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 2}

ULTRA_BINARIZED = {
    "prompt": "hi there",
    "prompt_id": "0a",
    "chosen": [HI, HELLO],
    "rejected": [HI, GO],
    "messages": [HI, HELLO],
    "score_chosen": 8.0,
    "score_rejected": 2.0,
}
ULTRA = {
    "source": "sharegpt",
    "instruction": "hi there",
    "models": ["a", "b", "c"],
    "completions": [
        {"model": "a", "response": "hm", "overall_score": 10.0, "fine-grained_score": 2.5},
        {"model": "b", "response": "hello", "overall_score": 8.0, "fine-grained_score": 4.75},
        {"model": "c", "response": "go away", "overall_score": 1.0, "fine-grained_score": 1.0},
    ],
    "correct_answers": ["None"],
    "incorrect_answers": ["None"],
}
TULU_PREFERENCE = {
    "id": "x",
    "source": "y",
    "prompt": "hi there",
    "chosen": [HI, HELLO, user("and you?"), assistant("well")],
    "rejected": [HI, HELLO, user("and you?"), assistant("no")],
}
HELP_STEER = {"prompt": "hi there", "response": "hello", **RATED}
HELP_STEER_2 = {
    "split": "train",
    "prompt": "hi there",
    "response_1": "go away",
    "response_2": "hello",
    "preference_strength": 2,
    "preference_statement": "the second is polite",
}
HELP_STEER_3 = {
    "domain": "general",
    "language": "english",
    "context": [HI],
    "response1": "hello",
    "response2": "go away",
    "overall_preference": -3,
    "individual_preference": [{"score": -3, "reasoning": "polite", "feedback1": "", "feedback2": ""}],
}
HH = {
    "chosen": "\n\nHuman: hi there\n\nAssistant: I say hello",
    "rejected": "\n\nHuman: hi there\n\nAssistant: I say go away",
}
SHARE_GPT = {
    "id": "1",
    "conversations": [{"from": "human", "value": "hi there"}, {"from": "gpt", "value": "hello"}],
}
ALPACA = {"instruction": "greet", "input": "a friend", "output": "hello"}
GSM8K = {"question": "2+2?", "answer": "two and two\n#### 4"}
OASST_TREE = {
    "message_tree_id": "t",
    "tree_state": "ready_for_export",
    "prompt": {
        "message_id": "t",
        "text": "hi there",
        "role": "prompter",
        "lang": "en",
        "replies": [
            {"text": "go away", "role": "assistant", "rank": 1, "deleted": False, "replies": []},
            {"text": "never", "role": "assistant", "rank": 2, "deleted": True, "replies": []},
            {"text": "hm", "role": "assistant", "rank": None, "deleted": False, "replies": []},
            {
                "text": "hello",
                "role": "assistant",
                "rank": 0,
                "deleted": False,
                "replies": [
                    {"text": "and?", "role": "prompter", "rank": None, "deleted": False, "replies": []}
                ],
            },
        ],
    },
}


@pytest.mark.parametrize(
    ("row", "sample"),
    [
        (ULTRA_BINARIZED, {"messages": [HI, HELLO]}),
        ({**ULTRA_BINARIZED, "messages": None}, {"prompt": [HI], "completion": [HELLO]}),
        (ULTRA, {"prompt": [HI], "completion": [HELLO]}),
        (
            TULU_PREFERENCE,
            {"prompt": [HI, HELLO, user("and you?")], "completion": [assistant("well")]},
        ),
        (HELP_STEER, {"prompt": [HI], "completion": [HELLO]}),
        (HELP_STEER_2, {"prompt": [HI], "completion": [HELLO]}),
        (HELP_STEER_3, {"prompt": [HI], "completion": [HELLO]}),
        (HH, HH["chosen"]),
        (SHARE_GPT, {"messages": [HI, HELLO]}),
        ({"conversations": [HI, HELLO]}, {"messages": [HI, HELLO]}),
        (ALPACA, {"prompt": [user("greet\n\na friend")], "completion": [HELLO]}),
        ({**ALPACA, "input": ""}, {"prompt": [user("greet")], "completion": [HELLO]}),
        ({**ALPACA, "text": "Greet a friend. hello"}, "Greet a friend. hello"),
        (
            {"instruction": "greet", "context": "", "response": "hello", "category": "open_qa"},
            {"prompt": [user("greet")], "completion": [HELLO]},
        ),
        (OASST_TREE, {"messages": [HI, HELLO]}),
        ({"id": "1", "messages": [HI, HELLO], "source": "z"}, {"messages": [HI, HELLO]}),
    ],
)
def test_what_is_learned_of_rows_of_public_datasets(row: Any, sample: Any) -> None:
    assert sample_form(row) == sample
    assert sample_form(sample_form(row)) == sample


@pytest.mark.parametrize(
    ("row", "prompt", "others"),
    [
        (ULTRA_BINARIZED, [HI], {"score_chosen"}),
        (ULTRA, [HI], {"correct_answers"}),
        (TULU_PREFERENCE, [HI, HELLO, user("and you?")], {"source"}),
        (HELP_STEER, [HI], {"scores"}),
        (HELP_STEER_3, [HI], {"domain"}),
        (HH, "\n\nHuman: hi there\n\nAssistant:", {"chosen"}),
        (SHARE_GPT, [HI], {"id"}),
        (ALPACA, [user("greet\n\na friend")], {"completion"}),
        (GSM8K, [user("2+2?")], {"answer", "completion"}),
        (OASST_TREE, [HI], {"tree_state"}),
        # the rows of Tulu 3's reinforcement learning
        ({"messages": [HI], "ground_truth": "4", "dataset": "gsm8k"}, [HI], {"ground_truth", "dataset"}),
        ({"messages": [HI, HELLO], "id": "1"}, [HI], {"id", "completion"}),
        # as in UltraChat and No Robots: the prompt in words, and the whole dialogue
        (
            {"prompt": "hi there", "messages": [{"role": "system", "content": "s"}, HI, HELLO, user("so?")]},
            [{"role": "system", "content": "s"}, HI],
            set(),
        ),
        ({"prompt": "hi there", "prompt_id": "0a", "messages": [HI, HELLO]}, [HI], {"prompt_id"}),
        ({"prompt": "hi there \n", "messages": [HI, HELLO]}, [HI], set()),
        ({"prompt": "hi there", "messages": [user(" hi there"), HELLO]}, [user(" hi there")], set()),
        ({"prompt": "hi there", "messages": [PARTS, HELLO]}, [PARTS], set()),
        ({"prompt": "it's\nso", "chosen": [QUOTED, HELLO], "rejected": [QUOTED, GO]}, [QUOTED], {"chosen"}),
        (
            {"key": 3, "prompt": "say it", "instruction_id_list": ["a:b"], "kwargs": [{}]},
            "say it",
            {"key", "instruction_id_list", "kwargs"},
        ),
    ],
)
def test_prompts_of_rows_of_public_datasets_keep_the_other_keys(row: Any, prompt: Any, others: Any) -> None:
    made = prompt_form(row)
    assert made["prompt"] == prompt
    assert others <= made.keys()
    assert "messages" not in made  # which is a reward function's own argument
    assert prompt_form(made) == made


@pytest.mark.parametrize(
    ("row", "better", "worse"),
    [
        (ULTRA_BINARIZED, [HI, HELLO], [HI, GO]),
        (ULTRA, [HI, HELLO], [HI, GO]),
        (TULU_PREFERENCE, TULU_PREFERENCE["chosen"], TULU_PREFERENCE["rejected"]),
        (HELP_STEER_2, [HI, HELLO], [HI, GO]),
        (HELP_STEER_3, [HI, HELLO], [HI, GO]),
        (HH, HH["chosen"], HH["rejected"]),
        (OASST_TREE, [HI, HELLO], [HI, GO]),
        (
            {
                "conversations": [{"from": "human", "value": "hi there"}],
                "chosen": {"from": "gpt", "value": "hello"},
                "rejected": {"from": "gpt", "value": "go away"},
            },
            [HI, HELLO],
            [HI, GO],
        ),
    ],
)
def test_preferences_of_public_datasets_hold_each_prompt_once(row: Any, better: Any, worse: Any) -> None:
    made = judgement(row)
    assert (made["chosen"], made["rejected"]) == (better, worse)
    again = judgement(made)
    assert (again["chosen"], again["rejected"]) == (better, worse)


def test_keys_of_prompts_that_reach_rewards_are_those_of_their_forms() -> None:
    row = {"messages": [HI], "ground_truth": "4", "tools": [{}], "chat_template_kwargs": {"a": 1}}
    assert prompt_metadata(row) == {"ground_truth": "4"}
    assert prompt_metadata({"prompt": "a", "tools": [{}], "n": None}) == {"tools": [{}], "n": None}
    assert prompt_metadata("a") == {}
    assert prompt_metadata({"question": "a"}) is None


def test_scores_of_help_steer_are_five_objectives() -> None:
    made = judgement(HELP_STEER)
    assert (made["text"], made["scores"]) == ([HI, HELLO], RATED)


def test_outputs_of_hh_begin_where_the_assistant_does() -> None:
    prompt = "\n\nHuman: hi there\n\nAssistant:"
    assert rewarded_form(HH) == [([prompt, " I say hello"], 1.0), ([prompt, " I say go away"], -1.0)]


@pytest.mark.parametrize(
    "row",
    [
        {**HELP_STEER_2, "preference_strength": 0},
        {**HELP_STEER_3, "overall_preference": 0},
        {**ULTRA, "completions": ULTRA["completions"][:1] * 2},
    ],
)
def test_answers_that_are_judged_alike_are_no_preference(row: Any) -> None:
    for form in (judgement, rewarded_form):
        with pytest.raises(DataError, match=r"has no answer that is worse .*\(a tie .* take it out"):
            form(row)
        with pytest.raises(DataError, match="a tie"):  # with columns renamed, as a file's rows are
            form(renamed(row, DataConfig(apply_chat_template=True)))
    assert prompt_form(row)["prompt"] == [HI]


@pytest.mark.parametrize("texts", ["dialogues", "strings"])
def test_a_prompt_that_both_answers_repeat_is_taken_off_them(texts: str) -> None:
    if texts == "strings":
        row = {"prompt": "the sky is", "chosen": "the sky is blue", "rejected": "the sky is red"}
        assert judgement(row) == {"chosen": "the sky is blue", "rejected": "the sky is red"}
        assert sample_form(row) == {"prompt": "the sky is", "completion": " blue"}
    else:
        row = {"prompt": [HI], "chosen": [HI, HELLO], "rejected": [HI, GO]}
        assert judgement(row) == {"chosen": [HI, HELLO], "rejected": [HI, GO]}
        assert sample_form(row) == {"prompt": [HI], "completion": [HELLO]}
        assert sample_form({"prompt": [HI], "completion": [HI, HELLO]}) == sample_form(row)


def test_one_word_that_begins_both_answers_is_not_taken_off() -> None:
    assert judgement({"prompt": "1", "chosen": "10", "rejected": "11"}) == {
        "chosen": "110",
        "rejected": "111",
    }


def test_a_prompt_in_words_before_answers_of_the_assistant_is_the_users() -> None:
    row = {"prompt": "hi there", "chosen": [HELLO], "rejected": [GO]}
    assert judgement(row) == {"chosen": [HI, HELLO], "rejected": [HI, GO]}
    assert prompt_form(row)["prompt"] == [HI]


def test_a_prompt_that_the_answers_contradict_is_refused() -> None:
    with pytest.raises(DataError, match='has a "prompt" string that the messages before the answers do not'):
        judgement({"prompt": "who?", "chosen": [HI, HELLO], "rejected": [HI, GO]})
    with pytest.raises(DataError, match='has a "prompt" string that the messages'):
        prompt_form({"prompt": "who?", "messages": [HI, HELLO]})


def test_turns_of_share_gpt_know_systems_tools_and_calls() -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    row = {
        "system": "be kind",
        "tools": '[{"name": "add"}]',
        "conversations": [
            {"from": "human", "value": "one?"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "one"},
        ],
    }
    made = sample_form(row)
    assert made["tools"] == [{"name": "add"}]
    assert made["messages"] == [
        {"role": "system", "content": "be kind"},
        user("one?"),
        {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "1"},
        assistant("one"),
    ]


def test_marked_turns_of_help_steer_become_messages() -> None:
    prompt = "hi there\n<extra_id_1>Assistant\nhello\n<extra_id_1>User\nbye\n<extra_id_1>Assistant\n"
    made = prompt_form({**HELP_STEER, "prompt": prompt})
    assert made["prompt"] == [HI, HELLO, user("bye")]


STEPS = {"prompt": "1+1+1?", "completions": ["1+1=2", "2+1=4"], "labels": [True, False]}
SINGLE = {"message_id": "a", "parent_id": None, "text": "hi", "role": "prompter", "message_tree_id": "a"}


@pytest.mark.parametrize(
    ("form", "row", "reason"),
    [
        (sample_form, STEPS, 'has "completions" with "labels" for each step, as stepwise supervision has'),
        (judgement, STEPS, 'has "completions" with "labels" for each step, as stepwise supervision has'),
        (rewarded_form, STEPS, 'has "completions" with "labels" for each step, as stepwise supervision has'),
        (sample_form, SINGLE, "is a single message of an OpenAssistant tree .*trees.jsonl.gz"),
        (prompt_form, SINGLE, "is a single message of an OpenAssistant tree"),
        (
            sample_form,
            {"question": "2+2?", "answer": "4"},
            "keys here: question, answer.: set `data.columns.prompt=question data.columns.completion=answer`",
        ),
        (
            prompt_form,
            {"question": "2+2?", "answer": "4"},
            "got NoneType. .keys here: question, answer.: set `data.columns.prompt=question`",
        ),
        (
            sample_form,
            {"problem": "2+2?", "level": "Level 1", "type": "Algebra", "solution": "4"},
            "set `data.columns.prompt=problem data.columns.completion=solution`",
        ),
        (
            judgement,
            {"review": "good", "stars": 5},
            "data.columns.text=review data.columns.score=stars",
        ),
        (judgement, {"text": "good", "label": 2}, "set `data.columns.score=label`"),
        (
            judgement,
            {"question": "2+2?", "response": "4", "rating": 1},
            "set `data.columns.prompt=question data.columns.completion=response data.columns.score=rating`",
        ),
        (judgement, {"prompt": [HI], "completion": [HELLO], "id": 1}, "keys here: prompt, completion, id"),
        (judgement, {"question": "2+2?", "answer": "4"}, "keys here: question, answer.: name columns by"),
        (
            sample_form,
            {"messages": [HI, {"role": "assistant"}]},
            '"messages": message 1 has neither "content" nor',
        ),
        (
            prompt_form,
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
            '"prompt": message 0 has a part of type image, where only texts are trained on',
        ),
        (
            sample_form,
            {"conversations": [{"from": "moon", "value": "a"}]},
            "has a turn of 'moon' in its",
        ),
        (sample_form, {"conversations": [{"from": "gpt", "value": 3}]}, "has a turn without a string"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_keys_and_what_to_set(
    form: Any, row: Any, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        form(row)


def test_the_prompt_of_stepwise_supervision_can_be_sampled_from() -> None:
    assert prompt_form(STEPS)["prompt"] == "1+1+1?"


def test_keys_of_the_forms_without_a_value_do_not_count() -> None:
    empty = {"text": None, "label": None, "margin": None, "objective": None, "tools": None, "messages": None}
    assert sample_form({"prompt": "a", "completion": "b", **empty}) == {"prompt": "a", "completion": "b"}
    made = judgement({"chosen": "ab", "rejected": "ac", **empty})
    assert made == {"chosen": "ab", "rejected": "ac"}
    assert prompt_form({"prompt": "a", "answer": None, **empty}) == {"prompt": "a", "answer": None}
    assert judgement({"messages": [HI, HELLO], "label": 1})["score"] == 1.0
    assert judgement_form({"text": "a", "scores": {"b": 1, "c": None}})["scores"] == {"b": 1}


# --------------------------------------------------------------------------------------- columns, and strings


def config(**values: Any) -> DataConfig:
    return load(DataConfig, values)


@pytest.mark.parametrize(
    ("row", "columns", "made"),
    [
        (
            {"question": "2+2?", "answer": "4"},
            {"prompt": "question"},
            {"prompt": "2+2?", "answer": "4"},
        ),
        (
            {"question": "2+2?", "answer": "4"},
            {"prompt": "question", "completion": "answer"},
            {"prompt": "2+2?", "completion": "4"},
        ),
        ({"a": 1, "b": 2}, {"a": "b", "b": "a"}, {"a": 2, "b": 1}),
        ({"a": 1, "b": 2}, {"c": "a", "d": "a"}, {"b": 2, "c": 1, "d": 1}),
        ({"a": {"b": {"c": 1}}}, {"d": "a.b.c"}, {"a": {"b": {"c": 1}}, "d": 1}),
        ({"a.b": 1, "a": {"b": 2}}, {"c": "a.b"}, {"a": {"b": 2}, "c": 1}),
        ({"prompt": "has it"}, {"prompt": "question"}, {"prompt": "has it"}),
        ("a string", {"prompt": "question"}, "a string"),
    ],
)
def test_columns_come_under_the_names_that_they_are_given(row: Any, columns: Any, made: Any) -> None:
    assert renamed(row, config(columns=columns)) == made
    (listed_row,) = listed([row], "rows", config(columns=columns))
    assert listed_row == made


def test_a_column_that_no_key_has_is_named_with_the_keys_there_are() -> None:
    with pytest.raises(DataError) as caught:
        listed([{"question": "a", "answer": "b"}], "prompts", config(columns={"prompt": "problem"}))
    assert str(caught.value) == (
        "row 0 of the prompts has no 'problem', which `data.columns.prompt` names "
        "(keys here: question, answer)"
    )


@pytest.mark.parametrize(
    ("row", "made"),
    [
        ("hi there", {"prompt": [HI]}),
        ({"prompt": "hi there", "id": 1}, {"prompt": [HI], "id": 1}),
        ({"prompt": "hi there", "completion": "hello"}, {"prompt": [HI], "completion": [HELLO]}),
        (
            {"prompt": "hi there", "chosen": "hello", "rejected": "go away"},
            {"prompt": [HI], "chosen": [HELLO], "rejected": [GO]},
        ),
        ({"prompt": "hi there", "text": "hello", "score": 1}, {"prompt": [HI], "text": [HELLO], "score": 1}),
        ({"prompt": [HI], "completion": "hello"}, {"prompt": [HI], "completion": [HELLO]}),
        (HH, {"chosen": [HI, assistant("I say hello")], "rejected": [HI, assistant("I say go away")]}),
        (
            {"prompt": "\n\nHuman: hi there\n\nAssistant:", "completion": "hello"},
            {"prompt": [HI], "completion": [HELLO]},
        ),
        (
            {"prompt": "\n\nHuman: hi there\n\nAssistant:", "chosen": " hello", "rejected": " go away "},
            {"prompt": [HI], "chosen": [HELLO], "rejected": [GO]},
        ),
        (
            {"prompt": "hi there", "completion": " hello"},
            {"prompt": [HI], "completion": [assistant(" hello")]},
        ),
        ({"messages": [HI, HELLO]}, {"messages": [HI, HELLO]}),
        ({"text": "as it is"}, {"text": "as it is"}),
    ],
)
def test_strings_become_messages_where_that_is_asked_for(row: Any, made: Any) -> None:
    asked = config(apply_chat_template=True)
    assert renamed(row, asked) == made
    assert renamed(made, asked) == made


def test_strings_of_which_nobody_knows_who_says_them_are_refused() -> None:
    with pytest.raises(DataError, match='has no "prompt" string beside chosen, rejected'):
        renamed({"chosen": "ab", "rejected": "ac"}, config(apply_chat_template=True))


def test_rows_of_questions_and_answers_can_stay_strings() -> None:
    made = renamed(ALPACA, config(apply_chat_template=False))
    assert made == {"prompt": "greet\n\na friend", "completion": "hello"}
    assert sample_form(made) == made
    assert renamed(HH, config(apply_chat_template=False)) == HH


def test_turns_of_hh_are_told_apart() -> None:
    text = "\n\nHuman: a\nb\n\nc\n\nAssistant: d\n\nHuman: e\n\nAssistant:"
    assert hh_messages(text) == [user("a\nb\n\nc"), assistant("d"), user("e")]
    assert hh_messages("Humans: a") == []


# -------------------------------------------------------------------------------------- rows of Arrow tables


def test_keys_that_arrow_adds_inside_of_a_column_are_taken_out() -> None:
    rows = [{"prompt": "a", "kwargs": [{"n": 1}, {}], "n": None}, {"prompt": "b", "kwargs": [{"word": "x"}]}]
    split = Dataset.from_list(rows)
    assert split[0]["kwargs"] == [{"n": 1, "word": None}, {"n": None, "word": None}]
    streamed = split.to_iterable_dataset()
    mapped = streamed.map(lambda row: row)
    assert mapped.features is None
    for given in (split, streamed, mapped):
        assert listed(given, "prompts") == [rows[0], {**rows[1], "n": None}]


def test_values_of_mixed_types_arrive_as_they_were_written() -> None:
    rows = {"prompt": ["a", "b"], "truth": [[{"n": 1, "none": None}, {"n": "x"}], [3]]}
    split = Dataset.from_dict(rows, on_mixed_types="use_json")
    assert [row["truth"] for row in listed(split, "prompts")] == rows["truth"]


def test_a_row_of_another_form_stays_as_it_is() -> None:
    for row in ("a", 3, {"prompt": "a", "response": "b"}, {"conversations": []}, {"instruction": "a"}):
        assert public_form(row) == row

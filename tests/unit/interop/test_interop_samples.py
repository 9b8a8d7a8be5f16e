"""What TRL hands to a reward function becomes the samples that Conch's rewards score."""

from __future__ import annotations

from typing import Any

import pytest

from conch.errors import DataError
from conch.interop.samples import make_prompt, make_rollouts
from conch.triton.dialogues import dialogue_json

USER = {"role": "user", "content": "two and two?"}
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}],
}
TOOL = {"role": "tool", "name": "add", "content": "4"}
SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_texts_stand_side_by_side_and_columns_become_metadata() -> None:
    first, second = make_rollouts(["2+2=", "1+1="], ["4", "3"], [[7, 1], [8]], {"answer": ["4", "2"]})
    assert (first.sample, second.sample) == ("2+2=4", "1+1=3")
    assert first.prompt.metadata == {"answer": "4"} and second.prompt.metadata == {"answer": "2"}
    assert first.completion.token_ids == (7, 1)
    assert first.dialogue is None


def test_messages_become_the_whole_dialogue_and_the_answer_its_text() -> None:
    (rollout,) = make_rollouts([[USER]], [[said("four")]], None, {})
    assert rollout.completion.text == "four"
    assert rollout.dialogue is not None
    assert rollout.dialogue.messages == (USER, said("four"))


def test_calls_of_tools_stay_before_the_answer() -> None:
    (rollout,) = make_rollouts([[USER]], [[CALL, TOOL, said("It is 4.")]], None, {}, [SCHEMA])
    assert rollout.completion.text == "It is 4."
    assert rollout.dialogue is not None
    assert rollout.dialogue.messages == (USER, CALL, TOOL, said("It is 4."))
    assert rollout.dialogue.tools == (SCHEMA,)


def test_a_completion_that_ends_with_a_call_keeps_it() -> None:
    (rollout,) = make_rollouts([[USER]], [[CALL]], None, {})
    assert rollout.completion.text == "" and rollout.dialogue is not None
    assert rollout.dialogue.messages == (USER, CALL)


def test_other_keys_of_the_answer_are_kept() -> None:
    answer = {**said("4"), "reasoning_content": "easy"}
    (rollout,) = make_rollouts([[USER]], [[answer]], None, {})
    assert rollout.dialogue is not None and rollout.dialogue.messages == (USER, answer)


def test_an_answer_that_the_prompt_has_begun_goes_on() -> None:
    (rollout,) = make_rollouts([[USER, said("It is ")]], [[said("4")]], None, {})
    assert rollout.completion.text == "4"
    assert rollout.dialogue is not None
    assert rollout.dialogue.messages == (USER, said("It is 4"))


def test_an_answer_that_the_prompt_has_begun_and_a_call_followed_is_whole() -> None:
    (rollout,) = make_rollouts(
        [[USER, said("Let me ")]], [[{**CALL, "content": "see"}, TOOL, said("4")]], None, {}
    )
    assert rollout.completion.text == "4" and rollout.dialogue is not None
    begun = {**CALL, "content": "Let me see"}
    assert rollout.dialogue.messages == (USER, begun, TOOL, said("4"))


def test_an_answer_in_parts_is_their_text() -> None:
    parts = [{"type": "text", "text": "It "}, {"type": "text", "text": "is 4"}]
    (rollout,) = make_rollouts([[USER]], [[{"role": "assistant", "content": parts}]], None, {})
    assert rollout.completion.text == "It is 4"
    (rollout,) = make_rollouts(
        [[USER, said("It ")]], [[{"role": "assistant", "content": parts[1:]}]], None, {}
    )
    assert rollout.completion.text == "is 4" and rollout.dialogue is not None
    assert rollout.dialogue.messages == (USER, said("It is 4"))
    (rollout,) = make_rollouts(
        [[USER, {"role": "assistant", "content": parts[:1]}]], [[said("is 4")]], None, {}
    )
    assert rollout.completion.text == "is 4" and rollout.dialogue is not None
    assert rollout.dialogue.messages == (USER, {"role": "assistant", "content": parts})


def test_what_arrow_adds_to_messages_is_taken_away() -> None:
    (rollout,) = make_rollouts(
        [[{**USER, "tool_calls": None, "name": None}]], [[{**said("4"), "tool_calls": None}]], None, {}
    )
    assert rollout.dialogue is not None
    expected = '[{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "4"}]'
    assert dialogue_json(rollout.dialogue) == expected


def test_tools_and_variables_of_a_row_go_to_the_template_also_as_json() -> None:
    columns = {
        "tools": ['[{"type": "function"}]'],
        "chat_template_kwargs": [{"thinking": False, "style": None}],
        "answer": ["4"],
    }
    (rollout,) = make_rollouts([[USER]], [[said("4")]], None, columns, [SCHEMA])
    assert rollout.dialogue is not None
    assert rollout.dialogue.tools == ({"type": "function"},)
    assert rollout.dialogue.template_kwargs == {"thinking": False}
    assert rollout.prompt.metadata == {"answer": "4"}


def test_a_text_after_messages_is_the_assistants() -> None:
    (rollout,) = make_rollouts([[USER]], ["4"], None, {})
    assert rollout.dialogue is not None and rollout.dialogue.messages == (USER, said("4"))


@pytest.mark.parametrize(
    ("prompt", "completion", "words"),
    [
        ("2+2=", [said("4")], "a prompt that is a text and a completion that is none"),
        (7, "4", "a prompt of type int"),
        ([USER], [{"content": "4"}], 'no object with a "role"'),
        ([], [said("4")], "a prompt without messages"),
        ([USER], None, "a completion of type NoneType"),
        (
            [USER],
            [{"role": "assistant", "content": [{"type": "image"}]}],
            "a completion whose last message has a part of type image",
        ),
    ],
)
def test_samples_of_other_forms_are_refused_by_number(prompt: Any, completion: Any, words: str) -> None:
    with pytest.raises(DataError, match=words) as error:
        make_rollouts(["1+1=", prompt], ["2", completion], None, {})
    assert str(error.value).startswith("sample 1 ")


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(DataError, match="2 prompts, 1 completions"):
        make_rollouts(["a", "b"], ["c"], None, {})


def test_tools_that_are_functions_are_refused() -> None:
    with pytest.raises(DataError, match="get_json_schema"):
        make_prompt([USER], {"tools": [print]})


def test_tools_that_are_no_json_are_refused() -> None:
    with pytest.raises(DataError, match="no JSON"):
        make_prompt([USER], {"tools": "add"})

"""The nouns that stages share."""

from __future__ import annotations

from typing import Any

import pytest

from conch.types import Completion, Dialogue, Prompt, Rollout

pytestmark = pytest.mark.unit

USER = {"role": "user", "content": "How are you?"}


def rollout(dialogue: Dialogue | None, answer: str) -> Rollout:
    completion = Completion(answer, (7,), (-0.5,), "eos")
    return Rollout(Prompt("<u>How are you?<a>", (1, 2), dialogue=dialogue), completion, policy_version=0)


def test_a_rollout_of_a_dialogue_gives_messages_with_the_answer() -> None:
    tools = ({"type": "function", "function": {"name": "clock"}},)
    answered = rollout(Dialogue((USER,), tools, {"thinking": False}), "Fine").dialogue
    assert answered == Dialogue((USER, {"role": "assistant", "content": "Fine"}), tools, {"thinking": False})


@pytest.mark.parametrize(
    ("begun", "whole"),
    [
        ("I am", "I am fine"),
        (None, " fine"),
        ([{"type": "text", "text": "I am"}], [{"type": "text", "text": t} for t in ("I am", " fine")]),
    ],
)
def test_an_answer_that_was_begun_goes_on(begun: Any, whole: Any) -> None:
    dialogue = Dialogue((USER, {"role": "assistant", "content": begun, "name": "Bot"}))
    assert rollout(dialogue, " fine").dialogue == Dialogue(
        (USER, {"role": "assistant", "content": whole, "name": "Bot"})
    )


def test_a_dialogue_that_the_assistant_has_ended_stays_as_it_is() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "clock"}}]}
    assert rollout(Dialogue((USER, call)), "").dialogue == Dialogue((USER, call))


def test_a_rollout_of_a_text_gives_no_messages() -> None:
    assert rollout(None, "Fine").dialogue is None


PARTS = [{"type": "text", "text": "I am"}, {"type": "text", "text": " fine"}]
JOINED = [{"type": "text", "text": "I am fine"}]
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "clock"}}]}
TOOL = {"role": "tool", "content": "noon"}
IMAGE = {"role": "user", "content": [{"type": "image"}]}


def said(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize(
    ("messages", "text", "left"),
    [
        ((USER, said("I am fine")), "I am fine", (USER,)),
        ((USER, CALL, TOOL, said("I am fine")), "I am fine", (USER, CALL, TOOL)),
        ((USER, said("I am fine", name="Bot")), "I am fine", (USER, said("", name="Bot"))),
        ((said("I am fine"),), "I am fine", (said(""),)),
        ((USER, said("Hm."), said("I am fine")), "I am fine", (USER, said("Hm."), said(""))),
        ((USER, said(JOINED)), "I am fine", (USER, said([]))),
        ((USER, CALL), "", (USER, CALL)),
        ((USER, said("")), "", (USER, said(""))),
        ((USER, said([])), "", (USER, said([]))),
        ((USER,), "", (USER,)),
        ((IMAGE,), "", (IMAGE,)),
    ],
)
def test_the_text_of_the_last_message_is_taken_out_and_put_back(messages: Any, text: str, left: Any) -> None:
    dialogue = Dialogue(messages, ({"type": "function"},), {"thinking": False})
    assert dialogue.begun() == (Dialogue(left, ({"type": "function"},), {"thinking": False}), text)
    if text:
        assert dialogue.begun()[0].answered(text) == dialogue


def test_parts_of_a_text_are_one_text() -> None:
    begun, text = Dialogue((USER, said(PARTS))).begun()
    assert text == "I am fine" and begun.answered(text).messages == (USER, said(JOINED))
    begun, text = Dialogue((USER, said(PARTS))).begun(PARTS[:1])
    assert text == " fine" and begun.answered(text).messages == (USER, said(PARTS))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([*PARTS, {"type": "image_url", "image_url": {}}], "a part of type image_url, and only texts"),
        (["I am fine"], "a part of type str"),
        ([{"type": "text"}], "a part of type text, and only"),
        (7, 'a "content" of type int'),
    ],
)
def test_a_message_that_is_no_text_has_none_to_score(content: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^has {words}"):
        Dialogue((USER, said(content))).begun()

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

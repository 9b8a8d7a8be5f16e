"""Rows as the owners of public datasets publish them, brought into the forms of `conch.data.formats`.

    ShareGPT       {"conversations": [{"from": "human", "value"}, ...]}, perhaps with "system" and "tools", or
                   with "chosen" and "rejected"
    Alpaca         {"instruction", "input", "output"}
    Dolly          {"instruction", "context", "response"}
    UltraFeedback  {"instruction", "completions": [{"response", "fine-grained_score"}, ...]}: the best and the
                   worst become chosen and rejected
    HelpSteer      {"prompt", "response", "helpfulness", ...}: five scores
                   {"prompt", "response_1", "response_2", "preference_strength"}
                   {"context", "response1", "response2", "overall_preference"}
    OpenAssistant  {"prompt": {"text", "role", "replies": [...]}}: of a tree the replies that people ranked
                   first; the last ranked answer to the root is the rejected one
    GSM8K          {"question", "answer"}, the answer ending in "#### 18"; "answer" stays, for its verifier

Where answers are judged alike there is a chosen one, and None for the rejected one.

What these people and models say is made into messages. A row of another form comes back as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from conch.data.chat import messages_of
from conch.errors import DataError
from conch.types import ASSISTANT

Row = Mapping[str, Any]

_ROLES = {
    "human": "user",
    "prompter": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bing": ASSISTANT,
    "bard": ASSISTANT,
    "assistant": ASSISTANT,
    "model": ASSISTANT,
    "function_call": ASSISTANT,
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Who speaks, in ShareGPT's and OpenAssistant's words -> the role of a chat template."""

_HELP_STEER_SCORES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HELP_STEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def public_form(row: Any, *, spoken: bool = True) -> Any:
    """The row in a form of `conch.data.formats`, where it has a form that this module's docstring lists.

    spoken: what is asked and answered becomes messages; else it stays strings where it is one question with
        its answers.

    Raises:
        DataError: it has such a form, and cannot be used, in words that follow a row's name.
    """
    if not isinstance(row, Mapping):
        return row
    for recognise in (_share_gpt, _alpaca, _ultra_feedback, _help_steer, _open_assistant, _gsm8k):
        form = recognise(row)
        if form is not None:
            return as_spoken(form) if spoken else form
    return row


def as_spoken(row: Row) -> Row:
    """The row with messages for strings: its prompt is what the user says, the rest the assistant's answers.

    Texts of Human's and Assistant's turns, as in Anthropic's HH, are cut into them.

    Raises:
        DataError: its texts are strings without a prompt, so that nobody knows who says what.
    """
    prompt = row.get("prompt")
    answers = {key: row[key] for key in ("completion", "chosen", "rejected") if isinstance(row.get(key), str)}
    turns = hh_messages(prompt) if isinstance(prompt, str) else []
    if isinstance(prompt, str):
        row = {**row, "prompt": turns or [{"role": "user", "content": prompt}]}
    elif prompt is None and answers:
        dialogues = {key: hh_messages(text) for key, text in answers.items()}
        if not all(dialogues.values()) and "prompt" in row:
            raise DataError('has null for "prompt": give a value, or take the row out')
        if not all(dialogues.values()):
            raise DataError(
                f'has no "prompt" string beside {", ".join(answers)}: who says what is not known; name it by '
                "`data.columns.prompt`, or leave `data.apply_chat_template` out"
            )
        return {**row, **dialogues}
    if isinstance(row.get("text"), str) and prompt is not None:
        answers["text"] = row["text"]
    if turns:  # behind "Assistant:" stands a space, as in the turns of the prompt
        answers = {key: text.strip() for key, text in answers.items()}
    return {**row, **{key: [{"role": ASSISTANT, "content": text}] for key, text in answers.items()}}


def hh_messages(text: str) -> list[dict[str, str]]:
    """The turns of a text that begins with "\\n\\nHuman:", an empty last one left out; of others none."""
    if not re.match(r"\s*Human:", text):
        return []
    _, *pieces = _HH_TURN.split("\n\n" + text.lstrip())
    turns = [
        {"role": "user" if who == "Human" else ASSISTANT, "content": said.strip()}
        for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    return turns if turns[-1]["content"] else turns[:-1]


def _with(row: Row, used: Sequence[str], form: Row) -> Row:
    """The form, with the keys of the row that were not used for it."""
    return {**{key: value for key, value in row.items() if key not in used}, **form}


# --------------------------------------------------------------------------------------------------- ShareGPT


def _share_gpt(row: Row) -> Row | None:
    turns = row.get("conversations", row.get("conversation"))
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        return None
    if not all(isinstance(turn, Mapping) for turn in turns):
        return None
    messages = messages_of(turns) or [_share_gpt_message(turn) for turn in turns]
    if isinstance(row.get("system"), str) and row["system"] and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": row["system"]}, *messages]
    used = ("conversations", "conversation", "system")
    answers = {key: row.get(key) for key in ("chosen", "rejected")}
    if all(isinstance(answer, Mapping) for answer in answers.values()):
        said = {key: [_share_gpt_message(answer)] for key, answer in answers.items()}  # pyright: ignore[reportArgumentType]
        return _with(row, used, {"prompt": messages, **said})
    return _with(row, used, {"messages": messages})


def _share_gpt_message(turn: Row) -> dict[str, Any]:
    """A message of {"from", "value"}, or of {"role", "content"}.

    Raises:
        DataError: it says nothing, or somebody unknown speaks.
    """
    speaker, said = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    role = _ROLES.get(str(speaker).lower())
    if role is None or not isinstance(said, str):
        reason = f"of {speaker!r}" if role is None else "without a string"
        raise DataError(f"has a turn {reason} in its conversation: known speakers are {', '.join(_ROLES)}")
    if speaker != "function_call":
        return {"role": role, "content": said}
    try:
        calls = json.loads(said)
    except json.JSONDecodeError as error:
        raise DataError(f"has a function_call that is no JSON: {error}") from None
    functions = calls if isinstance(calls, list) else [calls]
    return {"role": role, "tool_calls": [{"type": "function", "function": each} for each in functions]}


# ----------------------------------------------------------------------------------------------- instructions


def _alpaca(row: Row) -> Row | None:
    """Alpaca's or Dolly's; with a "text", which says the same in the words of Alpaca's own prompt, none."""
    given, answer = ("input", "output") if "output" in row else ("context", "response")
    if not all(isinstance(row.get(key), str) for key in ("instruction", answer)) or "text" in row:
        return None
    material = row.get(given)
    prompt = row["instruction"] + (f"\n\n{material}" if isinstance(material, str) and material else "")
    return _with(row, ("instruction", given, answer), {"prompt": prompt, "completion": row[answer]})


def _gsm8k(row: Row) -> Row | None:
    question, answer = row.get("question"), row.get("answer")
    if "prompt" in row or not isinstance(question, str) or not isinstance(answer, str):
        return None
    return _with(row, ("question",), {"prompt": question, "completion": answer}) if "####" in answer else None


def _ultra_feedback(row: Row) -> Row | None:
    completions = row.get("completions")
    if not isinstance(row.get("instruction"), str) or not isinstance(completions, list) or not completions:
        return None
    if not all(isinstance(each, Mapping) and isinstance(each.get("response"), str) for each in completions):
        return None
    scores = [_ultra_score(each) for each in completions]
    best, worst = max(scores), min(scores)
    form = {
        "prompt": row["instruction"],
        "chosen": completions[scores.index(best)]["response"],
        "rejected": completions[scores.index(worst)]["response"] if best > worst else None,
    }
    return _with(row, ("instruction", "completions"), form)


def _ultra_score(completion: Row) -> float:
    """The mean of the four ratings, or else the overall score."""
    score = completion.get("fine-grained_score")
    score = completion.get("overall_score") if score is None else score
    if not isinstance(score, (int, float)):
        raise DataError('has a completion without a "fine-grained_score" or "overall_score"')
    return float(score)


# -------------------------------------------------------------------------------------------------- HelpSteer


def _help_steer(row: Row) -> Row | None:
    asked = row.get("prompt", row.get("context"))
    if isinstance(row.get("response"), str) and all(name in row for name in _HELP_STEER_SCORES):
        scores = {name: row[name] for name in _HELP_STEER_SCORES}
        used = ("prompt", "response", *_HELP_STEER_SCORES)
        form = _answered(asked, {"completion": row["response"]})
        return None if form is None else _with(row, used, {**form, "scores": scores})
    answers, strength = _answers(row), row.get("preference_strength", row.get("overall_preference"))
    if answers is None or not isinstance(strength, (int, float)):
        return None
    better, worse = answers if strength <= 0 else answers[::-1]
    form = _answered(asked, {"chosen": better, "rejected": worse if strength else None})
    used = ("prompt", "context", "response_1", "response_2", "response1", "response2")
    return None if form is None else _with(row, used, form)


def _answers(row: Row) -> tuple[str, str] | None:
    for keys in (("response_1", "response_2"), ("response1", "response2")):
        one, two = (row.get(key) for key in keys)
        if isinstance(one, str) and isinstance(two, str):
            return one, two
    return None


def _answered(asked: Any, answers: Mapping[str, str | None]) -> Row | None:
    """A prompt with its answers, None for one that is not there; as messages where the prompt is a dialogue,
    also one of marked turns."""
    if isinstance(asked, str) and (pieces := _HELP_STEER_TURN.split(asked))[1:]:
        roles = ["user", *("user" if who == "User" else ASSISTANT for who in pieces[1::2])]
        turns = [{"role": role, "content": said} for role, said in zip(roles, pieces[::2], strict=True)]
        # The last turn is opened for the answer, and empty.
        asked = turns if turns[-1]["content"] else turns[:-1]
    if isinstance(asked, str):
        return {"prompt": asked, **answers}
    messages = messages_of(asked)
    if messages is None:
        return None
    said = {
        key: None if text is None else [{"role": ASSISTANT, "content": text}] for key, text in answers.items()
    }
    return {"prompt": messages, **said}


# ---------------------------------------------------------------------------------------------- OpenAssistant


def _open_assistant(row: Row) -> Row | None:
    if isinstance(row.get("text"), str) and {"message_id", "parent_id", "role"} <= row.keys():
        raise DataError(
            'is a single message of an OpenAssistant tree (keys "message_id", "parent_id", "text", "role"): '
            "give the file of whole trees, `*.trees.jsonl.gz` of the same dataset"
        )
    root = row.get("prompt")
    if not isinstance(root, Mapping) or not isinstance(root.get("text"), str):
        return None
    prompt = [{"role": "user", "content": root["text"]}]
    answers = _ranked(root)
    if not answers:
        return _with(row, ("prompt",), {"prompt": prompt})
    form = {"messages": [*prompt, *_first_branch(root)], "prompt": prompt}
    if len(answers) > 1 and answers[0].get("rank") is not None:
        form |= {"chosen": [_said(answers[0])], "rejected": [_said(answers[-1])]}
    return _with(row, ("prompt",), form)


def _ranked(message: Row) -> list[Row]:
    """Replies to a message that were not deleted: those with a rank, the best first; all where none has."""
    replies = [reply for reply in message.get("replies") or [] if not reply.get("deleted")]
    ranked = [reply for reply in replies if reply.get("rank") is not None]
    return sorted(ranked, key=lambda reply: reply["rank"]) or replies


def _first_branch(message: Row) -> list[dict[str, str]]:
    """The best reply, the best reply to that, and so on, to the assistant's last word."""
    branch: list[dict[str, str]] = []
    while replies := _ranked(message):
        message = replies[0]
        branch.append(_said(message))
    while branch and branch[-1]["role"] != ASSISTANT:
        branch.pop()
    return branch


def _said(message: Row) -> dict[str, str]:
    return {"role": _ROLES.get(message.get("role", ""), "user"), "content": message["text"]}

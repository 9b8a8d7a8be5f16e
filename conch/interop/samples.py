"""What trainers hand to a reward function -> rollouts: texts or messages, and the dataset's columns."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from conch.errors import DataError
from conch.types import ASSISTANT, Completion, Dialogue, Prompt, Rollout

TOOLS = "tools"
TEMPLATE_KWARGS = "chat_template_kwargs"


def make_rollouts(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]] | None,
    columns: Mapping[str, Sequence[Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[Rollout]:
    """Return one rollout a sample.

    prompts: texts, or lists of messages.
    completions: texts; of prompts that are messages, lists of the messages that followed, or texts.
    completion_ids: sampled ids; None where the trainer does not tell them.
    columns: name -> a value a sample, the prompt's metadata. Of prompts that are messages, `tools` and
        `chat_template_kwargs` go to the chat template instead.
    tools: JSON schemas for prompts without a column `tools`.

    Raises:
        DataError: a prompt or completion is of neither form, or the lists differ in length.
    """
    ids = [()] * len(prompts) if completion_ids is None else completion_ids
    if not len(prompts) == len(completions) == len(ids):
        raise DataError(
            f"a reward function was given {len(prompts)} prompts, {len(completions)} completions and "
            f"{len(ids)} lists of token ids: they must be as many as each other"
        )
    rows = [{name: values[index] for name, values in columns.items()} for index in range(len(prompts))]
    samples = zip(prompts, completions, ids, rows, strict=True)
    return [_rollout(index, *sample, tools) for index, sample in enumerate(samples)]


def make_prompt(
    prompt: Any, row: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] | None = None
) -> Prompt:
    """Return a dataset's prompt, text or list of messages, with the rest of its row.

    Raises:
        DataError: it is neither; a phrase that follows the row's name.
    """
    if isinstance(prompt, str):
        return Prompt(prompt, (), row)
    messages = _messages(prompt, "prompt")
    if not messages:
        raise DataError("has a prompt without messages")
    given = _from_json(row.get(TOOLS)) or tools
    variables = _from_json(row.get(TEMPLATE_KWARGS)) or {}
    if not isinstance(variables, Mapping):
        raise DataError(f'has "{TEMPLATE_KWARGS}" that are no dict')
    metadata = {name: value for name, value in row.items() if name not in (TOOLS, TEMPLATE_KWARGS)}
    dialogue = Dialogue(messages, _schemas(given) if given else None, without_none(variables))
    return Prompt(_as_text(messages), (), metadata, dialogue)


def _rollout(
    index: int,
    prompt: Any,
    completion: Any,
    ids: Sequence[int],
    row: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] | None,
) -> Rollout:
    try:
        asked = make_prompt(prompt, row, tools)
        if isinstance(completion, str):
            text = completion
        elif asked.dialogue is None:
            raise DataError("has a prompt that is a text and a completion that is none")
        else:
            asked, text = _answer(asked, asked.dialogue, _messages(completion, "completion"))
    except DataError as error:
        raise DataError(f"sample {index} {error}") from None
    # Trainers do not tell how probable the tokens were.
    return Rollout(asked, Completion(text, tuple(ids), (math.nan,) * len(ids), "eos"), policy_version=0)


def _answer(
    prompt: Prompt, dialogue: Dialogue, completion: tuple[Mapping[str, Any], ...]
) -> tuple[Prompt, str]:
    """Return a prompt and the text of the answer to it, which together are all the messages.

    The answer is the last message; calls of tools and their results, which stand before it, and all keys of
    it but the content belong to the prompt.
    """
    begun = dialogue.messages[-1]
    if completion and begun["role"] == completion[0]["role"] == ASSISTANT:
        # The policy went on with what the assistant had begun.
        both = _joined(begun.get("content"), completion[0].get("content"))
        completion = ({**begun, **completion[0], "content": both}, *completion[1:])
        dialogue = replace(dialogue, messages=dialogue.messages[:-1])
        return _split(prompt, dialogue, completion, begun.get("content") if len(completion) == 1 else None)
    return _split(prompt, dialogue, completion)


def _split(
    prompt: Prompt, dialogue: Dialogue, completion: tuple[Mapping[str, Any], ...], opening: Any = None
) -> tuple[Prompt, str]:
    """Take the text out of the last message, but for what the prompt opened it with."""
    whole, text = replace(dialogue, messages=(*dialogue.messages, *completion)), ""
    if completion:
        try:
            whole, text = whole.begun(opening or "")
        except ValueError as error:
            raise DataError(f"has a completion whose last message {error}") from None
    return Prompt(prompt.text, (), prompt.metadata, whole), text


def _joined(begun: Any, more: Any) -> Any:
    if isinstance(begun, str | None) and isinstance(more, str | None):
        return (begun or "") + (more or "")
    return [*_parts(begun), *_parts(more)]


def _parts(content: Any) -> list[Any]:
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _messages(value: Any, what: str) -> tuple[Mapping[str, Any], ...]:
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if not is_list:
        raise DataError(f"has a {what} of type {type(value).__name__}: give a text or a list of messages")
    if not all(isinstance(each, Mapping) and isinstance(each.get("role"), str) for each in value):
        raise DataError(f'has a message in its {what} that is no object with a "role"')
    return tuple(without_none(each) for each in value)


def _schemas(tools: Any) -> tuple[Mapping[str, Any], ...]:
    is_list = isinstance(tools, Sequence) and not isinstance(tools, (str, bytes))
    if not is_list or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(
            "has tools that are no list of JSON schemas: of a function, "
            "`transformers.utils.get_json_schema` makes one"
        )
    return tuple(without_none(tool) for tool in tools)


def _from_json(value: Any) -> Any:
    """A value that a dataset keeps as a string, since its rows' values have no common type."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise DataError("has tools or template variables that are a string, but no JSON") from None


def without_none(value: Any) -> Any:
    """Return a copy of dicts and lists in which no dict has a key whose value is None.

    Arrow gives every message of a column the keys of all of them.
    """
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [without_none(item) for item in value]
    return value


def _as_text(messages: Iterable[Mapping[str, Any]]) -> str:
    """What stands for a dialogue where a text is asked for; nothing is made of it but names of samples."""
    return json.dumps(list(map(dict, messages)), ensure_ascii=False, default=str)

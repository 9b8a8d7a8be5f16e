"""Dialogues become token ids, with a mask of what the assistant wrote.

A dialogue is rendered by the tokenizer's chat template. What is the assistant's is what the template marks
by `{% generation %}` blocks; in a template without them, what stands between the rendering of all messages
before an answer, opened for that answer, and the rendering that includes it.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from conch.data.text import special_tokens
from conch.errors import DataError
from conch.log import get_logger
from conch.types import ASSISTANT, Dialogue

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = get_logger(__name__)

Message = Mapping[str, Any]
Span = tuple[int, int]

TEMPLATE_KEYS = ("tools", "chat_template_kwargs")
"""Keys of a row of messages that are for the chat template, not for rewards."""

_ROLES = ("system", "developer", "user", ASSISTANT, "tool")

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


# ------------------------------------------------------------------------------------------ rows to dialogues


def messages_of(sample: Any) -> list[Message] | None:
    """The messages of a dialogue, `{"messages": [...]}` or the list itself; None where it is no dialogue.

    A message is a dict with a string "role" and a "content", a string or a list of parts
    {"type": "text", "text"}; one with "tool_calls" needs no content. What else it holds is for the template.
    Keys whose value is None are left out, at any depth: Arrow tables have such keys wherever another row has
    a value.
    """
    messages = sample.get("messages") if isinstance(sample, Mapping) else sample
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        return None
    clean = without_none(messages)
    return None if any(map(_message_fault, clean)) else clean


def dialogue_fault(value: Any) -> str:
    """Why a list is no dialogue: its first message that is none, and what it lacks; "" for anything else."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        return ""
    faults = ((number, _message_fault(message)) for number, message in enumerate(without_none(value)))
    return next((f"message {number} {fault}" for number, fault in faults if fault), "")


def _message_fault(message: Any) -> str:
    """Why this is no message, in words that follow its name; "" where it is one."""
    if not isinstance(message, Mapping):
        return f"is a {type(message).__name__}"
    if not isinstance(message.get("role"), str):
        return f'has no "role" (keys: {", ".join(map(str, message))})'
    content = message.get("content")
    if content is None:
        return "" if message.get("tool_calls") else 'has neither "content" nor "tool_calls"'
    if not isinstance(content, list):
        return "" if isinstance(content, str) else f'has a "content" of type {type(content).__name__}'
    return next(filter(None, map(_part_fault, content)), "")


def _part_fault(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text":
        return f"has a part of type {kind}, where only texts are trained on"
    return "" if isinstance(part.get("text"), str) else 'has a text part without "text"'


def without_none(value: Any) -> Any:
    """A copy of dicts and lists in which no dict has a key whose value is None."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [without_none(item) for item in value]
    return value


def dialogue_of_row(row: Any, *keys: str) -> Dialogue | None:
    """The messages under these keys of a row, one after the other, with the row's "tools" and
    "chat_template_kwargs"; None where one of them is no list of messages.

    Tools are a list of JSON schemas, or that list as a JSON string; template variables a dict, or a dict as a
    JSON string.

    Raises:
        DataError: the tools or the template variables are something else, in words that follow a row's name.
    """
    parts = [messages_of(row.get(key)) for key in keys]
    messages = [message for part in parts if part is not None for message in part]
    if not messages or any(part is None for part in parts):
        return None
    return Dialogue(tuple(messages), _tools(row), _template_kwargs(row))


def dialogue_of(sample: Any) -> tuple[Dialogue, int] | None:
    """A dialogue, `{"messages"}`, a list of messages or {"prompt", "completion"} that are both dialogues, and
    how many of its messages are prompt; None for anything else.

    Raises:
        DataError: see `dialogue_of_row`.
    """
    if not isinstance(sample, Mapping):
        messages = messages_of(sample)
        return None if messages is None else (Dialogue(tuple(messages)), 0)
    if "messages" in sample:
        whole = dialogue_of_row(sample, "messages")
        return None if whole is None else (whole, 0)
    prompt = dialogue_of_row(sample, "prompt")
    whole = dialogue_of_row(sample, "prompt", "completion")
    return None if prompt is None or whole is None else (whole, len(prompt.messages))


def template_keys(row: Mapping[str, Any]) -> dict[str, Any]:
    """What of a row of messages is for the chat template beside them, under the same keys; none without a
    value.

    Raises:
        DataError: see `dialogue_of_row`.
    """
    keys = {"tools": _tools(row), "chat_template_kwargs": _template_kwargs(row)}
    return {key: list(value) if key == "tools" else value for key, value in keys.items() if value}


def _tools(row: Mapping[str, Any]) -> tuple[Any, ...] | None:
    tools = _read("tools", row)
    is_list = isinstance(tools, Sequence) and all(isinstance(tool, Mapping) for tool in tools)
    if tools is not None and not is_list:
        raise DataError('has "tools" that are no list of JSON schemas')
    return tuple(tools) if tools else None


def _template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    values = _read("chat_template_kwargs", row)
    if values is not None and not isinstance(values, Mapping):
        raise DataError('has "chat_template_kwargs" that are no dict')
    taken = sorted(reserved_names() & set(values)) if values else []
    if taken:
        raise DataError(f'has "chat_template_kwargs" that are not for the template: {", ".join(taken)}')
    return dict(values or {})


@cache
def reserved_names() -> frozenset[str]:
    """Names that `apply_chat_template` has for other things than variables of the template; a reward model's
    server refuses the same."""
    from transformers import PreTrainedTokenizerBase  # not needed for rows without such variables

    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return frozenset({*parameters, "messages"} - {"self"})


def _read(key: str, row: Mapping[str, Any]) -> Any:
    value = row.get(key)
    if not isinstance(value, str):
        return without_none(value)
    try:
        return json.loads(value) if value.strip() else None
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f'has "{key}" that are no JSON: {error}') from None


# -------------------------------------------------------------------------------------------------- rendering


def render_prompt(dialogue: Dialogue, name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A dialogue as the text that an answer follows; where the assistant spoke last, its turn goes on.

    name: of the prompt, for messages.

    Raises:
        DataError: the tokenizer has no chat template, or the template refuses the dialogue.
    """
    goes_on = dialogue.messages[-1]["role"] == ASSISTANT
    option = "continue_final_message" if goes_on else "add_generation_prompt"
    return _rendered(dialogue, name, tokenizer, **{option: True})


def render_dialogue(dialogue: Dialogue, name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A whole dialogue as text.

    name: of the text, for messages.

    Raises:
        DataError: the tokenizer has no chat template, or the template refuses the dialogue.
    """
    return _rendered(dialogue, name, tokenizer)


def _rendered(dialogue: Dialogue, name: str, tokenizer: PreTrainedTokenizerBase, **options: bool) -> str:
    if tokenizer.chat_template is None:
        raise DataError(
            f"{name} is a dialogue, and the tokenizer has no chat template: give it one, or texts "
            "(questions and answers of public datasets are texts with `data.apply_chat_template=false`)"
        )
    try:
        _check_roles(dialogue, name, tokenizer)
        return _render(as_template_reads(dialogue, tokenizer), tokenizer, **options)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"the chat template does not take {name}: {error}") from error


def _check_roles(dialogue: Dialogue, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn once of a role that the chat template passes over, or that nobody knows.

    Raises:
        DataError: the template passes over what somebody unknown says.
    """
    template, reads = _reads_of(dialogue, tokenizer)
    for number, message in enumerate(dialogue.messages):
        role = message["role"]
        known = role in _ROLES or any(f"{quote}{role}{quote}" in template for quote in "'\"")
        passed_over = bool(reads.passed_over) and reads.passed_over[number]
        if known and not passed_over:
            continue
        if not known and passed_over:
            roles = ", ".join(dict.fromkeys(each["role"] for each in dialogue.messages))
            raise DataError(
                f'message {number} of {name} has the role "{role}", and the chat template leaves it out '
                f"(roles there: {roles}; known are {', '.join(_ROLES)}, and those that the template names)"
            )
        _warn_of_role(role, known)


@lru_cache(maxsize=64)
def _warn_of_role(role: str, known: bool) -> None:
    """Once for each role."""
    if known:
        _log.warning('the chat template leaves out what messages of the role "%s" say', role)
    else:
        _log.warning(
            'messages have the role "%s", which the chat template does not name, so that the model may not '
            "know it: known are %s",
            *(role, ", ".join(_ROLES)),
        )


def encode_dialogue(
    dialogue: Dialogue, name: str, tokenizer: PreTrainedTokenizerBase, *, num_prompt: int = 0
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Token ids, and a mask that is True where the assistant wrote them, the end of its turn included.

    name: of the dialogue, for messages.
    num_prompt: messages at the beginning of which nothing is the assistant's, whoever wrote them.

    Raises:
        DataError: the tokenizer has no chat template or tells no offsets, the template refuses the dialogue
            or renders a message differently once others follow, or nothing in it is the assistant's.
    """
    _check_tokenizer(tokenizer)
    if not any(message["role"] == ASSISTANT for message in dialogue.messages[num_prompt:]):
        raise DataError(f'{name} has no message with the role "{ASSISTANT}": nothing to learn')
    try:
        _check_roles(dialogue, name, tokenizer)
        dialogue = as_template_reads(dialogue, tokenizer)
        text, spans = _render_spans(dialogue, name, tokenizer, num_prompt)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"the chat template does not take {name}: {error}") from error
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = _token_starts(encoded["offset_mapping"])  # pyright: ignore[reportArgumentType]
    mask = tuple(any(start <= place < end for start, end in spans) for place in starts)
    if not any(mask):
        raise DataError(f"the chat template leaves no token of {name} to the assistant")
    return tuple(encoded["input_ids"]), mask  # pyright: ignore[reportArgumentType]


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.chat_template is None:
        raise DataError(
            "dialogues need a chat template and the tokenizer has none: set `sft.chat_template` to a file "
            "with one, or give {prompt, completion} pairs of strings (questions and answers of public "
            "datasets are such with `data.apply_chat_template=false`)"
        )
    if not tokenizer.is_fast:
        raise DataError(
            "dialogues need a tokenizer that tells where its tokens stand in the text, which "
            f"{type(tokenizer).__name__} does not: take the fast one of this model"
        )


def _render_spans(
    dialogue: Dialogue, name: str, tokenizer: PreTrainedTokenizerBase, num_prompt: int
) -> tuple[str, list[Span]]:
    """The dialogue as text, and from where to where in it the assistant speaks after the prompt."""
    turns = [turn for turn, message in enumerate(dialogue.messages) if message["role"] == ASSISTANT]
    later = [turn for turn in turns if turn >= num_prompt]
    tools = None if dialogue.tools is None else list(dialogue.tools)
    template = tokenizer.get_chat_template(tools=tools)
    if _GENERATION.search(template):
        text, spans = _marked_spans(dialogue, template, tokenizer)
        if not num_prompt:
            return text, spans
        # A turn may have several blocks, or none.
        prompt = replace(dialogue, messages=dialogue.messages[:num_prompt])
        num_before = len(_marked_spans(prompt, template, tokenizer)[1]) if len(later) < len(turns) else 0
        return text, spans[num_before:]
    text = _render(dialogue, tokenizer)
    specials = tuple(special_tokens(tokenizer))
    return text, [_span(dialogue, turn, text, specials, name, tokenizer) for turn in later]


def _marked_spans(
    dialogue: Dialogue, template: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[Span]]:
    """The dialogue as text, and the `{% generation %}` blocks in it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    # Not `apply_chat_template`, which maps the ends of spans to tokens by itself: where a span ends in a
    # space that tokenizers trim from their offsets, it takes all the rest for the assistant's.
    variables: dict[str, Any] = {**tokenizer.special_tokens_map, **dialogue.template_kwargs}
    rendered: Any = render_jinja_template(
        [[dict(message) for message in dialogue.messages]],
        tools=None if dialogue.tools is None else list(dialogue.tools),
        chat_template=template,
        return_assistant_tokens_mask=True,
        **variables,
    )
    (text,), (spans,) = rendered
    return text, spans


def _span(
    dialogue: Dialogue,
    turn: int,
    text: str,
    specials: tuple[str, ...],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
) -> Span:
    """Where the assistant's message number `turn` stands in `text`, the rendering of the whole dialogue."""
    if turn == 0:
        raise DataError(
            f"{name} begins with the assistant; what it answers is needed to tell where it begins: "
            "put a message before it, or `{% generation %}` blocks into the chat template"
        )
    messages = dialogue.messages
    before = _render(replace(dialogue, messages=messages[:turn]), tokenizer, add_generation_prompt=True)
    through = _render(replace(dialogue, messages=messages[: turn + 1]), tokenizer)
    if not (text.startswith(through) and through.startswith(before)):
        raise DataError(
            f"the chat template renders message {turn} of {name} differently once others follow, "
            "so that what the assistant wrote cannot be told from the rest: put `{% generation %}` blocks "
            "into it"
        )
    # Behind the token that ends a turn, templates put white space that no model ever has to write.
    trimmed = through.rstrip()
    has_end = len(trimmed) > len(before) and trimmed.endswith(specials)
    return len(before), len(trimmed if has_end else through)


def _render(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase, **options: bool) -> str:
    rendered = tokenizer.apply_chat_template(
        [dict(message) for message in dialogue.messages],
        tools=None if dialogue.tools is None else list(dialogue.tools),
        tokenize=False,
        **options,
        **dialogue.template_kwargs,
    )
    return str(rendered)


def _token_starts(offsets: Sequence[Span]) -> list[int]:
    """The first character of each token.

    A tokenizer that trims spaces from offsets leaves none to a token of spaces: it is where its last one is.
    """
    return [min(start, end - 1) for start, end in offsets]


# ------------------------------------------------------------- contents that a template can read


def as_template_reads(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> Dialogue:
    """The dialogue with contents and arguments of tool calls in the form that the chat template can read.

    A template that reads strings only gets the text parts of a content joined; one that reads lists of parts
    only, a string as the only part. Arguments of tool calls become a dict, or a JSON string. What a template
    reads, it is asked by rendering such a dialogue with other words; what cannot be told stays as it is.
    """
    _, reads = _reads_of(dialogue, tokenizer)
    readable = [
        _readable(message, contents, reads.arguments)
        for message, contents in zip(dialogue.messages, reads.contents, strict=True)
    ]
    return replace(dialogue, messages=tuple(readable))


def _reads_of(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> tuple[str, _Reads]:
    """The template that renders this dialogue, and what it reads in it."""
    template = tokenizer.get_chat_template(tools=None if dialogue.tools is None else list(dialogue.tools))
    shape = tuple(
        (message["role"], "content" in message, bool(message.get("tool_calls")))
        for message in dialogue.messages
    )
    return template, _what_is_read(template, _specials(tokenizer), shape)


_ANSWER = ("user", True, False), (ASSISTANT, True, False)
_PROBED = (
    _ANSWER,
    (("system", True, False), *_ANSWER),
    (("user", True, False), (ASSISTANT, False, True), ("tool", True, False), (ASSISTANT, True, False)),
    (("user", True, False), (ASSISTANT, True, True), ("tool", True, False), (ASSISTANT, True, False)),
    (("user", True, False), (ASSISTANT, False, True)),
)
"""Shapes of dialogues that tell what a template reads; the first that tells wins."""


def what_template_reads(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, str], str]:
    """What `as_template_reads` makes of dialogues, for who must do it without this module.

    Returns:
        of each role the form of its contents, "text" or "parts", without the roles where that cannot be told
        or is either; and that of tool calls' arguments, "dict" or "json", "" likewise.
    """
    contents: dict[str, str] = {}
    arguments = ""
    for template in _templates(tokenizer):
        for shape in _PROBED:
            reads = _what_is_read(template, _specials(tokenizer), shape)
            for (role, _, _), form in zip(shape, reads.contents, strict=True):
                if form:
                    contents.setdefault(role, form)
            if any(calls for _, _, calls in shape):
                arguments = arguments or reads.arguments
    return contents, arguments


def _templates(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokenizer's templates for dialogues without and with tools; mostly it is one."""
    templates = []
    for tools in (None, [{}]):
        with contextlib.suppress(ValueError):  # a tokenizer with named templates, none of them for this
            templates.append(tokenizer.get_chat_template(tools=tools))
    return list(dict.fromkeys(templates))


def _specials(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, str], ...]:
    named = tokenizer.special_tokens_map.items()
    return tuple((name, text) for name, text in named if isinstance(text, str))


@dataclass(frozen=True, slots=True)
class _Reads:
    """What a template reads in a dialogue of some shape; "" where that cannot be told, or is either.

    contents: of each message, "text" or "parts".
    arguments: of tool calls, "json" or "dict".
    passed_over: of each message, whether the template takes the dialogue and leaves this content out.
    """

    contents: tuple[str, ...]
    arguments: str = ""
    passed_over: tuple[bool, ...] = ()


def _readable(message: Message, contents: str, arguments: str) -> Message:
    changed = dict(message)
    content = message.get("content")
    if contents == "text" and isinstance(content, list):
        changed["content"] = "".join(part["text"] for part in content)
    elif contents == "parts" and isinstance(content, str):
        changed["content"] = [{"type": "text", "text": content}]
    if arguments and message.get("tool_calls"):
        changed["tool_calls"] = [_with_arguments(call, arguments) for call in message["tool_calls"]]
    return changed


def _with_arguments(call: Any, kind: str) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if kind == "json" and isinstance(arguments, Mapping):
        return {**call, "function": {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}}
    if kind == "dict" and isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except json.JSONDecodeError:
            return call
        return {**call, "function": {**function, "arguments": parsed}} if isinstance(parsed, dict) else call
    return call


@lru_cache(maxsize=4096)
def _what_is_read(
    template: str, specials: tuple[tuple[str, str], ...], shape: tuple[tuple[str, bool, bool], ...]
) -> _Reads:
    """What the template reads in a dialogue of these messages.

    shape: of each message its role, whether it has a content, and whether it calls tools.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    def shown(*, parts: bool, arguments: Any) -> str | None:
        messages = [_probe(number, *each, parts, arguments) for number, each in enumerate(shape)]
        try:
            (text,), _ = render_jinja_template([messages], chat_template=template, **dict(specials))  # pyright: ignore[reportArgumentType]
        except (TemplateError, TypeError, ValueError):
            return None
        return text

    as_dict, as_json = {"argument0": "value0"}, '{"argument0": "value0"}'
    with_dict, with_json = shown(parts=False, arguments=as_dict), shown(parts=False, arguments=as_json)
    texts = with_dict if with_dict is not None else with_json
    parts = shown(parts=True, arguments=as_dict if with_dict is not None else as_json)
    contents = tuple(_content_read(texts, parts, f"content{number}.") for number in range(len(shape)))
    # A dict that a template writes as Python has it, and a string that it puts into quotes, are misread.
    reads_dict = with_dict is not None and "argument0" in with_dict and "{'argument0'" not in with_dict
    reads_json = with_json is not None and "argument0" in with_json and '\\"argument0' not in with_json
    rendered = [text for text in (texts, parts) if text is not None]
    passed_over = tuple(
        bool(rendered) and has_content and not any(f"content{number}." in text for text in rendered)
        for number, (_, has_content, _) in enumerate(shape)
    )
    return _Reads(contents, "" if reads_dict == reads_json else "dict" if reads_dict else "json", passed_over)


def _probe(
    number: int, role: str, has_content: bool, calls: bool, parts: bool, arguments: Any
) -> dict[str, Any]:
    text, message = f"content{number}.", dict[str, Any](role=role)
    if has_content:
        message["content"] = [{"type": "text", "text": text}] if parts else text
    identity = "abcdefghi"  # nine letters or digits, as some templates demand
    if calls:
        function = {"name": "name0", "arguments": arguments}
        message["tool_calls"] = [{"type": "function", "id": identity, "function": function}]
    return message | ({"name": "name0", "tool_call_id": identity} if role == "tool" else {})


def _content_read(texts: str | None, parts: str | None, text: str) -> str:
    """Whether a template, given this content as text and as part, shows it only of one of them."""
    of_text = texts is not None and text in texts
    # A template that knows no parts writes the list itself, as Python or JSON has it.
    is_list = parts is not None and re.search(rf"""["']text["']\s*:\s*["']{re.escape(text)}""", parts)
    of_parts = parts is not None and text in parts and not is_list
    return "" if of_text == of_parts else "text" if of_text else "parts"

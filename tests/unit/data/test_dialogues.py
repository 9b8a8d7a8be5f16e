"""Rows to dialogues: tool calls, parts, template variables, and the empty keys of Arrow tables."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import Dataset

from conch.config import TokenizerConfig
from conch.data.chat import dialogue_of, dialogue_of_row, messages_of
from conch.data.formats import judgement_form, prompt_form, rewarded_form, sample_form
from conch.data.multi_turn import tokenize_turns
from conch.data.preferences import PreferencePair, TextEncoder, check_rows, judgements
from conch.data.prompts import make_prompts
from conch.data.samples import tokenize_samples
from conch.data.text import TextCodec
from conch.errors import DataError
from conch.types import Dialogue
from tests.tiny import char_tokenizer

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
ASKED = [{"role": "user", "content": "one and two?"}]
CALLED = [
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": "3"},
    {"role": "assistant", "content": "three"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
# Shows every tool, every key of a message, and a variable; the assistant's turns with and without blocks.
_HEAD = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% if loud %}!{% endif %}"
    "{% for m in messages %}<{{ m.role }}>"
)
_BODY = (
    "{% if m.content is defined %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %} {{ k }}{{ v }}{% endfor %}){% endfor %}."
)
_TAIL = "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
PREFIXED = _HEAD + _BODY + _TAIL
MARKED = (
    _HEAD
    + "{% if m.role == 'assistant' %}{% generation %}"
    + _BODY
    + "{% endgeneration %}{% else %}"
    + _BODY
    + "{% endif %}"
    + _TAIL
)
WHOLE = "[add]!<user>one and two?.<assistant>(add a1 b2).<tool>3.<assistant>three."
LEARNED = ("(add a1 b2).", "three.")


def letters(template: str) -> Any:
    tokenizer = char_tokenizer("abcdefghijklmnopqrstuvwxyzN <>[]().!?:'{},_0123456789")
    tokenizer.chat_template = template
    return tokenizer


def arrow(*rows: Any) -> list[Any]:
    """The rows as a table gives them: with all keys of all of them, None where a row has no value."""
    return list(Dataset.from_list(list(rows)))


def shown(ids: Any, mask: Any, tokenizer: Any) -> tuple[str, tuple[str, ...]]:
    pieces = [str(tokenizer.decode([token])) for token in ids]
    learned = "".join(piece if kept else "\n" for piece, kept in zip(pieces, mask, strict=True))
    return "".join(pieces), tuple(filter(None, learned.split("\n")))


@pytest.mark.parametrize("template", [PREFIXED, MARKED], ids=["by prefixes", "by blocks"])
@pytest.mark.parametrize("as_text", [False, True], ids=["tools", "tools as JSON"])
@pytest.mark.parametrize("in_table", [False, True], ids=["as written", "from a table"])
def test_tool_calls_tools_and_variables_reach_the_template(
    template: str, as_text: bool, in_table: bool
) -> None:
    row: dict[str, Any] = {
        "messages": ASKED + CALLED,
        "tools": json.dumps(TOOLS) if as_text else TOOLS,
        "chat_template_kwargs": {"loud": True},
    }
    if in_table:
        row = arrow(row, {"messages": ASKED, "chat_template_kwargs": {"quiet": 1}})[0]
        assert row["messages"][0]["tool_calls"] is None
    tokenizer = letters(template)
    (sample,) = tokenize_samples([row], TextCodec(tokenizer), max_tokens=None, truncation_side="left")
    assert shown(sample.token_ids, sample.loss_mask, tokenizer) == (WHOLE, LEARNED)
    (turn,), _ = tokenize_turns([row], TextCodec(tokenizer))
    assert shown(turn.token_ids, turn.loss_mask, tokenizer) == (WHOLE, LEARNED)


@pytest.mark.parametrize("template", [PREFIXED, MARKED], ids=["by prefixes", "by blocks"])
def test_a_template_for_tools_renders_the_dialogues_that_have_some(template: str) -> None:
    tokenizer = letters(template)
    without = "{% generation %}{% endgeneration %}{{ raise_exception('no tools here') }}"
    tokenizer.chat_template = {"default": without, "tool_use": template}
    row = {"messages": ASKED + CALLED, "tools": TOOLS}
    (sample,) = tokenize_samples([row], TextCodec(tokenizer), max_tokens=None, truncation_side="left")
    assert shown(sample.token_ids, sample.loss_mask, tokenizer) == (WHOLE.replace("!", "", 1), LEARNED)


def test_prompts_are_rendered_with_their_tools_and_keep_only_other_keys() -> None:
    row = {"prompt": ASKED, "tools": TOOLS, "chat_template_kwargs": {"loud": True}, "answer": "3"}
    (prompt,) = make_prompts(
        [prompt_form(row)], TextCodec(letters(PREFIXED)), TokenizerConfig(), max_tokens=None
    )
    assert prompt.text == "[add]!<user>one and two?.<assistant>"
    assert dict(prompt.metadata) == {"answer": "3"}
    assert prompt.dialogue == Dialogue(tuple(ASKED), tuple(TOOLS), {"loud": True})


def test_tools_beside_a_prompt_that_is_text_are_metadata() -> None:
    (prompt,) = make_prompts(
        [{"prompt": "abc", "tools": TOOLS}], TextCodec(letters(PREFIXED)), TokenizerConfig(), max_tokens=None
    )
    assert (prompt.text, dict(prompt.metadata)) == ("abc", {"tools": TOOLS})


def test_preferences_keep_their_tools() -> None:
    row = {"prompt": ASKED, "chosen": CALLED, "rejected": CALLED[2:], "tools": TOOLS}
    tokenizer = letters(PREFIXED)
    rows = judgements([row])
    (pair,) = TextEncoder(tokenizer, "{text}", None).encode_rows(rows, check_rows(rows))
    assert isinstance(pair, PreferencePair)
    assert tokenizer.decode(pair.chosen) == WHOLE.replace("!", "", 1)
    assert tokenizer.decode(pair.rejected) == "[add]<user>one and two?.<assistant>three."
    assert sample_form(row) == {"prompt": ASKED, "completion": CALLED, "tools": TOOLS}
    assert rewarded_form(row)[1] == ({"prompt": ASKED, "completion": CALLED[2:], "tools": TOOLS}, -1.0)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": 3, "content": "a"},
        {"content": "a"},
        {"role": "user", "content": [{"type": "image", "url": "a"}]},
        {"role": "user", "content": 3},
        "user: a",
    ],
)
def test_what_is_no_message_makes_no_dialogue(message: Any) -> None:
    assert messages_of([*ASKED, message]) is None
    assert dialogue_of_row({"prompt": [*ASKED, message]}, "prompt") is None


def test_messages_lose_keys_without_a_value_at_any_depth() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "unit": None}}}
    messages = [{"role": "assistant", "content": None, "name": None, "tool_calls": [call]}]
    made = dialogue_of({"messages": messages})
    assert made is not None
    cleaned = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert made == (Dialogue(({"role": "assistant", "tool_calls": [cleaned]},)), 0)
    assert messages[0]["content"] is None, "the row itself stays as it was"


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"tools": "[{]"}, 'has "tools" that are no JSON'),
        ({"tools": {"name": "add"}}, 'has "tools" that are no list of JSON schemas'),
        ({"tools": ["add"]}, 'has "tools" that are no list of JSON schemas'),
        ({"chat_template_kwargs": "loud"}, 'has "chat_template_kwargs" that are no JSON'),
        ({"chat_template_kwargs": ["loud"]}, 'has "chat_template_kwargs" that are no dict'),
        ({"chat_template_kwargs": {"tokenize": True}}, "that are not for the template: tokenize"),
    ],
)
def test_tools_and_variables_of_another_kind_are_refused_with_the_row(keys: Any, reason: str) -> None:
    forms = [
        (prompt_form, {"prompt": ASKED}),
        (sample_form, {"messages": ASKED + CALLED}),
        (sample_form, {"prompt": ASKED, "completion": CALLED}),
        (judgement_form, {"prompt": ASKED, "chosen": CALLED, "rejected": CALLED[2:]}),
        (rewarded_form, {"prompt": ASKED, "chosen": CALLED, "rejected": CALLED[2:]}),
    ]
    for form, row in forms:
        with pytest.raises(DataError) as caught:
            form({**row, **keys})
        assert reason in str(caught.value)
        assert str(caught.value).startswith("has ")


# As families have them: Qwen2.5 writes contents as they are and calls by `tojson`, DeepSeek
# takes arguments for a string, Gemma 3 reads both kinds of content, Llava lists of parts alone.
STRINGS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is defined %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}({{ c.function.arguments | tojson }}){% endfor %}.{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONCATENATED = STRINGS.replace("{{ m.content }}", "{{ '' + m.content }}").replace(
    "c.function.arguments | tojson", "'=' + c.function.arguments"
)
EITHER = STRINGS.replace(
    "{{ m.content }}",
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text | trim }}{% endfor %}{% endif %}",
)
PARTS = STRINGS.replace(
    "{{ m.content }}", "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
)


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("template", "content", "text"),
    [
        (STRINGS, "a b", "a b"),
        (STRINGS, parts("a ", "b"), "a b"),
        (CONCATENATED, parts("a ", "b"), "a b"),
        (EITHER, "a b", "a b"),
        (EITHER, parts("a ", "b"), "ab"),
        (PARTS, "a b", "a b"),
        (PARTS, parts("a ", "b"), "a b"),
    ],
)
def test_contents_reach_the_template_in_the_form_that_it_reads(
    template: str, content: Any, text: str
) -> None:
    row = {"prompt": [{"role": "user", "content": content}, *CALLED[2:], *ASKED]}
    (prompt,) = make_prompts([row], TextCodec(letters(template)), TokenizerConfig(), max_tokens=None)
    assert prompt.text == f"<user>{text}.<assistant>three.<user>one and two?.<assistant>"


# Refuses a message that both speaks and calls, as Mistral's does.
STRICT = STRINGS.replace(
    "<{{ m.role }}>",
    "<{{ m.role }}>{% if m.tool_calls and m.content is defined %}{{ raise_exception('both') }}{% endif %}",
)


@pytest.mark.parametrize(
    ("template", "shown"),
    [(STRICT, '({"a": 1, "b": 2})'), (STRINGS, '({"a": 1, "b": 2})'), (CONCATENATED, '(={"a": 1, "b": 2})')],
)
@pytest.mark.parametrize("as_text", [False, True], ids=["dict", "JSON"])
def test_arguments_of_calls_reach_the_template_in_the_form_that_it_reads(
    template: str, shown: str, as_text: bool
) -> None:
    arguments = json.dumps({"a": 1, "b": 2}) if as_text else {"a": 1, "b": 2}
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    row = {"prompt": [*ASKED, {"role": "assistant", "tool_calls": [call]}, CALLED[1]]}
    (prompt,) = make_prompts([row], TextCodec(letters(template)), TokenizerConfig(), max_tokens=None)
    assert prompt.text == f"<user>one and two?.<assistant>{shown}.<tool>3.<assistant>"


def test_a_content_that_no_template_reads_is_refused_by_the_template() -> None:
    refusing = "{{ raise_exception('text only') }}"
    with pytest.raises(DataError, match="does not take prompt 0: text only"):
        make_prompts(
            [{"prompt": [{"role": "user", "content": parts("a")}]}],
            TextCodec(letters(refusing)),
            TokenizerConfig(),
            max_tokens=None,
        )

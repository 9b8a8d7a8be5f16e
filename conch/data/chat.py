"""Dialogues become token ids, with a mask of what the assistant wrote.

A dialogue is rendered by the tokenizer's chat template. What is the assistant's is what the template marks
by `{% generation %}` blocks; in a template without them, what stands between the rendering of all messages
before an answer, opened for that answer, and the rendering that includes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from conch.errors import DataError
from conch.types import ASSISTANT

Message = Mapping[str, Any]
Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def messages_of(sample: Any) -> list[Message] | None:
    """The messages of a dialogue, `{"messages": [...]}` or the list itself; None where it is no dialogue.

    A message is a dict of strings "role" and "content"; what else it holds is for the template.
    """
    messages = sample.get("messages") if isinstance(sample, Mapping) else sample
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return None
    is_dialogue = all(
        isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in messages
    )
    return list(messages) if is_dialogue else None


def dialogue_of(sample: Any) -> tuple[list[Message], int] | None:
    """The messages of a dialogue, or of {"prompt", "completion"} that are both dialogues, and how many of
    them are prompt; None for anything else."""
    messages = messages_of(sample)
    if messages is not None:
        return messages, 0
    if not isinstance(sample, Mapping):
        return None
    prompt, completion = (messages_of(sample.get(key)) for key in ("prompt", "completion"))
    return None if prompt is None or completion is None else ([*prompt, *completion], len(prompt))


def render_prompt(messages: Sequence[Message], name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A dialogue as the text that an answer follows; where the assistant spoke last, its turn goes on.

    name: of the prompt, for messages.

    Raises:
        DataError: the tokenizer has no chat template, or the template refuses the dialogue.
    """
    goes_on = messages[-1]["role"] == ASSISTANT
    option = "continue_final_message" if goes_on else "add_generation_prompt"
    return _rendered(messages, name, tokenizer, **{option: True})


def render_dialogue(messages: Sequence[Message], name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A whole dialogue as text.

    name: of the text, for messages.

    Raises:
        DataError: the tokenizer has no chat template, or the template refuses the dialogue.
    """
    return _rendered(messages, name, tokenizer)


def _rendered(
    messages: Sequence[Message], name: str, tokenizer: PreTrainedTokenizerBase, **options: bool
) -> str:
    if tokenizer.chat_template is None:
        raise DataError(
            f"{name} is a dialogue, and the tokenizer has no chat template: give it one, or texts"
        )
    try:
        return _render(messages, tokenizer, **options)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"the chat template does not take {name}: {error}") from error


def encode_dialogue(
    messages: Sequence[Message], index: int, tokenizer: PreTrainedTokenizerBase, *, num_prompt: int = 0
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Token ids, and a mask that is True where the assistant wrote them, the end of its turn included.

    index: the sample's number, for messages.
    num_prompt: messages at the beginning of which nothing is the assistant's, whoever wrote them.

    Raises:
        DataError: the tokenizer has no chat template or tells no offsets, the template refuses the dialogue
            or renders a message differently once others follow, or nothing in it is the assistant's.
    """
    _check_tokenizer(tokenizer)
    if not any(message["role"] == ASSISTANT for message in messages[num_prompt:]):
        raise DataError(f'dialogue {index} has no message with the role "{ASSISTANT}": nothing to learn')
    try:
        text, spans = _render_spans(messages, index, tokenizer, num_prompt)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"the chat template does not take dialogue {index}: {error}") from error
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = _token_starts(encoded["offset_mapping"])  # pyright: ignore[reportArgumentType]
    mask = tuple(any(start <= place < end for start, end in spans) for place in starts)
    if not any(mask):
        raise DataError(f"the chat template leaves no token of dialogue {index} to the assistant")
    return tuple(encoded["input_ids"]), mask  # pyright: ignore[reportArgumentType]


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.chat_template is None:
        raise DataError(
            "dialogues need a chat template and the tokenizer has none: set `sft.chat_template` to a file "
            "with one, or give {prompt, completion} pairs"
        )
    if not tokenizer.is_fast:
        raise DataError(
            "dialogues need a tokenizer that tells where its tokens stand in the text, which "
            f"{type(tokenizer).__name__} does not: take the fast one of this model"
        )


def _render_spans(
    messages: Sequence[Message], index: int, tokenizer: PreTrainedTokenizerBase, num_prompt: int
) -> tuple[str, list[Span]]:
    """The dialogue as text, and from where to where in it the assistant speaks after the prompt."""
    turns = [turn for turn, message in enumerate(messages) if message["role"] == ASSISTANT]
    later = [turn for turn in turns if turn >= num_prompt]
    template = tokenizer.get_chat_template()
    if _GENERATION.search(template):
        # Not `apply_chat_template`, which maps the ends of spans to tokens by itself: where a span ends in a
        # space that tokenizers trim from their offsets, it takes all the rest for the assistant's.
        options: dict[str, Any] = {**tokenizer.special_tokens_map, "return_assistant_tokens_mask": True}
        rendered: Any = render_jinja_template([list(messages)], chat_template=template, **options)  # pyright: ignore[reportArgumentType]
        (text,), (spans,) = rendered
        return text, spans[len(turns) - len(later) :]
    text = _render(messages, tokenizer)
    specials = tuple(
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content
    )
    return text, [_span(messages, turn, text, specials, index, tokenizer) for turn in later]


def _span(
    messages: Sequence[Message],
    turn: int,
    text: str,
    specials: tuple[str, ...],
    index: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Span:
    """Where the assistant's message number `turn` stands in `text`, the rendering of the whole dialogue."""
    if turn == 0:
        raise DataError(
            f"dialogue {index} begins with the assistant; what it answers is needed to tell where it begins: "
            "put a message before it, or `{% generation %}` blocks into the chat template"
        )
    before = _render(messages[:turn], tokenizer, add_generation_prompt=True)
    through = _render(messages[: turn + 1], tokenizer)
    if not (text.startswith(through) and through.startswith(before)):
        raise DataError(
            f"the chat template renders message {turn} of dialogue {index} differently once others follow, "
            "so that what the assistant wrote cannot be told from the rest: put `{% generation %}` blocks "
            "into it"
        )
    # Behind the token that ends a turn, templates put white space that no model ever has to write.
    trimmed = through.rstrip()
    has_end = len(trimmed) > len(before) and trimmed.endswith(specials)
    return len(before), len(trimmed if has_end else through)


def _render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, **options: bool) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))  # pyright: ignore[reportArgumentType]


def _token_starts(offsets: Sequence[Span]) -> list[int]:
    """The first character of each token.

    A tokenizer that trims spaces from offsets leaves none to a token of spaces: it is where its last one is.
    """
    return [min(start, end - 1) for start, end in offsets]

"""What a model must read of a text or a dialogue: template, special tokens, steps and cut, for one sample.

The rules of `triton_models/encoding.py`, written a second time; the code shares nothing with it. Dialogues
are rendered as training renders them, by `conch.data.chat`.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conch.converters.checkpoints.reader import RewardCheckpoint
from conch.converters.checkpoints.tokenizer import CLOSED_CHAT
from conch.data.chat import render_dialogue
from conch.errors import ConversionError, first_line
from conch.store.manifest import AddSpecialTokens
from conch.types import ASSISTANT, Dialogue

PAIR = "pair"
"""Template of models that read a prompt and an answer as a pair of sentences."""

Messages = list[dict[str, Any]]

_ROLES = (("user", ASSISTANT), ("system", "user", ASSISTANT), ("user", ASSISTANT) * 2)


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample and the tokens that the model must read of it.

    text: what a client sends in the text form, "" in the token form.
    ids: what the model must read; () for a sample that the server must refuse.
    ends: how much of what the client sent lies before the end of each token, None for a token that the client
        did not send; () where samples only are scored.
    separators: where steps end, of dialogues and of steps that are encoded apart; None where the ids tell.
    types: which sentence each token belongs to, of a pair; () elsewhere.
    """

    text: str
    ids: tuple[int, ...]
    ends: tuple[int | None, ...] = ()
    separators: tuple[int, ...] | None = None
    types: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[int, ...]:
        """All that the score depends on, in numbers."""
        if self.separators is None and not self.types:
            return self.ids
        return (*self.ids, -1, *(self.separators or ()), -1, *self.types)


@dataclass(frozen=True, slots=True)
class Shape:
    """Roles of a dialogue's messages, () for a text, and whether contents are lists of parts."""

    roles: tuple[str, ...] = ()
    in_parts: bool = False


@dataclass(slots=True)
class _Tokens:
    """Tokens on their way into a sample.

    ids: the tokens.
    ends: see `Sample.ends`; () where samples only are scored.
    steps: which of the tokens end a step, where that is known before the cut.
    """

    ids: list[int]
    ends: list[int | None]
    steps: list[bool]

    def __add__(self, other: _Tokens) -> _Tokens:
        return _Tokens(self.ids + other.ids, self.ends + other.ends, self.steps + other.steps)

    def __getitem__(self, where: slice) -> _Tokens:
        return _Tokens(self.ids[where], self.ends[where], self.steps[where])


def _plain(ids: Sequence[int]) -> _Tokens:
    return _Tokens(list(ids), [None] * len(ids), [False] * len(ids))


class TextInputs:
    """Reads texts."""

    shapes: tuple[Shape, ...] = (Shape(),)
    default_mode: AddSpecialTokens = "once"

    def __init__(self, checkpoint: RewardCheckpoint) -> None:
        self._rules = checkpoint.rules
        self._tokenizer = checkpoint.tokenizer
        self._is_dense = checkpoint.rules.granularity != "sample"
        self._mode = checkpoint.rules.add_special_tokens or self.default_mode

    def sample(self, text: str, shape: Shape) -> Sample:
        """Return a text as a client sends it, and what is read of it."""
        tokens, head, tail = self._tokens(text)
        tokens = self._closed(tokens, head, tail)
        ends = tuple(tokens.ends) if self._is_dense else ()
        places = tuple(place for place, is_end in enumerate(tokens.steps) if is_end)
        return Sample(text, tuple(tokens.ids), ends, places if self._rules.steps_apart else None)

    def length(self, text: str, shape: Shape) -> int:
        """Return the tokens of the sample before it is cut."""
        return len(self._tokens(text)[0].ids)

    def _tokens(self, text: str) -> tuple[_Tokens, int, int]:
        """Tokenise a text in the template; and how many tokens at the ends stay whatever is cut."""
        rules, eos = self._rules, self._tokenizer.eos_token or ""
        before, after = (part.format(eos=eos) for part in rules.template.split("{text}"))
        pieces = [before, *self._pieces(text, after)] if rules.steps_apart else None
        tokens, head, tail = self._framed(pieces, before + text + after)
        if self._is_dense:
            moved = [end if end is None else end - len(before) for end in tokens.ends]
            tokens.ends = [end if end is not None and 0 < end <= len(text) else None for end in moved]
        tokens = self._once(tokens)
        last = tokens.ids[: len(tokens.ids) - tail][-1:]
        closes = rules.template.endswith("{eos}") and last == [self._tokenizer.eos_token_id]
        return tokens, head, tail + closes

    def _pieces(self, text: str, after: str) -> list[str]:
        """Return steps and, between them, separators; the last step has the template's end."""
        assert self._rules.step_separator is not None
        *pieces, last = re.split(f"({re.escape(self._rules.step_separator)})", text)
        return [*pieces, last + after]

    def _framed(self, pieces: list[str] | None, text: str) -> tuple[_Tokens, int, int]:
        """Tokenise a text, whole or in pieces, of which every other one from the third on is a separator.

        Returns:
            the tokens, and how many of them the tokenizer added before and behind.
        """
        tokens, start = _Tokens([], [], []), 0
        for number, piece in enumerate([text] if pieces is None else pieces):
            encoded = self._tokenizer(piece, add_special_tokens=False, verbose=False)
            ids = encoded.input_ids
            spans = [encoded.token_to_chars(index) for index in range(len(ids))] if self._is_dense else []
            ends = [start + span.end if span else None for span in spans] or [None] * len(ids)
            is_separator = number >= 2 and number % 2 == 0
            steps = [is_separator and index == len(ids) - 1 for index in range(len(ids))]
            tokens += _Tokens(list(ids), ends, steps)
            start += len(piece)
        if self._mode == "never":
            return tokens, 0, 0
        head, tail = self._frame
        return _plain(head) + tokens + _plain(tail), len(head), len(tail)

    @functools.cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """Return what the tokenizer puts before and behind any text."""
        special = set(self._tokenizer("").input_ids)
        words = (token for token in self._tokenizer.get_vocab().values() if token not in special)
        for word in itertools.islice(words, 1000):
            text = self._tokenizer.decode([word])
            plain = self._tokenizer(text, add_special_tokens=False).input_ids
            full = self._tokenizer(text).input_ids
            if plain and not special & set(plain):
                starts = [k for k in range(len(full)) if full[k : k + len(plain)] == plain]
                return full[: starts[0]], full[starts[0] + len(plain) :]
        return self._tokenizer("").input_ids, []

    def _once(self, tokens: _Tokens) -> _Tokens:
        """Leave one bos at the beginning and one eos at the end."""
        if self._mode != "once":
            return tokens
        while len(tokens.ids) > 1 and tokens.ids[0] == tokens.ids[1] == self._tokenizer.bos_token_id:
            tokens = tokens[1:]
        while len(tokens.ids) > 1 and tokens.ids[-1] == tokens.ids[-2] == self._tokenizer.eos_token_id:
            tokens = tokens[:-1]
        return tokens

    def _closed(self, tokens: _Tokens, head: int, tail: int) -> _Tokens:
        """End in the closing token; what is too long goes between `head` and `tail` tokens at the ends."""
        closing, limit = self._rules.closing_token_id, self._rules.max_length
        if closing is not None and tokens.ids[-1:] != [closing]:
            tokens, tail = tokens + _plain([closing]), tail + 1
        elif closing is not None:
            tail = max(1, tail)
        end = len(tokens.ids) - tail
        body, room = tokens[head:end], max(0, limit - head - tail)
        if len(tokens.ids) > limit:
            kept = body[len(body.ids) - room :] if self._tokenizer.truncation_side == "left" else body[:room]
            tokens = (tokens[:head] + kept + tokens[end:])[-limit:]
        return self._once(tokens)


class DialogueInputs(TextInputs):
    """Reads dialogues that hold a text.

    shapes: those of dialogues that the template takes.

    Raises:
        ConversionError: it takes none.
    """

    default_mode: AddSpecialTokens = "never"

    def __init__(self, checkpoint: RewardCheckpoint) -> None:
        super().__init__(checkpoint)
        self._is_closed = checkpoint.rules.template == CLOSED_CHAT
        added = checkpoint.tokenizer.added_tokens_decoder.items()
        self._special = {token for token, word in added if word.special}
        taken, refusal = [], ""
        for shape in itertools.starmap(Shape, itertools.product(_ROLES, (False, True))):
            try:
                self._read(dialogue("abcd", shape))
                taken.append(shape)
            except Exception as error:  # templates raise their own kinds
                refusal = first_line(error)
        if not taken:
            raise ConversionError(
                f"the chat template of {checkpoint.source} takes no dialogue of user and assistant "
                f"({refusal}): correct the template in the checkpoint's folder, or serve texts "
                "with --template '{text}'"
            )
        self.shapes = tuple(taken)

    def sample(self, text: str, shape: Shape) -> Sample:
        """Return a dialogue with the text in it as a client sends it, and what is read of it."""
        return self.sample_of(dialogue(text, shape))

    def sample_of(self, messages: Messages) -> Sample:
        """Return messages as a client sends them, and what is read of them."""
        try:
            tokens, head, tail = self._read(messages)
        except Exception:  # for example a template that refuses a message without content
            return Sample(sent(messages), ())
        tokens = self._closed(tokens, head, tail)
        places = [place for place, is_end in enumerate(tokens.steps) if is_end] or [len(tokens.ids) - 1]
        reads_steps = self._rules.pooling == "steps"
        return Sample(sent(messages), tuple(tokens.ids), separators=tuple(places) if reads_steps else None)

    def length(self, text: str, shape: Shape) -> int:
        """Return the tokens of the dialogue before it is cut; 0 where the template refuses it."""
        try:
            return len(self._read(dialogue(text, shape))[0].ids)
        except Exception:
            return 0

    def _read(self, messages: Messages) -> tuple[_Tokens, int, int]:
        """Tokenise messages; and how many tokens at the ends stay whatever is cut."""
        rules = self._rules
        if rules.pooling == "steps":
            tokens, head, tail = self._read_steps(messages)
        else:
            tokens, head, tail = self._framed(None, self._rendered(messages))
        tokens, eos = self._once(tokens), self._tokenizer.eos_token_id
        if self._is_closed and tokens.ids[-1:] != [eos]:
            tokens += _plain([eos])
        return tokens, head, max(tail, 1 if tokens.ids[-1:] == [eos] else 0)

    def _read_steps(self, messages: Messages) -> tuple[_Tokens, int, int]:
        """Tokenise messages of which the last one is an answer of several steps."""
        rules, answer = self._rules, _text_in(messages[-1])
        assert rules.step_separator is not None
        if rules.step_delimiter:
            answer = rules.step_separator.join(answer.split(rules.step_delimiter))
        if not answer.endswith(rules.step_separator):
            answer = answer + rules.step_separator
        whole, *others = (
            self._rendered([*messages[:-1], {**messages[-1], "content": content}])
            for content in (answer, "a", "1", "x")
        )
        if rules.steps_apart:
            start = min(len(_common_beginning(whole, other)) for other in others)
            return self._framed([whole[:start], *self._pieces(whole[start:], "")], whole)
        tokens, head, tail = self._framed(None, whole)
        begun = (_common_beginning(tokens.ids, self._framed(None, other)[0].ids) for other in others)
        start = min(map(len, begun))
        for place in places_of(rules.separator_ids or (rules.separator_id,), tokens.ids[start:]):
            tokens.steps[start + place] = True
        return tokens, head, tail

    def _rendered(self, messages: Messages) -> str:
        text = render_dialogue(Dialogue(tuple(messages)), "the sample", self._tokenizer)
        if not self._is_closed:
            return text
        # White space behind the token that ends the last turn is nothing that the model was trained on.
        end = len(text) - len(text.rstrip())
        ids = self._tokenizer(text[: len(text) - end], add_special_tokens=False, verbose=False).input_ids
        return text[: len(text) - end] if ids and ids[-1] in self._special else text


class PairInputs(DialogueInputs):
    """Reads dialogues as a pair of sentences, the prompt and the answer."""

    default_mode: AddSpecialTokens = "once"

    def _read(self, messages: Messages) -> tuple[_Tokens, int, int]:
        prompt, answer = self._sentences(messages)
        whole = self._tokenizer(prompt, answer, verbose=False, add_special_tokens=self._mode != "never")
        return _plain(whole.input_ids), 0, 0

    def sample_of(self, messages: Messages) -> Sample:
        """Return messages as a client sends them, and what is read of them."""
        limit, closing = self._rules.max_length, self._rules.closing_token_id
        try:
            sentences = self._sentences(messages)
        except Exception:
            return Sample(sent(messages), ())
        settings = {"truncation": True, "verbose": False, "add_special_tokens": self._mode != "never"}
        pair = self._tokenizer(*sentences, max_length=limit, **settings)
        closes = closing is not None and pair.input_ids[-1:] != [closing]
        if closes:
            pair = self._tokenizer(*sentences, max_length=limit - 1, **settings)
        types = list(pair["token_type_ids"]) if "token_type_ids" in pair else []
        ids = [*pair.input_ids, *([closing] if closing is not None and closes else [])]
        return Sample(sent(messages), tuple(ids), types=tuple(types + types[-1:] * closes))

    def _sentences(self, messages: Messages) -> tuple[str, str]:
        *before, answer = messages
        if self._tokenizer.chat_template:
            return self._rendered(before), _text_in(answer)
        return "\n".join(map(_text_in, before)), _text_in(answer)


def inputs_of(checkpoint: RewardCheckpoint) -> TextInputs:
    """Return what makes samples of the kind that the checkpoint reads."""
    if checkpoint.rules.template == PAIR:
        return PairInputs(checkpoint)
    return DialogueInputs(checkpoint) if checkpoint.rules.reads == "dialogues" else TextInputs(checkpoint)


def places_of(separator: Sequence[int | None], ids: Sequence[int]) -> list[int]:
    """Return where separators end, the earliest first, none inside another."""
    size, found, next_start = len(separator), [], 0
    for start in range(len(ids) - size + 1):
        if start >= next_start and tuple(ids[start : start + size]) == tuple(separator):
            found.append(start + size - 1)
            next_start = start + size
    return found


def dialogue(text: str, shape: Shape) -> Messages:
    """Return messages of this shape that have the text among them."""
    spans = itertools.pairwise(_cuts(text, len(shape.roles)))
    contents: list[Any] = [text[a:b] for a, b in spans]
    if shape.in_parts:
        contents = [_in_two_parts(content) for content in contents]
    return [{"role": role, "content": content} for role, content in zip(shape.roles, contents, strict=True)]


def sent(messages: Messages) -> str:
    """Return what a client sends: the list; where it begins with a system message, an object around it."""
    begins_with_system = messages[0]["role"] == "system"
    return json.dumps({"messages": messages} if begins_with_system else messages, ensure_ascii=False)


def _common_beginning(first: Sequence[Any], second: Sequence[Any]) -> Sequence[Any]:
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return first[:length]


def _text_in(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _in_two_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text[a:b]} for a, b in itertools.pairwise(_cuts(text, 2))]


def _cuts(text: str, pieces: int) -> list[int]:
    return [len(text) * index // pieces for index in range(pieces + 1)]

"""The samples on which a converted model is compared with the original.

Every length up to the limit (for long windows a ladder of lengths), batches of 1, 2, 7 and 32, text that the
tokenizer never saw, nothing at all, too much, and for the token form padding on either side. A model that
reads dialogues gets all that in dialogues of one and of several turns, with a system message where its
template takes one, with contents as strings and as lists of parts.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conch.converters.checkpoints.reader import RewardCheckpoint
from conch.converters.checkpoints.tokenizer import CLOSED_CHAT
from conch.converters.parity.subprocess_model import Request
from conch.data.chat import render_dialogue
from conch.errors import ConversionError, first_line
from conch.log import progress
from conch.triton.contract import Form
from conch.types import Dialogue

_ALL_LENGTHS_UP_TO = 16
_BATCH_SIZES = (1, 2, 7, 32)
_ROLES = (("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant") * 2)
_ODD_TEXTS = ("Ünïcödé, 漢字, 🙂🙃, עברית", "\x00\ttab\r\nline", "{text}{eos}", " " * 7)


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample and the tokens that the model must read of it.

    text: what a client sends in the text form, "" in the token form.
    ids: what the model must read; () for a sample that the server must refuse.
    ends: how much of what the client sent lies before the end of each token, None for a token that the client
        did not send; () where samples only are scored.
    """

    text: str
    ids: tuple[int, ...]
    ends: tuple[int | None, ...] = ()


Token = tuple[int, int | None]
"""An id, and its entry of `Sample.ends`."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """Roles of a dialogue's messages, () for a text, and whether contents are lists of parts."""

    roles: tuple[str, ...] = ()
    in_parts: bool = False


@dataclass(frozen=True, slots=True)
class ParityCase:
    """The samples of one request.

    name: line of the report; cases of one name share a line.
    left_padded: whether padding stands on the left; token form only.
    """

    name: str
    samples: tuple[Sample, ...]
    left_padded: bool = False


def build_cases(checkpoint: RewardCheckpoint, form: Form, *, max_batch_size: int) -> list[ParityCase]:
    """Build the cases for one model; the same at every call."""
    samples = _TextSamples(checkpoint) if form == "text" else _TokenSamples(checkpoint)
    lengths = progress(_lengths(checkpoint.longest_compared), desc="making samples")
    by_length = [samples.of_length(length) for length in lengths]
    mixed = [by_length[index % len(by_length)] for index in range(max(_BATCH_SIZES))]
    random.Random(1).shuffle(mixed)
    alone = f"alone, {len(by_length[0].ids)} to {len(by_length[-1].ids)} tokens"
    cases = [ParityCase(alone, (sample,)) for sample in by_length]
    for size in _BATCH_SIZES:
        if size <= max_batch_size:
            cases.append(ParityCase(f"batch of {size}", tuple(mixed[:size])))
    cases.append(ParityCase("same, other order", tuple(reversed(mixed[: min(32, max_batch_size)]))))
    cases.extend(samples.special_cases())
    if form == "token":
        cases.append(
            ParityCase("padded on the left", tuple(mixed[: min(7, max_batch_size)]), left_padded=True)
        )
    return cases


def requests_of(cases: Sequence[ParityCase], form: Form, pad_token_id: int) -> list[Request]:
    """Build what a client would send for each case."""
    if form == "text":
        return [{"texts": [sample.text for sample in case.samples]} for case in cases]
    return [_token_request(case, pad_token_id) for case in cases]


def dialogue_sample(checkpoint: RewardCheckpoint, messages: list[dict[str, Any]]) -> Sample:
    """Build the sample of a dialogue; without ids where the chat template refuses it."""
    return Sample(_sent(messages), tuple(_Dialogues(checkpoint).encode(messages)))


class _TextSamples:
    """Builds texts, or dialogues that hold them, with the ids that template and truncation must give."""

    def __init__(self, checkpoint: RewardCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._tokenizer = checkpoint.tokenizer
        self._tokens = _RandomTokens(checkpoint)
        self._is_dense = checkpoint.rules.granularity != "sample"
        reads_dialogues = checkpoint.rules.reads == "dialogues"
        self._dialogues = _Dialogues(checkpoint) if reads_dialogues else None
        self._shapes = itertools.cycle(self._dialogues.shapes if self._dialogues else (_Shape(),))

    def of_length(self, length: int) -> Sample:
        """Build a sample of `length` tokens, or as near as decoding and encoding again comes."""
        shape = next(self._shapes)
        return self._sample(self._text(length, shape), shape)

    def special_cases(self) -> list[ParityCase]:
        """Build texts that break careless code."""
        shape, rules = next(self._shapes), self._checkpoint.rules
        bos, eos = self._tokenizer.bos_token or "", self._tokenizer.eos_token or ""
        cases = [
            *(ParityCase("odd text", (self._sample(text, shape),)) for text in _ODD_TEXTS),
            ParityCase("empty text", (self._sample("", shape),)),
        ]
        texts = {"eos inside the text": f"{self._text(3, shape)}{eos}{self._text(3, shape)}"} if eos else {}
        if bos or eos:
            texts["bos before the text, eos behind it"] = f"{bos}{self._text(5, shape)}{eos}"
        cases.extend(ParityCase(name, (self._sample(text, shape),)) for name, text in texts.items())
        if self._checkpoint.longest_compared == rules.max_length:
            too_long = self._sample(self._text(2 * rules.max_length + 5, shape), shape)
            cases.append(ParityCase("too long, cut", (too_long,)))
            cases.append(ParityCase("too long and short together", (too_long, self.of_length(2))))
        no_dialogues = ("no JSON", '{"role": "user"}', "[]") if self._dialogues else ()
        cases.extend(ParityCase("no messages, refused", (Sample(text, ()),)) for text in no_dialogues)
        return cases

    def _text(self, length: int, shape: _Shape) -> str:
        """Return the longest start of a random text of which a sample has `length` tokens or less.

        Random tokens do not come back as the same number of tokens: a tokenizer joins some and splits others.
        """
        text = self._tokenizer.decode(self._tokens.take(3 * length))
        low, high = 0, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            if len(self._encode(text[:middle], shape)) <= length:
                low = middle
            else:
                high = middle - 1
        return text[:low]

    def _encode(self, text: str, shape: _Shape) -> list[Token]:
        if self._dialogues:
            return [(token, None) for token in self._dialogues.encode(_dialogue(text, shape))]
        eos = self._tokenizer.eos_token or ""
        formatted = self._checkpoint.rules.template.format(text=text, eos=eos)
        encoded = self._tokenizer(formatted, verbose=False)
        ids = encoded.input_ids
        if not self._is_dense:
            return _once([(token, None) for token in ids], self._tokenizer)
        start = len(self._checkpoint.rules.template.split("{text}")[0].format(eos=eos))
        spans = [encoded.token_to_chars(index) for index in range(len(ids))]
        ends = [span.end - start if span else 0 for span in spans]
        tokens = [
            (token, end if 0 < end <= len(text) else None) for token, end in zip(ids, ends, strict=True)
        ]
        return _once(tokens, self._tokenizer)

    def _sample(self, text: str, shape: _Shape) -> Sample:
        sent = _sent(_dialogue(text, shape)) if self._dialogues else text
        tokens = self._cut(self._encode(text, shape))
        ends = tuple(end for _, end in tokens) if self._is_dense else ()
        return Sample(sent, tuple(token for token, _ in tokens), ends)

    def _cut(self, tokens: list[Token]) -> list[Token]:
        """Cut by another rule than model.py's: the excess goes, between the special tokens at the ends."""
        excess = len(tokens) - self._checkpoint.rules.max_length
        if excess <= 0:
            return tokens
        if self._dialogues:
            if self._tokenizer.truncation_side == "left":
                return tokens[excess:]
            closing = 1 if tokens[-1][0] == self._tokenizer.eos_token_id else 0
            return tokens[: len(tokens) - excess - closing] + tokens[len(tokens) - closing :]
        special = set(self._tokenizer.all_special_ids) - {self._tokenizer.unk_token_id}
        head = next(index for index, (token, _) in enumerate(tokens) if token not in special)
        tail = next(index for index, (token, _) in enumerate(reversed(tokens)) if token not in special)
        if self._tokenizer.truncation_side == "left":
            return _once(tokens[:head] + tokens[head + excess :], self._tokenizer)
        end = len(tokens) - tail
        return _once(tokens[: end - excess] + tokens[end:], self._tokenizer)


class _Dialogues:
    """Makes token ids of dialogues as training has them, by `conch.data.chat`, and the checkpoint's rules.

    shapes: those of dialogues that the template takes.

    Raises:
        ConversionError: it takes none.
    """

    def __init__(self, checkpoint: RewardCheckpoint) -> None:
        self._tokenizer = checkpoint.tokenizer
        self._is_closed = checkpoint.rules.template == CLOSED_CHAT
        added = checkpoint.tokenizer.added_tokens_decoder.items()
        self._special = {token for token, word in added if word.special}
        taken, refusal = [], ""
        for shape in itertools.starmap(_Shape, itertools.product(_ROLES, (False, True))):
            try:
                self._ids(_dialogue("abcd", shape))
                taken.append(shape)
            except Exception as error:  # templates raise their own kinds
                refusal = first_line(error)
        if not taken:
            raise ConversionError(
                f"the chat template of {checkpoint.source} takes no dialogue of user and assistant "
                f"({refusal}): correct the template in the checkpoint's folder, or serve texts "
                "with --template '{text}'"
            )
        self.shapes: tuple[_Shape, ...] = tuple(taken)

    def encode(self, messages: list[dict[str, Any]]) -> list[int]:
        """Return what the model must read; nothing of a dialogue that the template refuses."""
        try:
            return self._ids(messages)
        except Exception:  # for example one without content
            return []

    def _ids(self, messages: list[dict[str, Any]]) -> list[int]:
        text = render_dialogue(Dialogue(tuple(messages)), "the sample", self._tokenizer)
        ids = list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        if not self._is_closed:
            return ids
        end = len(ids)
        while (
            end and ids[end - 1] not in self._special and not self._tokenizer.decode([ids[end - 1]]).strip()
        ):
            end -= 1
        ids = ids[:end] if end and ids[end - 1] in self._special else ids
        eos = self._tokenizer.eos_token_id
        return ids if ids[-1:] == [eos] else [*ids, eos]


def _dialogue(text: str, shape: _Shape) -> list[dict[str, Any]]:
    """Return messages of this shape that have the text among them."""
    spans = itertools.pairwise(_cuts(text, len(shape.roles)))
    contents: list[Any] = [text[a:b] for a, b in spans]
    if shape.in_parts:
        contents = [_in_two_parts(content) for content in contents]
    return [{"role": role, "content": content} for role, content in zip(shape.roles, contents, strict=True)]


def _in_two_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text[a:b]} for a, b in itertools.pairwise(_cuts(text, 2))]


def _cuts(text: str, pieces: int) -> list[int]:
    return [len(text) * index // pieces for index in range(pieces + 1)]


def _sent(messages: list[dict[str, Any]]) -> str:
    """Return what a client sends: the list; where it begins with a system message, an object around it."""
    begins_with_system = messages[0]["role"] == "system"
    return json.dumps({"messages": messages} if begins_with_system else messages, ensure_ascii=False)


def _once(tokens: list[Token], tokenizer: Any) -> list[Token]:
    """Leave one bos at the beginning and one eos at the end."""
    while len(tokens) > 1 and tokens[0][0] == tokens[1][0] == tokenizer.bos_token_id:
        tokens = tokens[1:]
    while len(tokens) > 1 and tokens[-1][0] == tokens[-2][0] == tokenizer.eos_token_id:
        tokens = tokens[:-1]
    return tokens


class _TokenSamples:
    """Builds rows of random ids."""

    def __init__(self, checkpoint: RewardCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._tokens = _RandomTokens(checkpoint)

    def of_length(self, length: int) -> Sample:
        """Build a sample of exactly `length` tokens."""
        return self._sample(self._tokens.take(length))

    def _sample(self, ids: Sequence[int]) -> Sample:
        ends = range(1, len(ids) + 1) if self._checkpoint.rules.granularity != "sample" else ()
        return Sample("", tuple(ids), tuple(ends))

    def special_cases(self) -> list[ParityCase]:
        """Build rows whose end misleads pooling."""
        eos, pad = self._checkpoint.tokenizer.eos_token_id, self._checkpoint.rules.pad_token_id
        limit = self._checkpoint.longest_compared
        body = self.of_length(max(1, limit // 2)).ids[: max(1, limit - 1)]
        ends = {"ends in pad": (*body, pad)[-limit:]}
        if eos is not None:
            ends |= {"ends in eos": (*body, eos)[-limit:], "eos in the middle": (eos, *body)[:limit]}
        together = (*(self._sample(ids) for ids in ends.values()), self.of_length(limit))
        return [
            *(ParityCase(name, (self._sample(ids),)) for name, ids in ends.items()),
            ParityCase("these together", together),
        ]


def _lengths(limit: int) -> list[int]:
    """Return every length up to 16, a ladder with a factor of about 1.6, and the last two up to the limit."""
    lengths = set(range(1, min(limit, _ALL_LENGTHS_UP_TO) + 1)) | {max(1, limit - 1), limit}
    step = float(_ALL_LENGTHS_UP_TO)
    while step < limit:
        lengths.add(int(step))
        step *= 1.6
    return sorted(lengths)


class _RandomTokens:
    """Draws ids that are not special; one in four ends a step, where the model reads steps."""

    def __init__(self, checkpoint: RewardCheckpoint) -> None:
        special = {*checkpoint.tokenizer.all_special_ids, checkpoint.rules.pad_token_id}
        self._ordinary = sorted(set(checkpoint.tokenizer.get_vocab().values()) - special)
        self._separator = checkpoint.rules.separator_id
        self._random = random.Random(0)

    def take(self, count: int) -> list[int]:
        """Draw the next ids."""
        return [self._next() for _ in range(count)]

    def _next(self) -> int:
        if self._separator is not None and self._random.random() < 0.25:
            return self._separator
        return self._random.choice(self._ordinary)


def _token_request(case: ParityCase, pad_token_id: int) -> Request:
    longest = max(len(sample.ids) for sample in case.samples)

    def padded(values: Sequence[int], fill: int) -> list[int]:
        padding = [fill] * (longest - len(values))
        return [*padding, *values] if case.left_padded else [*values, *padding]

    return {
        "input_ids": [padded(sample.ids, pad_token_id) for sample in case.samples],
        "attention_mask": [padded([1] * len(sample.ids), 0) for sample in case.samples],
    }

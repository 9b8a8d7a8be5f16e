"""The samples on which a converted model is compared with the original.

Every length up to the limit (for long windows a ladder of lengths), batches of 1, 2, 7 and 32, text that the
tokenizer never saw, nothing at all, too much, and for the token form padding on either side. A model that
reads dialogues gets all that in dialogues of one and of several turns, with a system message where its
template takes one, with contents as strings and as lists of parts; and pairs of answers to one prompt.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from conch.converters.checkpoints.reader import RewardCheckpoint
from conch.converters.parity.budget import WINDOW_COMPARED, ladder
from conch.converters.parity.inputs import (
    DialogueInputs,
    Messages,
    PairInputs,
    Sample,
    Shape,
    inputs_of,
    sent,
)
from conch.converters.parity.subprocess_model import Request
from conch.log import progress
from conch.triton.contract import Form

TWO_ANSWERS = "two answers to one prompt"
"""Name of the cases of dialogues of which two and two differ in the last message alone."""
ONLY_IDS = "too long, cut: token ids"
"""Name of the cases of which the token ids are compared, and no scores."""

_BATCH_SIZES = (1, 2, 7, 32)
_ODD_TEXTS = ("Ünïcödé, 漢字, 🙂🙃, עברית", "\x00\ttab\r\nline", "{text}{eos}", " " * 7)


@dataclass(frozen=True, slots=True)
class ParityCase:
    """The samples of one request.

    name: line of the report; cases of one name share a line.
    left_padded: whether padding stands on the left; token form only.
    only_ids: whether only what the model reads is compared, not the scores; text form only.
    """

    name: str
    samples: tuple[Sample, ...]
    left_padded: bool = False
    only_ids: bool = False


def build_cases(checkpoint: RewardCheckpoint, form: Form, *, max_batch_size: int) -> list[ParityCase]:
    """Build the cases for one model; the same at every call."""
    samples = _TextSamples(checkpoint) if form == "text" else _TokenSamples(checkpoint)
    lengths = ladder(checkpoint.longest_compared)
    by_length = [samples.of_length(length) for length in progress(lengths, desc="making samples")]
    # Long samples are scored once: in a batch they would be passes of their own.
    short = [sample for length, sample in zip(lengths, by_length, strict=True) if length <= WINDOW_COMPARED]
    mixed = [short[index % len(short)] for index in range(max(_BATCH_SIZES))]
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
        asked: list[Request] = [{"texts": [sample.text for sample in case.samples]} for case in cases]
        for case, request in zip(cases, asked, strict=True):
            request |= {"only_ids": True} if case.only_ids else {}
        return asked
    return [_token_request(case, pad_token_id) for case in cases]


def pairs_of_answers(cases: Sequence[ParityCase]) -> list[tuple[Sample, Sample]]:
    """Return samples that are different answers to one prompt, as the model reads them."""
    samples = [sample for case in cases if case.name == TWO_ANSWERS for sample in case.samples]
    pairs = zip(samples[::2], samples[1::2], strict=True)
    return [(one, other) for one, other in pairs if one.ids and other.ids and one.key != other.key]


def golden_dialogues() -> list[Messages]:
    """Return two answers to a prompt of one turn, two to one of two turns, and an empty answer.

    All end in a message of the assistant, as classes that score answers demand.
    """
    question = {"role": "user", "content": "What is two and two?"}
    first = {"role": "assistant", "content": "It is four."}
    again = {"role": "user", "content": "And three and three?"}
    answers = ("Six.", "Three and three\n\nmake seven, I think.")
    return [
        [question, first],
        [question, {"role": "assistant", "content": "Two and two\n\nmake five, I think."}],
        *([question, first, again, {"role": "assistant", "content": answer}] for answer in answers),
        [question, {"role": "assistant", "content": ""}],
    ]


class _TextSamples:
    """Builds texts, or dialogues that hold them, with the ids that template and truncation must give."""

    def __init__(self, checkpoint: RewardCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._tokenizer = checkpoint.tokenizer
        self._tokens = _RandomTokens(checkpoint)
        self._inputs = inputs_of(checkpoint)
        self._shapes = itertools.cycle(self._inputs.shapes)

    def of_length(self, length: int) -> Sample:
        """Build a sample of `length` tokens, or as near as decoding and encoding again comes."""
        shape = next(self._shapes)
        return self._inputs.sample(self._text(length, shape), shape)

    def special_cases(self) -> list[ParityCase]:
        """Build texts that break careless code."""
        shape, inputs = next(self._shapes), self._inputs
        bos, eos = self._tokenizer.bos_token or "", self._tokenizer.eos_token or ""
        texts = {"odd text": _ODD_TEXTS, "empty text": ("",)}
        if eos:
            texts["eos inside the text"] = (f"{self._text(3, shape)}{eos}{self._text(3, shape)}",)
        if bos or eos:
            texts["bos before the text, eos behind it"] = (f"{bos}{self._text(5, shape)}{eos}",)
        samples = [(name, inputs.sample(text, shape)) for name, group in texts.items() for text in group]
        cases = [ParityCase(name, (sample,)) for name, sample in samples]
        if isinstance(inputs, DialogueInputs):
            cases.extend(self._dialogue_cases(inputs))
        return [*cases, *self._long_cases(shape)]

    def _long_cases(self, shape: Shape) -> list[ParityCase]:
        """Build samples at and above the limit; above what is affordable, only their ids are compared."""
        limit = self._checkpoint.rules.max_length
        is_long = limit > WINDOW_COMPARED
        text = self._text(limit + limit // 8 if is_long else 2 * limit + 5, shape)
        too_long = self._inputs.sample(text, shape)
        if not is_long:
            together = ParityCase("too long and short together", (too_long, self.of_length(2)))
            return [ParityCase("too long, cut", (too_long,)), together]
        fits = self._inputs.sample(self._text(limit, shape), shape)
        return [ParityCase(ONLY_IDS, (sample,), only_ids=True) for sample in (too_long, fits)]

    def _dialogue_cases(self, inputs: DialogueInputs) -> list[ParityCase]:
        """Build pairs of answers, an empty answer, and what no dialogue is."""
        asked, *others = golden_dialogues()
        pairs = [(asked, others[0]), (others[1], others[2])]
        for turns in (1, 2):
            words = [self._tokenizer.decode(self._tokens.take(3)) for _ in range(2 * turns + 1)]
            roles = itertools.cycle(("user", "assistant"))
            before = [{"role": role, "content": word} for role, word in zip(roles, words[1:-1], strict=False)]
            pairs.append(([*before, _answer(words[0])], [*before, _answer(f"{words[-1]} {words[0]}")]))
        answered = map(inputs.sample_of, itertools.chain(*pairs))
        cases = [ParityCase(TWO_ANSWERS, (sample,)) for sample in answered]
        cases.append(ParityCase("empty answer", (inputs.sample_of(others[3]),)))
        refused = ("no JSON", '{"role": "user"}', "[]")
        cases.extend(ParityCase("no messages, refused", (Sample(text, ()),)) for text in refused)
        if isinstance(inputs, PairInputs) or self._checkpoint.rules.pooling == "steps":
            unanswered = Sample(sent(asked[:1]), ())
            cases.append(ParityCase("no answer, refused", (unanswered,)))
        return cases

    def _text(self, length: int, shape: Shape) -> str:
        """Return the longest start of a random text of which a sample has `length` tokens or less.

        Random tokens do not come back as the same number of tokens: a tokenizer joins some and splits others.
        """
        text = self._tokenizer.decode(self._tokens.take(3 * length))
        rules = self._checkpoint.rules
        if rules.step_delimiter and rules.step_separator:  # every other step is divided as clients do it
            steps = text.split(rules.step_separator)
            dividers = itertools.cycle((rules.step_delimiter, rules.step_separator))
            text = "".join(map("".join, zip(steps, dividers, strict=False)))
        low, high = 0, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            if self._inputs.length(text[:middle], shape) <= length:
                low = middle
            else:
                high = middle - 1
        return text[:low]


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


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
        limit = min(self._checkpoint.longest_compared, WINDOW_COMPARED)
        body = self.of_length(max(1, limit // 2)).ids[: max(1, limit - 1)]
        ends = {"ends in pad": (*body, pad)[-limit:]}
        if eos is not None:
            ends |= {"ends in eos": (*body, eos)[-limit:], "eos in the middle": (eos, *body)[:limit]}
        together = (*(self._sample(ids) for ids in ends.values()), self.of_length(limit))
        return [
            *(ParityCase(name, (self._sample(ids),)) for name, ids in ends.items()),
            ParityCase("these together", together),
        ]


class _RandomTokens:
    """Draws ids that are not special; one in four ends a step, where the model reads steps."""

    def __init__(self, checkpoint: RewardCheckpoint) -> None:
        special = {*checkpoint.tokenizer.all_special_ids, checkpoint.rules.pad_token_id}
        self._ordinary = sorted(set(checkpoint.tokenizer.get_vocab().values()) - special)
        rules = checkpoint.rules
        last = () if rules.separator_id is None else (rules.separator_id,)
        self._separator = rules.separator_ids or last
        self._random = random.Random(0)

    def take(self, count: int) -> list[int]:
        """Draw the next ids."""
        ids: list[int] = []
        while len(ids) < count:
            is_separator = self._separator and self._random.random() < 0.25
            ids += self._separator if is_separator else [self._random.choice(self._ordinary)]
        return ids[:count]


def _token_request(case: ParityCase, pad_token_id: int) -> Request:
    longest = max(len(sample.ids) for sample in case.samples)

    def padded(values: Sequence[int], fill: int) -> list[int]:
        padding = [fill] * (longest - len(values))
        return [*padding, *values] if case.left_padded else [*values, *padding]

    return {
        "input_ids": [padded(sample.ids, pad_token_id) for sample in case.samples],
        "attention_mask": [padded([1] * len(sample.ids), 0) for sample in case.samples],
    }

"""Rows of token ids from what clients send: texts, dialogues, or token ids. The converter copies this file
into version folders, beside the `model.py` that uses it.

It stands alone: transformers and numpy, nothing of the package that wrote it. What it must know is in
`manifest.json` beside it.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoTokenizer


class RejectedError(ValueError):
    """The request is at fault, not the model: the same request fails again."""


@dataclass(frozen=True, slots=True)
class Row:
    """A sample as the model reads it.

    ids: the tokens.
    places: which tokens end a step or have a score of their own, ascending; () where the model reads samples
        only.
    ends: how much of the sample lies before the end of each such token, in characters of the client's text,
        or in tokens where the client sends those; () where only samples get scores.
    types: which sentence each token belongs to, of a pair; () elsewhere.
    """

    ids: list[int]
    places: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    types: tuple[int, ...] = ()


Rows = list[Row]


class Token(NamedTuple):
    """A token of a sample.

    end: how much of the client's sample lies before the token's end; None where the client did not send it.
    is_step_end: whether the token is known to end a step; of dialogues, and of steps that are encoded apart.
    """

    id: int
    end: int | None = None
    is_step_end: bool = False


class Encoder:
    """Makes rows of samples by the tokenizer, template and limit of one version folder."""

    def __init__(self, folder: Path) -> None:
        self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=self.manifest["trust_remote_code"]
        )
        side = self.manifest.get("truncation_side")
        self.tokenizer.truncation_side = side or self.tokenizer.truncation_side
        self.eos: int | None = self.tokenizer.eos_token_id
        self.added = added_tokens(self.tokenizer)
        added = self.tokenizer.added_tokens_decoder.values()
        self.special_tokens = tuple(token.content for token in added if token.special and token.content)
        # Arguments of the call, which no client may set; training refuses the same.
        self.reserved = {*inspect.signature(self.tokenizer.apply_chat_template).parameters, "messages"}
        self.granularity: str = self.manifest.get("granularity", "sample")
        self.is_dense = self.granularity != "sample"
        self.reads_places = self.is_dense or self.manifest.get("pooling") == "steps"
        template = self.manifest["template"]
        default = "never" if template in ("chat", "chat{eos}") else "once"
        self.special_mode: str = self.manifest.get("add_special_tokens") or default
        self.closing: int | None = self.manifest.get("closing_token_id")
        separator = self.manifest.get("separator_id")
        several = self.manifest.get("separator_ids") or ([] if separator is None else [separator])
        self.separator: list[int] = list(several)
        self.is_apart: bool = self.manifest.get("steps_apart", False)
        self._is_blank: dict[int, bool] = {}

    # ------------------------------------------------------------------------------------------------ rows

    def rows_from_texts(self, texts: Sequence[bytes]) -> Rows:
        """Return the token ids of UTF-8 samples.

        Raises:
            RejectedError: a sample is not UTF-8, has no tokens, or is no dialogue where the model reads
                dialogues.
        """
        return self._checked([self._encode(text, row) for row, text in enumerate(texts)])

    def rows_from_tokens(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> Rows:
        """Return the token ids of padded rows, int [n, length]; padding, on either side, has 0 in the mask.

        Raises:
            RejectedError: shapes differ, a mask has a hole, or a row is empty, too long or out of range.
        """
        if input_ids.shape != attention_mask.shape:
            shapes = list(input_ids.shape), list(attention_mask.shape)
            raise RejectedError("input_ids is {}, attention_mask {}".format(*shapes))
        rows = []
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            places = np.flatnonzero(mask)
            if places.size and places[-1] - places[0] + 1 != places.size:
                raise RejectedError(f"row {row}: attention_mask has a hole; padding goes at the ends")
            rows.append(self._row([Token(int(id), end) for end, id in enumerate(ids[places], 1)]))
        return self._checked(rows)

    def _checked(self, rows: Rows) -> Rows:
        vocabulary, limit = self.manifest["vocab_size"], self.manifest["max_length"]
        for row, ids in enumerate(row.ids for row in rows):
            if not ids:
                raise RejectedError(f"row {row} has no tokens")
            if len(ids) > limit:
                raise RejectedError(f"row {row} has {len(ids)} tokens, at most {limit} are allowed")
            if min(ids) < 0 or max(ids) >= vocabulary:
                raise RejectedError(f"row {row} has token ids outside 0..{vocabulary - 1}")
        return rows

    def _encode(self, text: bytes, row: int) -> Row:
        """Return a sample, a text or a dialogue as JSON, in the model's template.

        A sample that is too long loses tokens on the tokenizer's truncation side; the special tokens that the
        tokenizer adds, an {eos} that closes the template and the closing token stay: the score may be read
        there.
        """
        try:
            sample = text.decode("utf-8")
        except UnicodeDecodeError as error:
            why = f"{error.reason} at byte {error.start}"
            raise RejectedError(f"row {row}: text is not UTF-8 ({why})") from error
        template = self.manifest["template"]
        if template == "pair":
            return self._encode_pair(_dialogue(sample, row), row)
        if template in ("chat", "chat{eos}"):
            return self._encode_dialogue(_dialogue(sample, row), row)
        return self._encode_text(sample)

    # ----------------------------------------------------------------------------------------------- texts

    def _encode_text(self, sample: str) -> Row:
        template, eos = self.manifest["template"], self.tokenizer.eos_token or ""
        text, start = template.format(text=sample, eos=eos), 0
        if self.is_dense or self.is_apart:
            start = len(template.partition("{text}")[0].format(eos=eos))
        tokens = self._tokens(text, start)
        if self.is_dense:  # what the template wrote is not the client's
            where = [token.end and token.end - start for token in tokens]
            tokens = [
                token._replace(end=end if end is not None and 0 < end <= len(sample) else None)
                for token, end in zip(tokens, where, strict=True)
            ]
        tokens, (head, tail) = self._once(tokens), self._kept()
        body = tokens[: len(tokens) - tail]
        if template.endswith("{eos}") and body and body[-1].id == self.eos:
            tail += 1
        return self._row(self._once(self._closed(tokens, head, tail)))

    def _tokens(self, text: str, start: int) -> list[Token]:
        """Tokenise a templated text, as a whole, or from character `start` on step by step.

        The `end` of a token is its place in the text, where scores have places.
        """
        is_framed = self.special_mode != "never"
        if not self.is_apart:
            return self._piece(text, 0, is_framed=is_framed)
        around, separator = self.tokenizer("").input_ids if is_framed else [], self.manifest["step_separator"]
        head, tail = self._kept()
        tokens = [Token(id) for id in around[:head]] + self._piece(text[:start], 0)
        for number, step in enumerate(text[start:].split(separator)):
            if number:
                *others, last = self._piece(separator, start)
                tokens += [*others, last._replace(is_step_end=True)]
                start += len(separator)
            tokens += self._piece(step, start)
            start += len(step)
        return tokens + [Token(id) for id in around[len(around) - tail :]]

    def _piece(self, text: str, start: int, *, is_framed: bool = False) -> list[Token]:
        """Tokenise a text that begins at character `start` of a longer one."""
        offsets = {"return_offsets_mapping": True} if self.is_dense else {}
        encoded = self.tokenizer(text, add_special_tokens=is_framed, verbose=False, **offsets)
        if not self.is_dense:
            return [Token(id) for id in encoded.input_ids]
        spans = zip(encoded.input_ids, encoded.offset_mapping, encoded.sequence_ids(), strict=True)
        return [Token(id, None if sequence is None else start + end) for id, (_, end), sequence in spans]

    def _kept(self) -> tuple[int, int]:
        """Return how many tokens the tokenizer put before and behind a sample, which no cut takes."""
        return (0, 0) if self.special_mode == "never" else self.added

    def _once(self, tokens: list[Token]) -> list[Token]:
        """Drop what repeats a bos at the beginning or an eos at the end; other modes leave all."""
        if self.special_mode != "once":
            return tokens
        first, last = 0, len(tokens)
        while last - first > 1 and tokens[first].id == tokens[first + 1].id == self.tokenizer.bos_token_id:
            first += 1
        while last - first > 1 and tokens[last - 1].id == tokens[last - 2].id == self.eos:
            last -= 1
        return tokens[first:last]

    def _closed(self, tokens: list[Token], head: int, tail: int) -> list[Token]:
        """End the sample in its closing token, and drop what exceeds the limit on the truncation side.

        head, tail: how many tokens at either end no cut takes.
        """
        if self.closing is not None:
            if tokens and tokens[-1].id == self.closing:
                tail = max(tail, 1)
            else:
                tokens, tail = [*tokens, Token(self.closing)], tail + 1
        limit = self.manifest["max_length"]
        excess = len(tokens) - limit
        if excess <= 0:
            return tokens
        start = head if self.tokenizer.truncation_side == "left" else len(tokens) - tail - excess
        return (tokens[: max(0, start)] + tokens[max(0, start) + excess :])[-limit:]

    # ----------------------------------------------------------------------------------------------- steps

    def _row(self, tokens: list[Token]) -> Row:
        """Build the row of a text's tokens.

        Where scores have places, tokens that the template or the tokenizer added end no step; where there are
        no others, the row is one step that ends at 0.
        """
        ids = [token.id for token in tokens]
        if not self.reads_places or not ids:
            return Row(ids)
        own = list(range(len(ids)))
        if self.is_dense:
            own = [place for place in own if tokens[place].end is not None]
            if not own:
                return Row(ids, (self._last_word(ids, range(len(ids))),), (0,))
        places = own
        if self.granularity != "token":
            flagged = [place for place in own if tokens[place].is_step_end]
            places = self._steps(ids, own, flagged if self.is_apart else self._separated(ids))
        ends = [tokens[place].end or 0 for place in places]
        return Row(ids, tuple(places), tuple(ends) if self.is_dense else ())

    def _separated(self, ids: list[int], start: int = 0) -> list[int]:
        """Return where separators end in the ids, from the place `start` on."""
        size, places, place = len(self.separator), [], start
        while size and place + size <= len(ids):
            is_separator = ids[place : place + size] == self.separator
            places += [place + size - 1] if is_separator else []
            place += size if is_separator else 1
        return places

    def _steps(self, ids: list[int], own: Sequence[int], separators: list[int]) -> list[int]:
        """Return where steps end: at separators; a step that none closes at its last token but an eos."""
        ends = sorted(set(separators) & set(own))
        behind = [place for place in own if not ends or place > ends[-1]]
        is_open = not ends or any(not self._blank(ids[place]) for place in behind)
        return [*ends, self._last_word(ids, behind)] if is_open else ends

    def _last_word(self, ids: list[int], places: Sequence[int]) -> int:
        """Return the last of the places whose token is no eos; the last where all are."""
        eos = self.manifest.get("eos_token_id")
        return [*places[-1:], *(place for place in places if ids[place] != eos)][-1]

    @cached_property
    def _special(self) -> set[int]:
        return special_ids(self.tokenizer)

    def _blank(self, token: int) -> bool:
        if token not in self._is_blank:
            self._is_blank[token] = is_blank(self.tokenizer, token, self._special)
        return self._is_blank[token]

    # ------------------------------------------------------------------------------------------- dialogues

    def _encode_dialogue(self, dialogue: dict[str, Any], row: int) -> Row:
        """Return a dialogue in the model's own chat template."""
        if self.reads_places:
            return self._encode_steps(dialogue, row)
        tokens = self._tokens(self._trimmed(self._rendered(dialogue, row)), 0)
        return Row([token.id for token in self._finished(tokens)])

    def _encode_steps(self, dialogue: dict[str, Any], row: int) -> Row:
        """Return a dialogue whose answer has steps: only separators inside the answer end these.

        The answer begins where its rendering and those of others, of one character each, part the earliest:
        an empty one may be read otherwise from before its beginning on, and one may begin alike.
        """
        separator, delimiter = self.manifest["step_separator"], self.manifest.get("step_delimiter")
        answer = _answer(dialogue, row)
        if delimiter:
            answer = answer.replace(delimiter, separator)
        answer += "" if answer.endswith(separator) else separator
        *before, last = dialogue["messages"]
        whole, *others = (
            self._trimmed(
                self._rendered({**dialogue, "messages": [*map(dict, before), {**last, "content": text}]}, row)
            )
            for text in (answer, "x", "a", "1")
        )
        if self.is_apart:
            tokens = self._tokens(whole, min(_common(whole, other) for other in others))
        else:
            tokens = self._tokens(whole, 0)
            ids = [token.id for token in tokens]
            start = min(_common(ids, [token.id for token in self._tokens(other, 0)]) for other in others)
            ends = set(self._separated(ids, start))
            tokens = [token._replace(is_step_end=place in ends) for place, token in enumerate(tokens)]
        tokens = self._finished(tokens)
        places = [place for place, token in enumerate(tokens) if token.is_step_end]
        return Row([token.id for token in tokens], tuple(places or [len(tokens) - 1]))

    def _rendered(self, dialogue: dict[str, Any], row: int) -> str:
        variables = dialogue.get("chat_template_kwargs") or {}
        if taken := sorted(self.reserved & set(variables)):
            raise RejectedError(f"row {row}: chat_template_kwargs may not set {taken[0]!r}")
        try:
            for message in dialogue["messages"]:
                _make_readable(message, self.manifest)
            return self.tokenizer.apply_chat_template(
                dialogue["messages"], tools=dialogue.get("tools") or None, tokenize=False, **variables
            )
        except Exception as error:  # templates raise their own kinds, for example where roles must alternate
            raise RejectedError(f"row {row}: the chat template refuses these messages: {error}") from error

    def _trimmed(self, text: str) -> str:
        """Take off the white space that a template puts behind a turn, where an eos is to follow the turn."""
        is_closed = self.manifest["template"] == "chat{eos}" and text.rstrip().endswith(self.special_tokens)
        return text.rstrip() if is_closed else text

    def _finished(self, tokens: list[Token]) -> list[Token]:
        """Close the tokens of a rendered dialogue, and cut them."""
        tokens, (head, tail) = self._once(tokens), self._kept()
        if self.manifest["template"] == "chat{eos}" and (not tokens or tokens[-1].id != self.eos):
            assert self.eos is not None
            tokens = [*tokens, Token(self.eos)]
        tail = max(tail, int(bool(tokens) and tokens[-1].id == self.eos))
        return self._once(self._closed(tokens, head, tail))

    def _encode_pair(self, dialogue: dict[str, Any], row: int) -> Row:
        """Return prompt and answer of a dialogue as the tokenizer joins a pair of sentences."""
        answer = _answer(dialogue, row)
        before = dialogue["messages"][:-1]
        if self.tokenizer.chat_template and before:
            prompt = self._rendered({**dialogue, "messages": before}, row)
        else:
            prompt = "\n".join(_text_of(message) for message in before)

        def encoded(limit: int) -> Any:
            return self.tokenizer(
                *(prompt, answer),
                add_special_tokens=self.special_mode != "never",
                truncation="longest_first",
                max_length=limit,
                verbose=False,
            )

        limit = self.manifest["max_length"]
        pair = encoded(limit)
        ids, types = pair.input_ids, list(pair.get("token_type_ids") or ())
        if self.closing is not None and ids[-1:] != [self.closing]:
            pair = encoded(limit - 1)
            ids, types = [*pair.input_ids, self.closing], list(pair.get("token_type_ids") or ())
            types += types[-1:]
        return Row(ids, types=tuple(types))


# ------------------------------------------------------------------------------------------------- tokenizers


def added_tokens(tokenizer: Any) -> tuple[int, int]:
    """Return how many tokens the tokenizer adds before and behind a text."""
    around = tokenizer("").input_ids
    for word in ("x", "a", "1", "c", "."):
        plain = tokenizer(word, add_special_tokens=False).input_ids
        if plain and not set(plain) & set(around):
            before = tokenizer(word).input_ids.index(plain[0])
            return before, len(around) - before
    return len(around), 0


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of special tokens, without the one for unknown text, which a client wrote."""
    added = {token for token, word in tokenizer.added_tokens_decoder.items() if word.special}
    return (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}


def is_blank(tokenizer: Any, token: int, special: set[int]) -> bool:
    """Return whether a token is special or white space: no step consists of such tokens only."""
    return token in special or (token != tokenizer.unk_token_id and not tokenizer.decode([token]).strip())


# -------------------------------------------------------------------------------------------------- dialogues


def _dialogue(sample: str, row: int) -> dict[str, Any]:
    """Return {"messages", "tools", "chat_template_kwargs"} of a dialogue's JSON; the last two may lack."""
    value: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        value = _without_none(json.loads(sample))
    dialogue: dict[str, Any] = {"messages": value} if isinstance(value, list) else value
    messages = dialogue.get("messages") if isinstance(dialogue, dict) else None
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise RejectedError(
            f'row {row}: text is no JSON list of messages, such as [{{"role": "user", "content": "Hi"}}], '
            "which the chat template takes"
        )
    for key, kind in {"tools": list, "chat_template_kwargs": dict}.items():
        if not isinstance(dialogue.get(key), kind | None):
            raise RejectedError(f"row {row}: `{key}` of the dialogue is no {kind.__name__}")
    if unknown := sorted(set(dialogue) - {"messages", "tools", "chat_template_kwargs"}):
        raise RejectedError(f"row {row}: the dialogue has an unknown key `{unknown[0]}`")
    return dialogue


def _common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return the length of the longest common beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def _answer(dialogue: dict[str, Any], row: int) -> str:
    """Return the text of the answer that a dialogue ends in."""
    last = dialogue["messages"][-1]
    if last.get("role") != "assistant":
        raise RejectedError(
            f"row {row}: the model scores an answer, and the last message is of the role "
            f"{last.get('role')!r}, not 'assistant'"
        )
    return _text_of(last)


def _text_of(message: dict[str, Any]) -> str:
    content: Any = message.get("content") or ""
    return content if isinstance(content, str) else "".join(str(part.get("text", "")) for part in content)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _make_readable(message: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Bring a message into the form that the chat template reads, as the manifest tells and training does."""
    content, form = message.get("content"), manifest.get("contents", {}).get(message.get("role"))
    if form == "text" and isinstance(content, list):
        message["content"] = "".join(part["text"] for part in content)
    elif form == "parts" and isinstance(content, str):
        message["content"] = [{"type": "text", "text": content}]
    for call in message.get("tool_calls", ()):
        function: Any = call.get("function") if isinstance(call, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if manifest.get("arguments") == "json" and isinstance(arguments, dict):
            function["arguments"] = json.dumps(arguments, ensure_ascii=False)
        elif manifest.get("arguments") == "dict" and isinstance(arguments, str):
            with contextlib.suppress(json.JSONDecodeError):
                parsed = json.loads(arguments)
                function["arguments"] = parsed if isinstance(parsed, dict) else arguments

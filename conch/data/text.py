"""How texts become token ids, and sampled ids become text: one set of rules for all parts.

docs/text.md states the rules and what they follow. In short, for a policy's tokenizer:

    a plain prompt        what `tokenizer(text)` gives: with a BOS, where the tokenizer puts one in front.
                          What it puts behind a text stays for encoders alone: a decoder goes on behind its
                          prompt.
    a rendered dialogue   its own tokens: a chat template writes the special ones itself.
    a response            ids which, behind the prompt's, decode to prompt and response: those that sampling
                          behind this prompt can give.
    a response's text     decode(prompt + response) less decode(prompt): a tokenizer may drop the space that a
                          text begins with, and a response does not begin one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from conch.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTEXT = 8
"""Tokens of a prompt that decide how its response's first characters decode; more where all are special."""

_CUT_CHARACTER = "\ufffd"
"""What a decoder writes for a part of a character."""


class TextCodec:
    """Encodes prompts and responses, and decodes responses.

    tokenizer: of the policy.
    encoder_decoder: whether prompt and response are read by a stack each. A prompt then has all the special
        tokens that its tokenizer adds, and a response those that it puts before a target.
    add_special_tokens: False for prompts that hold their special tokens already.

    Raises:
        ModelError: from the constructor: the tokenizer changes a text where it adds special tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        encoder_decoder: bool = False,
        add_special_tokens: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.encoder_decoder = encoder_decoder
        self.eos_id = int(tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]
        self._prefix, self._suffix = special_frame(tokenizer) if add_special_tokens else ((), ())
        self._target_prefix = (
            special_frame(tokenizer, target=True)[0] if encoder_decoder and add_special_tokens else ()
        )
        self._specials = frozenset(special_tokens(tokenizer).values())

    # ------------------------------------------------------------------------------------------------- encode

    def prompt_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a plain prompt. Special tokens that the text begins or ends with are not put again."""
        ids = self.rendered_ids(text)
        ids = ids if self._begins(ids) else (*self._prefix, *ids)
        return ids if not self.encoder_decoder or self._ends(ids) else (*ids, *self._suffix)

    def rendered_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that holds its special tokens: what a chat template made."""
        return tuple(
            self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else ()
        )  # pyright: ignore[reportArgumentType]

    def response_ids(self, prompt: str, prompt_ids: Sequence[int], response: str) -> tuple[int, ...]:
        """Token ids of `response` behind those of `prompt`, without an eos.

        They are the rest of what `prompt + response` is encoded to, where that begins with `prompt_ids`. Else
        two tokens have met in one, which no sampling behind this prompt gives: then the first of several
        encodings of the response alone that decodes to it.
        """
        if not response:
            return ()
        if self.encoder_decoder:
            return (*self._target_prefix, *self._target_ids(response))
        joint = self.rendered_ids(prompt + response)
        joint = joint if self._begins(joint) else (*self._prefix, *joint)
        if joint[: len(prompt_ids)] == tuple(prompt_ids):
            return joint[len(prompt_ids) :]
        candidates = list(self._apart(response))
        right = (ids for ids in candidates if self.response_text(prompt_ids, ids) == response)
        return next(right, candidates[0])

    def with_eos(self, ids: Sequence[int]) -> tuple[int, ...]:
        """`ids` with an eos behind them, where they do not end in one."""
        return (*ids,) if ids and ids[-1] == self.eos_id else (*ids, self.eos_id)

    def cut(self, ids: Sequence[int], max_tokens: int, side: str) -> tuple[int, ...]:
        """A prompt's ids, at most `max_tokens` of them, less those in excess on `side` ("left" or "right").

        Special tokens that stand in front of a text, and behind an encoder's, stay.
        """
        front = len(self._prefix) if self._begins(ids) else int(ids[0] == self.tokenizer.bos_token_id)
        back = len(self._suffix) if self.encoder_decoder and self._ends(ids) else 0
        room = max_tokens - front - back
        if len(ids) <= max_tokens or room <= 0:
            return tuple(ids[:max_tokens])
        own = ids[front : len(ids) - back]
        kept = own[-room:] if side == "left" else own[:room]
        return (*ids[:front], *kept, *ids[len(ids) - back :])

    def prompt_text(self, ids: Sequence[int]) -> str:
        """Text of a prompt's ids, which `prompt_ids` encodes to them again where the tokenizer allows."""
        front = len(self._prefix) if self._begins(ids) else 0
        back = len(self._suffix) if self.encoder_decoder and self._ends(ids) else 0
        return decode(self.tokenizer, ids[front : len(ids) - back], skip_special_tokens=False)

    def _ends(self, ids: Sequence[int]) -> bool:
        return bool(self._suffix) and tuple(ids[-len(self._suffix) :]) == self._suffix

    def _begins(self, ids: Sequence[int]) -> bool:
        return bool(self._prefix) and tuple(ids[: len(self._prefix)]) == self._prefix

    def _target_ids(self, text: str) -> tuple[int, ...]:
        ids: Any = self.tokenizer(text_target=text, add_special_tokens=False, verbose=False)["input_ids"]
        return tuple(ids)

    def _apart(self, text: str) -> Iterator[tuple[int, ...]]:
        """Encodings of a text alone: as it is, and less what a tokenizer puts before a text's first word."""
        yield self.rendered_ids(text)
        for anchor in ("\n", "."):
            before, whole = self.rendered_ids(anchor), self.rendered_ids(anchor + text)
            if whole[: len(before)] == before:
                yield whole[len(before) :]

    # ------------------------------------------------------------------------------------------------- decode

    def response_text(
        self, prompt_ids: Sequence[int], ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> str:
        """Text of sampled ids behind those of their prompt.

        skip_special_tokens: False keeps the text of special tokens.
        """
        if self.encoder_decoder or not ids:
            return self._decode(ids, skip_special_tokens)
        context = self._context(prompt_ids)
        before, whole = (self._decode(each, skip_special_tokens) for each in (context, [*context, *ids]))
        # A prompt that was cut may end within a character, which the response then completes.
        before = before.rstrip(_CUT_CHARACTER)
        return whole[len(before) :] if whole.startswith(before) else self._decode(ids, skip_special_tokens)

    def _context(self, prompt_ids: Sequence[int]) -> list[int]:
        """The last ids of a prompt, with one among them that is not special where there is any."""
        start = max(0, len(prompt_ids) - _CONTEXT)
        while start > 0 and all(token in self._specials for token in prompt_ids[start:]):
            start -= 1
        return list(prompt_ids[start:])

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return decode(self.tokenizer, ids, skip_special_tokens=skip_special_tokens)


_PROBES = (
    ("How are you?", " Fine!"),
    ("How are you today?", " Fine, thank you."),
    ("Answer: ", "42\n"),
    ("A b", "c"),
)


def lost_in_text(codec: TextCodec) -> tuple[str, str] | None:
    """A text that prompt and response do not give back as it was, and what they give; None where all do.

    Texts for which a tokenizer has no words are passed over.
    """
    unknown = codec.tokenizer.unk_token_id
    for prompt, response in _PROBES:
        prompt_ids = codec.prompt_ids(prompt)
        ids = codec.response_ids(prompt, prompt_ids, response)
        if unknown in (*prompt_ids, *ids):
            continue
        read = codec.prompt_text(prompt_ids) + codec.response_text(prompt_ids, ids)
        if read != prompt + response:
            return prompt + response, read
    return None


def decode(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool = True
) -> str:
    """Text of ids as they are, without the clean-up of spaces that some tokenizers do."""
    text = tokenizer.decode(
        list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
    return str(text)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Tokens that decoding leaves out as special, with their ids: those with a part of their own (bos, eos,
    ...), and those that only the vocabulary marks so, as ends of turns of many chat models are."""
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    marked = ((token.content, id) for id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return {token: id for token, id in (*named, *marked) if token}


def special_frame(
    tokenizer: PreTrainedTokenizerBase, *, target: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Special tokens that a tokenizer puts before and behind a text.

    target: of a text that an encoder-decoder writes, rather than reads.

    Raises:
        ModelError: it changes the text's own tokens where it adds special ones.
    """

    def encoded(text: str, add: bool) -> tuple[int, ...]:
        given: dict[str, Any] = {"text_target" if target else "text": text}
        return tuple(tokenizer(**given, add_special_tokens=add, verbose=False)["input_ids"])

    added = {*encoded("", True)}
    # A vocabulary without letters has no token for the first of them, and one may stand in the frame itself.
    words = (decode(tokenizer, [token]) for token in range(len(tokenizer)))
    texts = (text for text in chain(("a", "A", "1"), words) if text)
    probe = next((text for text in texts if (ids := encoded(text, False)) and added.isdisjoint(ids)), "a")
    own, whole = encoded(probe, False), encoded(probe, True)
    for start in range(len(whole) - len(own) + 1):
        if whole[start : start + len(own)] == own:
            return whole[:start], whole[start + len(own) :]
    raise ModelError(
        f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} makes {list(own)} of the text "
        f"{probe!r} and, with special tokens, {list(whole)}: set `tokenizer.add_special_tokens=false` and "
        "put them into the texts"
    )

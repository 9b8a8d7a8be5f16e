"""Where a completion ends, and what becomes of its ids: the same for every engine that is handed ids."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from conch.types import Completion, FinishReason

Decode = Callable[[Sequence[int]], str]


class StopCondition:
    """The rule of one tokenizer and one set of stop strings.

    It reads text without special tokens, as `Completion.text` has it, and of responses alone: a stop string
    that begins in the prompt does not count, unlike with the criterion of `transformers`.

    eos_id: ends a completion, and stays in it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        # A character takes at most four byte tokens; the rest is for special tokens, which have no text.
        self._window = 4 * max(map(len, self._stop), default=0) + 8
        self.eos_id = int(tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]

    @property
    def watches(self) -> bool:
        """True where `reached` must be asked after each token."""
        return bool(self._stop)

    def reached(self, ids: list[int]) -> bool:
        """True once a stop string stands in the text of these sampled ids."""
        if not self._stop:
            return False
        # A look at the tail first: decoding all of a long response at each of its tokens would be quadratic.
        near = contains_any(self._decode(ids[-self._window :]), self._stop)
        return near and contains_any(self._decode(ids), self._stop)

    def completion(self, ids: Sequence[int], logprobs: Sequence[float]) -> Completion:
        """What the sampled ids come to; what follows their end is cut off, whatever it is."""
        kept, reason = cut_at_end(list(ids), self.eos_id, self._stop, self._decode)
        return Completion(self._decode(kept), tuple(kept), tuple(logprobs[: len(kept)]), reason)

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


def cut_at_end(
    ids: list[int], eos_token_id: int, stop: Sequence[str], decode: Decode
) -> tuple[list[int], FinishReason]:
    """Drop what follows the first eos (kept) or the first stop string (cut off), and say why the text ends.

    A token that holds the beginning of a stop string goes with it, so ids and text stay aligned.
    """
    reason: FinishReason = "length"
    if eos_token_id in ids:
        ids, reason = ids[: ids.index(eos_token_id) + 1], "eos"
    text = decode(ids)
    if not contains_any(text, stop):
        return ids, reason
    start = min(text.find(string) for string in stop if string in text)
    keep = bisect_left(range(len(ids)), True, key=lambda n: contains_any(decode(ids[:n]), stop))
    while keep > 0 and len(decode(ids[:keep])) > start:
        keep -= 1
    return ids[:keep], "stop"


def contains_any(text: str, strings: Sequence[str]) -> bool:
    """True where one of `strings` stands in `text`."""
    return any(string in text for string in strings)

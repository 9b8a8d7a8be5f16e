"""Where a completion ends, and the `Completion` made of its ids: one rule for every engine."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from conch.types import Completion, FinishReason

Decode = Callable[[Sequence[int]], str]


class StopCondition:
    """Decides where a completion ends, for one tokenizer and one set of stop strings.

    It reads the response's text without special tokens, as in `Completion.text`. Unlike with the criterion of
    `transformers`, a stop string that begins in the prompt does not count.

    eos_id: token that ends a completion, and stays in it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        # A character takes at most four byte tokens; the rest is for special tokens, which have no text.
        self._window = 4 * max(map(len, self._stop), default=0) + 8
        self.eos_id = int(tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]

    @property
    def has_stop_strings(self) -> bool:
        """True where there are stop strings, so that `reached` must be called after each token."""
        return bool(self._stop)

    def reached(self, ids: list[int]) -> bool:
        """True once the text of these sampled ids contains a stop string."""
        if not self._stop:
            return False
        # A look at the tail first: decoding all of a long response at each of its tokens would be quadratic.
        near = contains_any(self._decode(ids[-self._window :]), self._stop)
        return near and contains_any(self._decode(ids), self._stop)

    def completion(self, ids: Sequence[int], logprobs: Sequence[float]) -> Completion:
        """Completion of the sampled ids; whatever follows its end is cut off."""
        response, reason = cut_at_end(list(ids), self.eos_id, self._stop, self._decode)
        return Completion(self._decode(response), tuple(response), tuple(logprobs[: len(response)]), reason)

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


def cut_at_end(
    ids: list[int], eos_token_id: int, stop: Sequence[str], decode: Decode
) -> tuple[list[int], FinishReason]:
    """Cut ids behind the first eos, which stays, or before the first stop string, and give the finish reason.

    A token that holds the beginning of a stop string is cut off with it, so that ids and text stay aligned.
    """
    reason: FinishReason = "length"
    if eos_token_id in ids:
        ids, reason = ids[: ids.index(eos_token_id) + 1], "eos"
    text = decode(ids)
    if not contains_any(text, stop):
        return ids, reason
    start = min(text.find(string) for string in stop if string in text)
    length = bisect_left(range(len(ids)), True, key=lambda n: contains_any(decode(ids[:n]), stop))
    while length > 0 and len(decode(ids[:length])) > start:
        length -= 1
    return ids[:length], "stop"


def contains_any(text: str, strings: Sequence[str]) -> bool:
    """True where `text` contains one of `strings`."""
    return any(string in text for string in strings)

"""Where a completion ends, and what becomes of its ids: the same for every engine that is handed ids."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from conch.rollouts.hf_engine import StopStrings, cut_at_end
from conch.types import Completion


class Ending:
    """The rule of one tokenizer and one set of stop strings.

    eos_id: ends a completion, and stays in it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._criterion = StopStrings(self._stop, self._decode, num_given=0) if self._stop else None
        self.eos_id = int(tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]

    @property
    def watches(self) -> bool:
        """True where `reached` must be asked after each token."""
        return self._criterion is not None

    def reached(self, ids: list[int]) -> bool:
        """True once a stop string stands in the text of these sampled ids."""
        return self._criterion is not None and self._criterion.in_ids(ids)

    def completion(self, ids: Sequence[int], logprobs: Sequence[float]) -> Completion:
        """What the sampled ids come to; what follows their end is cut off, whatever it is."""
        kept, reason = cut_at_end(list(ids), self.eos_id, self._stop, self._decode)
        return Completion(self._decode(kept), tuple(kept), tuple(logprobs[: len(kept)]), reason)

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

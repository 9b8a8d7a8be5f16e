"""Where a completion ends, and the `Completion` made of its ids: one rule for every engine.

A completion ends with a token that ends it (an end id), before a stop string, or at the limit. End ids are
the tokenizer's eos, those that the model's own configuration names (a chat model often names several), and
`generation.stop_token_ids`. A stop string that is a special token, whose text decoding leaves out, is an end
id as well.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.config import GenerationConfig
from conch.data.text import TextCodec, special_tokens
from conch.errors import ConfigError
from conch.log import get_logger
from conch.types import Completion, FinishReason

GenerationT = TypeVar("GenerationT", bound=GenerationConfig)
Decode = Callable[[Sequence[int]], str]

_log = get_logger(__name__)


class StopCondition:
    """Decides where a completion ends, for one tokenizer and one set of stop strings and ids.

    Unlike with the criterion of `transformers`, a stop string that begins in the prompt does not count.

    config: for its `stop`, `stop_token_ids` and `skip_special_tokens`.
    encoder_decoder: whether a response is decoded by itself, rather than behind its prompt.

    end_ids: tokens that end a completion, and stay in it.

    Raises:
        ConfigError: from the constructor: a stop string can never be found.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig, *, encoder_decoder: bool = False
    ) -> None:
        self._codec = TextCodec(tokenizer, encoder_decoder=encoder_decoder, add_special_tokens=False)
        self._skip_special_tokens = config.skip_special_tokens
        specials = special_tokens(tokenizer)
        added = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
        whole = {**added, **specials}
        self._stop = tuple(string for string in config.stop if string not in whole)
        if config.skip_special_tokens:
            _check_stop(self._stop, [*specials])
        named = {whole[string] for string in config.stop if string in whole}
        self.end_ids = frozenset({self._codec.eos_id, *config.stop_token_ids, *named})
        self._word = self._codec.rendered_ids("a")
        # A character takes at most four byte tokens; the rest is for special tokens, which have no text.
        self._window = 4 * max(map(len, self._stop), default=0) + 8

    @property
    def has_stop_strings(self) -> bool:
        """True where there are stop strings, so that `reached` must be called after each token."""
        return bool(self._stop)

    def reached(self, ids: list[int]) -> bool:
        """True once the text of these sampled ids contains a stop string."""
        if not self._stop:
            return False
        # A look at the tail first: decoding all of a long response at each of its tokens would be quadratic.
        # Behind a word, as every response is behind its prompt: some decoders drop a first space.
        near = contains_any(self._decode(self._word, ids[-self._window :]), self._stop)
        return near and contains_any(self._decode(self._word, ids), self._stop)

    def ends(self, ids: list[int]) -> bool:
        """True once these sampled ids are a whole completion, whatever the limit."""
        return ids[-1] in self.end_ids or self.reached(ids)

    def completion(
        self, prompt_ids: Sequence[int], ids: Sequence[int], logprobs: Sequence[float]
    ) -> Completion:
        """Completion of the ids that were sampled behind a prompt; whatever follows its end is cut off."""
        response, reason = cut_at_end(
            list(ids), self.end_ids, self._stop, lambda part: self._decode(prompt_ids, part)
        )
        shown = response[:-1] if reason == "eos" else response
        return Completion(
            self._decode(prompt_ids, shown), tuple(response), tuple(logprobs[: len(response)]), reason
        )

    def _decode(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        return self._codec.response_text(prompt_ids, ids, skip_special_tokens=self._skip_special_tokens)


def cut_at_end(
    ids: list[int], end_ids: Iterable[int], stop: Sequence[str], decode: Decode
) -> tuple[list[int], FinishReason]:
    """Cut ids behind the first end id, which stays, or before the first stop string; give the finish reason.

    A token that holds the beginning of a stop string is cut off with it, so that ids and text stay aligned.
    """
    reason: FinishReason = "length"
    ends = frozenset(end_ids)
    first_end = next((place for place, token in enumerate(ids) if token in ends), None)
    if first_end is not None:
        ids, reason = ids[: first_end + 1], "eos"
    if not stop:
        return ids, reason
    ended, ids = ids, ids[:-1] if reason == "eos" else ids  # an end id is no part of the text
    text = decode(ids)
    if not contains_any(text, stop):
        return ended, reason
    start = min(text.find(string) for string in stop if string in text)
    length = bisect_left(range(len(ids)), True, key=lambda n: contains_any(decode(ids[:n]), stop))
    while length > 0 and len(decode(ids[:length])) > start:
        length -= 1
    return ids[:length], "stop"


def contains_any(text: str, strings: Sequence[str]) -> bool:
    """True where `text` contains one of `strings`."""
    return any(string in text for string in strings)


def with_end_ids(
    generation: GenerationT, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> GenerationT:
    """`generation` whose `stop_token_ids` hold the end ids of the model's own configuration as well.

    Engines that do not have the model's configuration (rollout servers) end completions alike then. An id for
    which the tokenizer has an ordinary word is no end: a model of random weights has its class's default.
    """
    known = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    named = {*configured_end_ids(model), *generation.stop_token_ids}
    ordinary = named - known - {*generation.stop_token_ids}
    if ordinary:
        _log.info(
            "ids %s end a text by the model's configuration, and are ordinary tokens of the tokenizer: they "
            "end no completion; name them in `generation.stop_token_ids` if they shall",
            sorted(ordinary),
        )
    return generation.model_copy(update={"stop_token_ids": tuple(sorted(named - ordinary))})


def configured_end_ids(model: PreTrainedModel) -> list[int]:
    """The ids that end a text by a model's `generation_config`, else by its config, inside its vocabulary."""
    sources = [model.generation_config, model.config, model.config.get_text_config()]
    values = (getattr(source, "eos_token_id", None) for source in sources)
    value = next((value for value in values if value is not None), ())
    ids = [value] if isinstance(value, int) else list(value)
    size = int(model.config.get_text_config().vocab_size)
    return [token for token in ids if 0 <= token < size]


def _check_stop(stop: Sequence[str], specials: Sequence[str]) -> None:
    for string in stop:
        held = [special for special in specials if special in string]
        if held:
            raise ConfigError(
                f"`generation.stop` holds {string!r}, which can never be found: completions are decoded "
                f"without special tokens, of which {held[0]!r} is one; give {held[0]!r} alone, or set "
                "`generation.skip_special_tokens=false`"
            )

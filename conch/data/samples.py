"""Whole samples for supervised training: token ids with a mask of what the loss counts.

Legend: B samples, P prompt tokens (padded left), R response tokens (padded right), T = P + R. The prompt of a
sample is all that stands before the first token that is learned, the response all that follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from conch.config import DataConfig
from conch.data.chat import dialogue_of, encode_dialogue
from conch.data.files import usable
from conch.data.formats import fitting, in_form, sample_form
from conch.data.text import TextCodec
from conch.errors import DataError
from conch.log import get_logger

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """Tokens of one sample and which of them are learned.

    token_ids: the whole sample, eos included.
    loss_mask: True at tokens that the model learns; the first token, before which there is nothing to predict
        it from, is not learned whatever stands there.
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]

    @property
    def num_prompt(self) -> int:
        """Tokens before the first that is learned; all where none is."""
        learned = (place for place, is_learned in enumerate(self.loss_mask) if is_learned and place > 0)
        return next(learned, len(self.token_ids))


@dataclass(frozen=True)
class TokenBatch:
    """Padded samples.

    input_ids [B, T]: prompt and response. attention_mask [B, T]: True at real tokens.

    loss_mask [B, R]: True at learned tokens, which stand among the last R columns of `input_ids`.
    """

    input_ids: Int[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    loss_mask: Bool[Tensor, "B R"]

    @property
    def num_response(self) -> int:
        """R, the columns that hold responses."""
        return self.loss_mask.shape[1]

    @property
    def response_ids(self) -> Int[Tensor, "B R"]:
        """The last R columns of `input_ids`."""
        return self.input_ids[:, -self.num_response :]


def tokenize_samples(
    samples: Iterable[Any],
    codec: TextCodec,
    *,
    max_tokens: int | None,
    truncation_side: Literal["left", "right"],
    lengths: DataConfig | None = None,
) -> list[TokenizedSample]:
    """Tokenise strings (all tokens after the first are learned), {"prompt", "completion"} pairs (the
    completion is), and dialogues (the assistant's turns are; see `conch.data.chat`), in any of the forms
    of `conch.data.formats`.

    An eos token ends every string and pair, and is learned; a dialogue ends as the chat template has it.
    Samples of more than `max_tokens` tokens lose what is too much on `truncation_side`, and those of which
    nothing learned is left are dropped; one warning counts both.

    Samples that the chat template or the tokenizer refuses are left out; one warning counts and names them.

    codec: encodes them; of an encoder-decoder it takes pairs alone.
    lengths: which samples to leave out for their length.

    Raises:
        DataError: there are none, none is left, or one, named by its number, is of another form.
    """
    rows = in_form(samples, "sample", lambda row, name: _form(row, name, codec.encoder_decoder))
    made, _ = usable(rows, "sample", lambda sample, name: _tokenize(sample, name, codec))
    if lengths is not None:
        indices = fitting([len(sample.token_ids) for sample in made], lengths, "samples")
        made = [made[index] for index in indices]
    return made if max_tokens is None else _truncated(made, max_tokens, truncation_side)


def collate(
    samples: Sequence[TokenizedSample], pad_token_id: int, device: torch.device | str = "cpu"
) -> TokenBatch:
    """Pad samples so that all responses begin in the same column; R is at least 1."""
    longest_prompt = max(sample.num_prompt for sample in samples)
    longest_response = max(1, *(len(sample.token_ids) - sample.num_prompt for sample in samples))
    shape = (len(samples), longest_prompt + longest_response)
    ids = torch.full(shape, pad_token_id, dtype=torch.long)
    real, learned = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for row, sample in enumerate(samples):
        start = longest_prompt - sample.num_prompt
        columns = slice(start, start + len(sample.token_ids))
        ids[row, columns] = torch.tensor(sample.token_ids)
        real[row, columns] = True
        learned[row, columns] = torch.tensor(sample.loss_mask)
    return TokenBatch(ids.to(device), real.to(device), learned[:, longest_prompt:].to(device))


def _form(row: Any, name: str, pairs_only: bool) -> Any:
    try:
        sample = sample_form(row)
    except DataError as error:
        raise DataError(f"{name} {error}") from None
    if pairs_only and not _is_pair(sample):
        raise DataError(
            f"{name} is no pair; an encoder-decoder reads the prompt apart from the completion: give "
            'dicts of strings "prompt" and "completion"'
        )
    return sample


def _is_pair(sample: Any) -> bool:
    return isinstance(sample, dict) and isinstance(sample.get("prompt"), str)


def _tokenize(sample: Any, name: str, codec: TextCodec) -> TokenizedSample:
    if _is_pair(sample):
        return _tokenize_pair(sample["prompt"], sample["completion"], name, codec)
    if isinstance(sample, str):
        if not codec.rendered_ids(sample):
            raise DataError(f"{name} is empty once tokenised")
        ids = codec.with_eos(codec.prompt_ids(sample))
        return TokenizedSample(ids, tuple(place > 0 for place in range(len(ids))))
    dialogue = dialogue_of(sample)
    assert dialogue is not None, "what `sample_form` gives is a text, a pair or a dialogue"
    whole, num_prompt = dialogue
    return TokenizedSample(*encode_dialogue(whole, name, codec.tokenizer, num_prompt=num_prompt))


def _tokenize_pair(prompt: str, completion: str, name: str, codec: TextCodec) -> TokenizedSample:
    prompt_ids = codec.prompt_ids(prompt)
    ids = codec.response_ids(prompt, prompt_ids, completion)
    if not ids:
        raise DataError(f"the completion of {name} is empty once tokenised")
    if codec.encoder_decoder and not prompt_ids:
        raise DataError(f"the prompt of {name} is empty once tokenised: the encoder has nothing to read")
    tokens = (*prompt_ids, *codec.with_eos(ids))
    return TokenizedSample(tokens, tuple(place >= max(1, len(prompt_ids)) for place in range(len(tokens))))


def _truncated(
    samples: list[TokenizedSample], max_tokens: int, side: Literal["left", "right"]
) -> list[TokenizedSample]:
    lengths = [len(sample.token_ids) for sample in samples]
    num_long = sum(length > max_tokens for length in lengths)
    if not num_long:
        return samples
    window = slice(-max_tokens, None) if side == "left" else slice(max_tokens)
    cut = [TokenizedSample(sample.token_ids[window], sample.loss_mask[window]) for sample in samples]
    left = [sample for sample in cut if sample.num_prompt < len(sample.token_ids)]
    if not left:
        raise DataError(
            f"no sample has a learned token among the {max_tokens} that are kept on truncation: shorten the "
            f"prompts, or change `tokenizer.truncation_side`, now {side}"
        )
    _log.warning(
        "%d of %d samples have more than %d tokens (the longest %d): cut on the %s; %d dropped, of which "
        "nothing to be learned was left",
        *(num_long, len(samples), max_tokens, max(lengths), side, len(samples) - len(left)),
    )
    return left

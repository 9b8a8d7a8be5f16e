"""Samples as turns: token ids with a mask of the tokens that somebody chose.

The response begins at a sample's first action and holds all that follows, later prompts too; batches are
those of `conch.data.samples`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from conch.data.chat import dialogue_of, encode_dialogue
from conch.data.files import usable
from conch.data.formats import in_form
from conch.data.samples import TokenizedSample
from conch.data.text import TextCodec
from conch.errors import DataError
from conch.log import get_logger

_log = get_logger(__name__)


def tokenize_turns(
    samples: Iterable[Any],
    codec: TextCodec,
) -> tuple[list[TokenizedSample], list[int]]:
    """Tokenise samples, each of them a string (all tokens after the first are actions), a list of turns
    `[prompt, output, prompt, output, ...]` (the outputs' tokens are), or a dialogue (the assistant's are; of
    {"prompt", "completion"} dialogues those of the completion).

    An eos token ends every string and list, and is an action; a dialogue ends as the chat template has it.
    Samples that the chat template or the tokenizer refuses are left out; one warning counts and names them.
    Gives the others with their indices among all samples; their `loss_mask` is True at actions, and never at
    the first token, before which there is no state to act in.

    codec: encodes them; of an encoder-decoder it takes `[prompt, output]` and nothing else.

    Raises:
        DataError: there are none, none is left, or one, named by its number, is of another form.
    """
    rows = in_form(samples, "sample", lambda row, name: _form(row, name, codec.encoder_decoder))
    return usable(rows, "sample", lambda sample, name: _tokenize(sample, name, codec))


def cut_turns(
    samples: Sequence[TokenizedSample], max_tokens: int, truncation_side: Literal["left", "right"]
) -> tuple[list[TokenizedSample], list[int]]:
    """Samples of at most `max_tokens` tokens, which lose what is too much on `truncation_side`, with their
    indices; those of which no action is left are left out. Warnings count both, and name the latter by their
    places where they are `Rows`.

    Raises:
        DataError: none is left.
    """
    lengths = [len(sample.token_ids) for sample in samples]
    if max(lengths) <= max_tokens:
        return list(samples), list(range(len(samples)))
    _log.warning(
        "%d of %d samples are longer than the %d tokens of the model's window (the longest has %d): cut on "
        "the %s",
        sum(length > max_tokens for length in lengths),
        *(len(samples), max_tokens, max(lengths), truncation_side),
    )
    return usable(
        samples, "sample", lambda sample, name: _truncate(sample, name, max_tokens, truncation_side)
    )


def _form(sample: Any, name: str, pairs_only: bool) -> Any:
    """A string, checked turns, or a dialogue as it is."""
    if isinstance(sample, str):
        if pairs_only:
            raise DataError(
                f"{name} is one string; an encoder-decoder reads the prompt apart from the output: "
                "give [prompt, output]"
            )
        return sample
    try:
        dialogue = dialogue_of(sample)
    except DataError as error:
        raise DataError(f"{name} {error}") from None
    if dialogue is not None and not pairs_only:
        return sample
    return _checked_turns(sample, name, pairs_only)


def _tokenize(sample: Any, name: str, codec: TextCodec) -> TokenizedSample:
    dialogue = None if isinstance(sample, str) else dialogue_of(sample)
    if dialogue is not None:
        whole, num_prompt = dialogue
        ids, is_assistants = encode_dialogue(whole, name, codec.tokenizer, num_prompt=num_prompt)
        return TokenizedSample(ids, (False, *is_assistants[1:]))
    if isinstance(sample, str):
        ids = codec.prompt_ids(sample)
        turns = [ids[:1], ids[1:]]
    else:
        turns = _encode_turns(sample, codec)
    if not turns[0]:
        what = name if isinstance(sample, str) else f"the first prompt of {name}"
        raise DataError(f"{what} is empty once tokenised")
    turns[-1] = codec.with_eos(turns[-1])
    return TokenizedSample(
        tuple(token for turn in turns for token in turn),
        tuple(number % 2 == 1 for number, turn in enumerate(turns) for _ in turn),
    )


def _encode_turns(turns: Sequence[str], codec: TextCodec) -> list[tuple[int, ...]]:
    """Token ids of each turn, behind those of all turns before it."""
    encoded = [codec.prompt_ids(turns[0])]
    text = turns[0]
    for turn in turns[1:]:
        before = [token for ids in encoded for token in ids]
        encoded.append(codec.response_ids(text, before, turn))
        text += turn
    return encoded


def _checked_turns(sample: Any, name: str, pairs_only: bool) -> Sequence[str]:
    """The sample, where it is what its type says.

    Raises:
        DataError: it is not.
    """
    if not isinstance(sample, Sequence) or not all(isinstance(turn, str) for turn in sample):
        raise DataError(
            f"{name} is neither a string nor a list of strings [prompt, output, ...] "
            f"(got {type(sample).__name__})"
        )
    if len(sample) == 0 or len(sample) % 2:
        raise DataError(f"{name} has {len(sample)} turns: give prompts and outputs by turns, an even number")
    if pairs_only and len(sample) != 2:
        raise DataError(f"{name} has {len(sample)} turns; an encoder-decoder takes two: [prompt, output]")
    return sample


def _truncate(sample: TokenizedSample, name: str, max_tokens: int, side: str) -> TokenizedSample:
    if len(sample.token_ids) <= max_tokens:
        return sample
    window = slice(-max_tokens, None) if side == "left" else slice(max_tokens)
    # What comes first now may have been an action; nothing is left of the state it was chosen in.
    learned = (False, *sample.loss_mask[window][1:])
    if not any(learned):
        raise DataError(
            f"{name} has no action left: the first {max_tokens} of its {len(sample.token_ids)} "
            "tokens, which the model's window holds, are prompt; shorten it, or set "
            "`tokenizer.truncation_side=left`"
        )
    return TokenizedSample(sample.token_ids[window], learned)

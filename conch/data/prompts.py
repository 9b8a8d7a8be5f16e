"""Prompts: checked and tokenised once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from conch.config import DataConfig, TokenizerConfig
from conch.data.chat import TEMPLATE_KEYS, dialogue_of_row, render_prompt
from conch.data.files import Rows, place_of, usable
from conch.data.formats import fitting, in_form, prompt_form
from conch.data.text import TextCodec
from conch.errors import DataError
from conch.log import get_logger
from conch.types import Prompt

_log = get_logger(__name__)


def make_prompts(
    prompts: Iterable[str | Mapping[str, Any]],
    codec: TextCodec,
    config: TokenizerConfig,
    *,
    max_tokens: int | None,
) -> list[Prompt]:
    """Tokenise prompts given as strings, or as dicts with a "prompt" key, a string or a dialogue that the
    tokenizer's chat template renders, whose other keys become metadata.

    codec: encodes them; see `conch.data.text`.
    max_tokens: the model's window less the longest completion; None where the model has no limit.

    Raises:
        DataError: see `usable_prompts` and `fit_prompts`.
    """
    return fit_prompts(usable_prompts(prompts, codec), codec, config, max_tokens=max_tokens)


def usable_prompts(
    prompts: Iterable[Any], codec: TextCodec, *, lengths: DataConfig | None = None
) -> Rows[Prompt]:
    """Tokenise prompts, as `make_prompts` takes them, of any length; each has its name among the rows as its
    place.

    Prompts that the chat template or the tokenizer refuses are left out; one warning counts and names them.

    lengths: which prompts to leave out for their length.

    Raises:
        DataError: there are none, one is not a prompt, or all are refused.
    """
    rows = in_form(prompts, "prompt", _form)
    made, indices = usable(rows, "prompt", lambda row, name: _make_prompt(row, name, codec))
    if lengths is not None:
        fits = fitting([len(each.token_ids) for each in made], lengths, "prompts")
        made, indices = [made[number] for number in fits], [indices[number] for number in fits]
    return Rows(made, (place_of(rows, index, "prompt") for index in indices))


def fit_prompts(
    prompts: Sequence[Prompt], codec: TextCodec, config: TokenizerConfig, *, max_tokens: int | None
) -> list[Prompt]:
    """Prompts that leave room for a completion: what is too long is cut, where the config allows it.

    max_tokens: see `make_prompts`.

    Raises:
        DataError: one is too long, and may not be cut.
    """
    limits = [limit for limit in (max_tokens, config.max_prompt_tokens) if limit is not None]
    return _fitted(prompts, min(limits), codec, config) if limits else list(prompts)


def _fitted(
    prompts: Sequence[Prompt], max_tokens: int, codec: TextCodec, config: TokenizerConfig
) -> list[Prompt]:
    too_long = [index for index, prompt in enumerate(prompts) if len(prompt.token_ids) > max_tokens]
    if not too_long:
        return list(prompts)
    if not config.truncate_prompts:
        longest = max(too_long, key=lambda index: len(prompts[index].token_ids))
        name = place_of(prompts, longest, "prompt")
        raise DataError(
            f"{len(too_long)} of {len(prompts)} prompts are longer than the {max_tokens} tokens that the "
            f"model's window leaves them, or `tokenizer.max_prompt_tokens` ({name} has "
            f"{len(prompts[longest].token_ids)}): leave training prompts out with "
            f"`data.max_tokens={max_tokens}`, cut them with `tokenizer.truncate_prompts=true`, or lower "
            "`generation.max_new_tokens`"
        )
    side = config.truncation_side
    _log.warning("%d of %d prompts cut to %d tokens on the %s", len(too_long), len(prompts), max_tokens, side)
    return [_truncate(prompt, max_tokens, codec, side) for prompt in prompts]


def _form(prompt: Any, name: str) -> Any:
    try:
        return prompt_form(prompt)
    except DataError as error:
        raise DataError(f"{name} {error}") from None


def _make_prompt(row: Any, name: str, codec: TextCodec) -> Prompt:
    row = {"prompt": row} if isinstance(row, str) else row
    dialogue = dialogue_of_row(row, "prompt")
    if dialogue is None:
        text, own_keys = row["prompt"], ("prompt",)
        ids = codec.prompt_ids(text)
    else:
        text, own_keys = render_prompt(dialogue, name, codec.tokenizer), ("prompt", *TEMPLATE_KEYS)
        ids = codec.rendered_ids(text)
    metadata = {key: value for key, value in row.items() if key not in own_keys}
    if not ids:
        raise DataError(f"{name} is empty once tokenised")
    return Prompt(text=text, token_ids=ids, metadata=metadata, dialogue=dialogue)


def _truncate(prompt: Prompt, max_tokens: int, codec: TextCodec, side: str) -> Prompt:
    if len(prompt.token_ids) <= max_tokens:
        return prompt
    ids = codec.cut(prompt.token_ids, max_tokens, side)
    return Prompt(text=codec.prompt_text(ids), token_ids=ids, metadata=prompt.metadata)

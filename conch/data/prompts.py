"""Prompts: checked and tokenised once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from conch.config import TokenizerConfig
from conch.errors import DataError
from conch.log import get_logger
from conch.types import Prompt

_log = get_logger(__name__)


def make_prompts(
    prompts: Sequence[str | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    config: TokenizerConfig,
    *,
    max_tokens: int | None,
) -> list[Prompt]:
    """Tokenise prompts given as strings, or as dicts with a "prompt" key whose other keys become metadata.

    max_tokens: the model's window less the longest completion; None where the model has no limit.

    Raises:
        DataError: there are none, one is not a prompt, is empty, or does not fit (and may not be truncated).
    """
    if isinstance(prompts, str):  # also a sequence of strings: its letters
        raise DataError("the prompts are one string: give a list of prompts")
    if len(prompts) == 0:
        raise DataError("the list of prompts is empty: give at least one prompt")
    made = [_make_prompt(prompt, index, tokenizer) for index, prompt in enumerate(prompts)]
    if max_tokens is None:
        return made
    too_long = [index for index, prompt in enumerate(made) if len(prompt.token_ids) > max_tokens]
    if not too_long:
        return made
    if not config.truncate_prompts:
        worst = max(too_long, key=lambda index: len(made[index].token_ids))
        raise DataError(
            f"{len(too_long)} of {len(made)} prompts are longer than the {max_tokens} tokens that the model's"
            f" window leaves them (prompt {worst} has {len(made[worst].token_ids)}): shorten them, lower "
            "`generation.max_new_tokens`, or set `tokenizer.truncate_prompts=true`"
        )
    side = config.truncation_side
    _log.warning("%d of %d prompts cut to %d tokens on the %s", len(too_long), len(made), max_tokens, side)
    return [_truncate(prompt, max_tokens, tokenizer, side) for prompt in made]


def _make_prompt(prompt: Any, index: int, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    metadata: dict[str, Any] = {}
    text = prompt
    if isinstance(prompt, Mapping):
        metadata = {key: value for key, value in prompt.items() if key != "prompt"}
        text = prompt.get("prompt")
    if not isinstance(text, str):
        raise DataError(
            f'prompt {index} is neither a string nor a dict with a "prompt" string '
            f"(got {type(text).__name__})"
        )
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise DataError(f"prompt {index} is empty once tokenised: drop it, or start it with a bos token")
    return Prompt(text=text, token_ids=ids, metadata=metadata)


def _truncate(prompt: Prompt, max_tokens: int, tokenizer: PreTrainedTokenizerBase, side: str) -> Prompt:
    if len(prompt.token_ids) <= max_tokens:
        return prompt
    ids = prompt.token_ids[-max_tokens:] if side == "left" else prompt.token_ids[:max_tokens]
    text = str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
    return Prompt(text=text, token_ids=ids, metadata=prompt.metadata)

"""Prompts that leave room for a completion in the window of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conch.config import DataConfig, GenerationConfig, TokenizerConfig
from conch.data.prompts import make_prompts
from conch.errors import ConfigError
from conch.models.loading import context_window
from conch.types import Prompt


def tokenize_prompts(
    prompts: Sequence[str | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    config: TokenizerConfig,
    model: PreTrainedModel,
    generation: GenerationConfig,
    lengths: DataConfig | None = None,
    max_model_len: int | None = None,
) -> list[Prompt]:
    """Prompts that leave room in the model's window for the longest completion.

    lengths: which prompts to leave out for their length. max_model_len: the sampler's own limit, in tokens.

    Raises:
        ConfigError, DataError: see `longest_prompt` and `conch.data.prompts.make_prompts`.
    """
    room = longest_prompt(model, generation, max_model_len)
    return make_prompts(prompts, tokenizer, config, max_tokens=room, lengths=lengths)


def longest_prompt(
    model: PreTrainedModel, generation: GenerationConfig, max_model_len: int | None = None
) -> int | None:
    """Tokens that the model's window, or the sampler's where it is shorter, leaves for a prompt; None where
    there is no limit.

    Raises:
        ConfigError: none are left, or `max_model_len` is longer than the model's window.
    """
    window = context_window(model.config)
    if window is not None and max_model_len is not None and max_model_len > window:
        raise ConfigError(
            f"`rollout.max_model_len` = {max_model_len} is longer than the model's window of {window} tokens"
        )
    window = max_model_len or window
    if window is None:
        return None
    if window <= generation.max_new_tokens:
        raise ConfigError(
            f"`generation.max_new_tokens` = {generation.max_new_tokens} leaves no room for a prompt in the "
            f"model's window of {window} tokens"
        )
    return window - generation.max_new_tokens

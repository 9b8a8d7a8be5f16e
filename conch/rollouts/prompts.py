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
    window: int | None = None,
) -> list[Prompt]:
    """Prompts that leave room in the model's window for the longest completion.

    lengths: which prompts to leave out for their length. window: the sampler's own, in tokens.

    Raises:
        ConfigError, DataError: see `room_for_prompts` and `conch.data.prompts.make_prompts`.
    """
    room = room_for_prompts(model, generation, window)
    return make_prompts(prompts, tokenizer, config, max_tokens=room, lengths=lengths)


def room_for_prompts(
    model: PreTrainedModel, generation: GenerationConfig, sampler_window: int | None = None
) -> int | None:
    """Tokens that the model's window, or the sampler's where it is shorter, leaves for a prompt; None where
    there is no limit.

    Raises:
        ConfigError: none are left, or the sampler's window is longer than the model's.
    """
    window = context_window(model.config)
    if window is not None and sampler_window is not None and sampler_window > window:
        raise ConfigError(
            f"`rollout.window` = {sampler_window} is longer than the model's window of {window} tokens"
        )
    window = sampler_window or window
    if window is None:
        return None
    if window <= generation.max_new_tokens:
        raise ConfigError(
            f"`generation.max_new_tokens` = {generation.max_new_tokens} leaves no room for a prompt in the "
            f"model's window of {window} tokens"
        )
    return window - generation.max_new_tokens

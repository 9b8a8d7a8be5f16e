"""Prompts that leave room for a completion in the model's window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from conch.config import GenerationConfig, TokenizerConfig
from conch.data.prompts import make_prompts
from conch.data.text import TextCodec
from conch.errors import ConfigError
from conch.models.loading import context_window
from conch.types import Prompt


def tokenize_prompts(
    prompts: Sequence[str | Mapping[str, Any]],
    codec: TextCodec,
    config: TokenizerConfig,
    model: PreTrainedModel,
    generation: GenerationConfig,
) -> list[Prompt]:
    """Tokenize prompts so that each leaves room for the longest completion.

    Raises:
        ConfigError, DataError: see `longest_prompt` and `conch.data.prompts.make_prompts`.
    """
    return make_prompts(prompts, codec, config, max_tokens=longest_prompt(model, generation))


def longest_prompt(
    model: PreTrainedModel, generation: GenerationConfig, max_model_len: int | None = None
) -> int | None:
    """Tokens that the longest completion leaves for a prompt; None where there is no limit.

    max_model_len: the sampler's limit on prompt and completion together, where it is below the model's
        window.

    Raises:
        ConfigError: no token is left, or `max_model_len` exceeds the model's window.
    """
    window = context_window(model.config)
    if window is not None and max_model_len is not None and max_model_len > window:
        raise ConfigError(
            f"`rollout.max_model_len` = {max_model_len} is longer than the model's window of {window} tokens"
        )
    limit = max_model_len or window
    if limit is None:
        return None
    if limit <= generation.max_new_tokens:
        raise ConfigError(
            f"`generation.max_new_tokens` = {generation.max_new_tokens} leaves no room for a prompt in the "
            f"model's window of {limit} tokens"
        )
    return limit - generation.max_new_tokens

"""Helpers of engines that submit all prompts at once: order of the chunks, seeds, length check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from conch.config import GenerationConfig
from conch.errors import ConfigError
from conch.types import OnFinished, Prompt, Rollout


def in_order(
    prompts: Sequence[Prompt],
    finished: Iterator[dict[int, Rollout]],
    chunk_size: int,
    on_finished: OnFinished | None,
) -> Iterator[list[Rollout]]:
    """Yield chunks in the order of `prompts` from rollouts that arrive in the order in which they end.

    finished: rollouts by the index of their prompt; every prompt comes once.
    chunk_size: rollouts per chunk; the last chunk may be shorter.
    on_finished: called with each item of `finished` as it arrives.
    """
    rollouts: dict[int, Rollout] = {}
    start = 0
    for ended in finished:
        rollouts |= ended
        if on_finished is not None:
            on_finished(ended)
        while start < len(prompts):
            chunk = range(start, min(start + chunk_size, len(prompts)))
            if not rollouts.keys() >= set(chunk):
                break
            yield [rollouts[index] for index in chunk]
            start = chunk.stop


def draw_seeds(count: int) -> list[int]:
    """Draw a seed for each completion from torch's generator: a run repeats, whatever is batched together."""
    return torch.randint(2**31, (count,)).tolist()


def check_lengths(prompts: Sequence[Prompt], config: GenerationConfig, max_model_len: int | None) -> None:
    """Refuse prompts whose completions vLLM would cut short, or that it would refuse while it samples.

    max_model_len: longest prompt and completion together, in tokens; None where there is no limit.

    Raises:
        ConfigError: names the longest prompt.
    """
    longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
    if max_model_len is not None and longest + config.max_new_tokens > max_model_len:
        raise ConfigError(
            f"a prompt of {longest} tokens and `generation.max_new_tokens` = {config.max_new_tokens} do not "
            f"fit vLLM's `max_model_len` of {max_model_len}: raise it in `rollout` or in the settings of the "
            f"servers, or set `data.max_tokens` to {max(1, max_model_len - config.max_new_tokens)}"
        )

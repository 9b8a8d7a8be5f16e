"""What every engine that samples all prompts at once does with them."""

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
    """Chunks in the order of `prompts`, from rollouts in the order in which they end."""
    made: dict[int, Rollout] = {}
    start = 0
    for ended in finished:
        made |= ended
        if on_finished is not None:
            on_finished(ended)
        while start < len(prompts):
            places = range(start, min(start + chunk_size, len(prompts)))
            if not made.keys() >= set(places):
                break
            yield [made[place] for place in places]
            start = places.stop


def draw_seeds(count: int) -> list[int]:
    """One for each completion, from torch's generator: so a run repeats, whatever is batched together."""
    return torch.randint(2**31, (count,)).tolist()


def check_lengths(prompts: Sequence[Prompt], config: GenerationConfig, max_model_len: int | None) -> None:
    """Refuse prompts that vLLM would cut completions of short, or refuse in the middle of its work.

    Raises:
        ConfigError: names the longest.
    """
    longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
    if max_model_len is not None and longest + config.max_new_tokens > max_model_len:
        raise ConfigError(
            f"a prompt of {longest} tokens and `generation.max_new_tokens` = {config.max_new_tokens} do not "
            f"fit vLLM's `max_model_len` of {max_model_len}: raise it in `rollout` or in the servers' "
            f"settings, or set `data.max_tokens` to {max(1, max_model_len - config.max_new_tokens)}"
        )

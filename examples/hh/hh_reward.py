"""The reward of Helpful & Harmless: GPT-J's where nobody named another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from conch.config import RewardConfig
from conch.rewards.base import RewardSource
from conch.rewards.factory import from_user
from examples.hosting import HostedConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HostedGPTJ(HostedConfig):
    """The reward model that the programs host: GPT-J's unless they are told otherwise."""

    name: str = "gptj-rm-static"
    """Model in the store."""

    checkpoint: str = "Dahoas/gptj-rm-static"
    """Folder or hub id of the reward model."""

    base_model: str | None = "EleutherAI/gpt-j-6B"
    """What a checkpoint builds on that holds no model of its own; None for one that does."""

    revision: str | None = "676bfd4d"
    """Commit of the checkpoint."""


def delta_source(
    endpoint: str,
    config: RewardConfig,
    prompts: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
) -> RewardSource:
    """The reward less that of each prompt's chosen answer, for programs that only measure it."""
    from conch.training.setup import less_originals  # loads torch, which help and mistyped keys do without

    return less_originals(from_user(endpoint, config), prompts, tokenizer)

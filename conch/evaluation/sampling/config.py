"""Configuration of `conch best-of-n`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from conch.config import (
    DataConfig,
    GenerationConfig,
    JudgeConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    Section,
    TokenizerConfig,
)
from conch.config.reward import VERIFIER, source_in_short
from conch.data.files import check_rows_named
from conch.rewards.factory import check_reward_named, shared_reward

CONFIG_NAME = "best_of_n"
"""File below `configs/` that runs where none is named."""


class BestOfNConfig(Section):
    """How many completions are sampled, what is told of them, and where they are kept."""

    num_samples: int = Field(default=256, ge=1)
    """Completions of each prompt, N. A later call with more samples only the missing ones."""

    ns: tuple[int, ...] = ()
    """Numbers of completions to choose from, each at most `num_samples`; () takes the powers of two, of all
    completions that are kept."""

    bootstrap: int = Field(default=1000, ge=0)
    """Bootstrap samples of the prompts, of which the intervals are 95 % percentiles; 0 gives no intervals."""

    seed: int = Field(default=0, ge=0)
    """Seeds sampling and bootstrap."""

    output_dir: Path = Path("outputs/best_of_n")
    """Folder of the completions with all their scores, `samples/`, and of the results."""

    name: str = Field(default="", pattern=r"^[\w.=+-]*$")
    """Folder of the results below `output_dir`, so that those of several proxies stand beside each other."""

    save_every: int = Field(default=512, ge=1)
    """Completions that a process samples and scores between two writes to the disk."""

    collective_timeout_s: float = Field(default=3600.0, gt=0)
    """Longest wait of a process for the others, in seconds: that to sample and score `save_every`."""

    @model_validator(mode="after")
    def _enough_samples(self) -> BestOfNConfig:
        if too_large := [n for n in self.ns if not 1 <= n <= self.num_samples]:
            raise ValueError(
                f"`ns` has {too_large[0]}, and the best of n can be told for n from 1 to `num_samples` = "
                f"{self.num_samples}: leave it out, or sample more"
            )
        return self

    def choices(self, num_kept: int) -> tuple[int, ...]:
        """`ns`, in order. num_kept: completions of each prompt that are there."""
        powers = (2**power for power in range(max(num_kept, self.num_samples).bit_length()))
        return tuple(sorted(set(self.ns or powers)))


class BestOfNRunConfig(Section):
    """Best-of-n: what the completion with the highest proxy score among n is worth by gold."""

    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    generation: GenerationConfig = GenerationConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    """The proxy, which chooses: one source, or several `members` as `combine` says."""

    gold: RewardConfig | None = None
    """What the choice is judged by; also in short, as `gold=host:port/model`, `verifier:gsm8k`,
    `judge:FILE.yaml` or `file.py:function`. None looks at the proxy alone."""

    best_of_n: BestOfNConfig = BestOfNConfig()

    @field_validator("gold", mode="before")
    @classmethod
    def _gold_in_short(cls, gold: Any) -> Any:
        return source_in_short(gold) if isinstance(gold, str) else gold

    @model_validator(mode="after")
    def _scores_once(self) -> BestOfNRunConfig:
        for name, config in (("reward", self.reward), ("gold", self.gold)):
            for key in ("dense", "delta", "record", "replay"):
                if config is not None and getattr(config, key):
                    raise ValueError(f"`{name}.{key}` is for rewards that are learned from: leave it out")
        if self.gold is None:
            return self
        if not self.gold.named_by:
            raise ValueError(
                "`gold` names no source: give `gold=host:port/model`, `gold.url`, `gold.function`, "
                "`gold.verifier`, `gold.judge` or `gold.members`, or leave all of `gold` out"
            )
        for name, source in _sources(self.gold).items():
            if shared_reward(source, self.gold, None, self.reward) is not None:
                raise ValueError(
                    f"the gold model is the proxy, {name}: what the proxy chooses must be judged by another"
                )
        return self


def check_sources_named(config: BestOfNRunConfig) -> None:
    """See that proxy, gold and prompts are named, and that their files are there: all that takes no torch.

    Raises:
        ConfigError, DataError: they are not.
    """
    check_reward_named(config.reward, required=True)
    if config.gold is not None:
        check_reward_named(config.gold, required=True)
    check_rows_named(config.data, "prompts", training=False)


def _sources(config: RewardConfig) -> dict[str, str | JudgeConfig]:
    """What a section asks, by its names."""
    verifier = None if config.verifier is None else VERIFIER + config.verifier
    words = [name for name in (config.url, config.function, verifier, *config.members.values()) if name]
    judge = {f"the judge {config.judge.file or config.judge.model}": config.judge}
    return {word: word for word in words} | (judge if config.judge.is_set else {})

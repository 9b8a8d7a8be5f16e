"""The laboratory's own settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from conch.config import Section

ROOT = Path(__file__).resolve().parents[3]


class LaboratoryConfig(Section):
    """The laboratory's own settings; those of its trainers stand in `configs/laboratory/`."""

    seed: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of whole chains: data, starting policy, members and policies; `seed=1` or `seed=[0,1,2]`."""

    output: Path = ROOT / "outputs/laboratory"
    """Where everything goes, one folder a seed."""

    workers: int = Field(default=2, ge=1)
    """Processes that work at once, each on one core."""

    num_demonstrations: int = Field(default=3000, ge=128)
    """Texts that the starting policy imitates."""

    num_pairs: int = Field(default=1000, ge=64)
    """Labelled pairs that a member learns from, each member from others."""

    label_noise: float = Field(default=0.25, ge=0, lt=0.5)
    """Share of the pairs' labels that are wrong."""

    num_members: int = Field(default=5, ge=2)
    """Reward models of the ensemble."""

    num_single: int = Field(default=5, ge=1)
    """Members on each of which alone a policy is trained; at most `num_members`."""

    best_of: int = Field(default=4096, ge=2)
    """Samples of each prompt for best-of-n, and the largest n."""

    num_start_texts: int = Field(default=4000, ge=100)
    """Texts of the starting policy that gold and proxies are normalised on."""

    ppo_steps: int | None = Field(default=None, ge=1)
    """Steps of PPO; None takes those of `configs/laboratory/ppo.yaml`."""

    eval_repeats: int | None = Field(default=None, ge=1)
    """Completions of each of the eight prompts in an evaluation of PPO; None takes those of the same file."""

    @field_validator("seed", mode="before")
    @classmethod
    def _one_or_several(cls, seed: Any) -> Any:
        return (seed,) if isinstance(seed, int) else seed

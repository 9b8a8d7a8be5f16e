"""Settings of supervised fine-tuning."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from conch.config.base import Section
from conch.config.evaluation import EvaluationConfig
from conch.config.generation import EvalGenerationConfig, GenerationConfig
from conch.config.reward import RewardConfig
from conch.config.run import RunConfig


class SFTConfig(Section):
    """The algorithm's own settings."""

    batch_size: int = Field(default=32, ge=1)
    """Samples per optimizer update, over all processes; packing only changes how they are laid out."""

    max_length: int | None = Field(default=None, ge=2)
    """Longest sample in tokens, and with `packing` longest row; None takes the model's window. What is longer
    is cut on `tokenizer.truncation_side`."""

    packing: bool = False
    """Lay several samples in one row, none of which sees another: the same result with less padding."""

    chat_template: Path | None = None
    """File with a Jinja chat template for dialogues, instead of the tokenizer's own; saved with the model."""


class SFTRunConfig(RunConfig):
    """Everything an SFT run is made from."""

    generation: GenerationConfig = GenerationConfig()
    eval_generation: EvalGenerationConfig = EvalGenerationConfig()
    reward: RewardConfig = RewardConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sft: SFTConfig = SFTConfig()


RUN_CONFIG = SFTRunConfig

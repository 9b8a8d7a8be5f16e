"""Settings of reward models: `trainers/reward_model.py` has the formulas."""

from __future__ import annotations

import string
from pathlib import Path

from pydantic import Field, field_validator

from conch.config.base import Section
from conch.config.run import RunConfig

CHAT = "chat"
"""Template of models that read dialogues: the tokenizer's own chat template."""


class RewardModelConfig(Section):
    """The algorithm's own settings."""

    batch_size: int = Field(default=64, ge=1)
    """Texts or pairs per optimizer update, over all processes."""

    template: str | None = None
    """How a text is presented to the model; {text} is prompt and output, {eos} the eos token. `chat` takes
    dialogues, which the tokenizer's chat template renders, in training and in what is served. None is `chat`
    for rows of dialogues, for others `{text}{eos}`, or `{text}` where the tokenizer closes a text itself."""

    max_length: int | None = Field(default=None, ge=2)
    """Longest formatted text in tokens, longer ones are cut; None takes the model's window."""

    center_coef: float = Field(default=0.0, ge=0)
    """Weight of the squared sum of a pair's scores in the loss, which keeps scores around 0; try 0.01."""

    eval_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the rows to hold out for evaluation where no evaluation rows are given. `train.seed` alone
    draws them: they are the same for all members of an ensemble."""

    normalise: bool = False
    """For pairs: divide the head by the standard deviation of scores on the reference texts before training,
    and have the served model return scores of mean 0 and standard deviation 1 on them."""

    reference: Path | None = None
    """File of the reference texts for the command line: `.txt`, or `.jsonl` of strings. None takes texts of
    the evaluation rows (the training rows without these), of pairs the chosen ones, 1,000 at most."""

    rng_seed: int | None = Field(default=None, ge=0)
    """Names a member of an ensemble: seeds new weights (the head, or all of a model without `model.path`) and
    the order of the data. None takes `train.seed`."""

    @field_validator("template")
    @classmethod
    def _has_text(cls, template: str | None) -> str | None:
        if template not in (None, CHAT) and (mistake := template_mistake(template)):
            raise ValueError(mistake)
        return template


class RewardModelRunConfig(RunConfig):
    """Everything a reward-model run is made from."""

    reward_model: RewardModelConfig = RewardModelConfig()


RUN_CONFIG = RewardModelRunConfig


def template_mistake(template: str) -> str | None:
    """Why this is not a format string with {text} once, at most {eos} beside it; None where it is."""
    try:
        fields = [
            (name, spec, how) for _, name, spec, how in string.Formatter().parse(template) if name is not None
        ]
    except ValueError as error:
        return f"template {template!r} is not a format string: {error}"
    names = [name for name, _, _ in fields]
    if (
        names.count("text") != 1
        or set(names) - {"text", "eos"}
        or any(spec or how for _, spec, how in fields)
    ):
        return f"template {template!r} must hold {{text}} once, may hold {{eos}}, and nothing else in {{}}"
    return None

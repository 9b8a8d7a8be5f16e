"""How completions are sampled."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from conch.config.base import Section


class GenerationConfig(Section):
    """How completions are sampled."""

    max_new_tokens: int = Field(default=64, ge=1)
    """Longest completion, in tokens."""

    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits, in sampling and in the log-probs that are trained on."""

    top_k: int = Field(default=0, ge=0)
    """Sample among the k likeliest tokens; 0 turns it off."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample among the likeliest tokens that hold this much probability; 1 turns it off."""

    stop: tuple[str, ...] = ()
    """Stop strings: the completion ends before the first of them, or with it where it is a special token."""

    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Further tokens that end a completion, beside the tokenizer's eos and those that the model's own
    `generation_config` names; the token stays in what is learned."""

    skip_special_tokens: bool = True
    """Leave special tokens out of a completion's text, which rewards and stop strings read; False keeps all
    but the one that ended it (for a reward that looks for `<think>`, where that is a special token)."""

    chunk_size: int = Field(default=32, ge=1)
    """Prompts generated at once per process. A served reward is asked for as soon as a completion has ended,
    a Python function's when its chunk has, while the next is generated."""

    @property
    def cuts(self) -> bool:
        """Whether some tokens of the policy's are never sampled."""
        return self.top_k > 0 or self.top_p < 1.0


class EvalGenerationConfig(Section):
    """How completions for evaluation are sampled, where it differs from `generation`.

    One of these may be a list: each value is then evaluated, and its metrics are named `...@key=value`.
    """

    max_new_tokens: int | list[int] | None = None
    """As in `generation`; None takes what stands there."""

    temperature: float | list[float] | None = None
    """As in `generation`; None takes what stands there."""

    top_k: int | list[int] | None = None
    """As in `generation`; None takes what stands there."""

    top_p: float | list[float] | None = None
    """As in `generation`; None takes what stands there."""

    do_sample: bool | list[bool] = True
    """False takes the likeliest token at each step (greedy decoding)."""

    @model_validator(mode="after")
    def _one_list(self) -> EvalGenerationConfig:
        swept = [name for name in type(self).model_fields if isinstance(getattr(self, name), list)]
        if len(swept) > 1:
            raise ValueError(f"only one key may be a list, not both `{swept[0]}` and `{swept[1]}`")
        if swept and not getattr(self, swept[0]):
            raise ValueError(f"`{swept[0]}` is an empty list: give the values to evaluate")
        return self

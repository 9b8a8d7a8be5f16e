"""Settings of the verifiers: how GSM8K's answers and IFEval's instructions are checked and rewarded."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from conch.config.base import Section

VerifierName = Literal["gsm8k", "ifeval"]
GSM8KExtractor = Literal["strict", "flexible", "verl", "math"]
GSM8KVersion = Literal["plain", "whole", "torchrl", "seed"]
IFEvalVersion = Literal["share", "torchrl"]


class GSM8KConfig(Section):
    """Check of a number against the answer of a GSM8K row. docs/verifiable_rewards.md tells who is wrong
    where."""

    extractor: GSM8KExtractor = "math"
    """How the answer is found: `math` by math-verify, which needs the extra `math` and is wrong least often;
    `strict` and `flexible` as lm-eval's task gsm8k version 3 scores; `verl` as verl does."""

    last_characters: int | None = Field(default=None, ge=1)
    """With `extractor=verl`: look at so many characters at the end only; verl takes 300. None takes all."""

    version: GSM8KVersion = "plain"
    """The reward: `plain` 1 or 0, by the first <answer>, or without one by the text outside of <think>;
    `whole` 1 or 0, by the whole text, as lm-eval, verl and math-verify read it; `torchrl` 1.0, 0.1 for an
    answer in <answer> tags that is wrong, or 0; `seed` 100 for a right answer in <answer> tags, or the sum of
    20 (a later one is right), 10 (one contains the right number), 5 (one <answer>) and 5 (one <think>)."""

    processes: int = Field(default=2, ge=1)
    """With `extractor=math`: processes that check, for each process of the trainer."""

    check_timeout_s: float = Field(default=5.0, gt=0)
    """With `extractor=math`: longest time of one check, in seconds; a late one gives no reward, status
    `timeout`."""

    @model_validator(mode="after")
    def _every_key_acts(self) -> GSM8KConfig:
        if self.last_characters is not None and self.extractor != "verl":
            raise ValueError(
                f"`last_characters` = {self.last_characters} acts with `extractor` = verl only, not with "
                f"{self.extractor}: leave it out"
            )
        return self


class IFEvalConfig(Section):
    """Check of the instructions of an IFEval row."""

    version: IFEvalVersion = "share"
    """The reward: `share` of the instructions that are followed, once the thinking is removed; `torchrl` 0.4,
    0.3, 0.2 and 0.1 times the four scores (prompt and instructions, strict and loose) and its terms for
    tags."""

    loose: bool = False
    """With `version=share`: an instruction counts that any of the eight loose readings follows."""

    @model_validator(mode="after")
    def _every_key_acts(self) -> IFEvalConfig:
        if self.loose and self.version != "share":
            raise ValueError(
                f"`loose` acts with `version` = share only; {self.version} weighs strict and loose scores: "
                "leave it out"
            )
        return self

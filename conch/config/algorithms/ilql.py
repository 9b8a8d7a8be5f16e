"""Settings of ILQL: `trainers/ilql.py` has its formulas."""

from __future__ import annotations

from pydantic import Field

from conch.config.base import Section
from conch.config.evaluation import EvaluationConfig
from conch.config.generation import EvalGenerationConfig, GenerationConfig
from conch.config.reward import RewardConfig
from conch.config.run import RunConfig


class ILQLConfig(Section):
    """The algorithm's own settings."""

    batch_size: int = Field(default=32, ge=1)
    """Samples per optimizer update, over all processes."""

    num_q_heads: int = Field(default=2, ge=1)
    """Q functions, the least of which counts."""

    gamma: float = Field(default=0.99, ge=0, le=1)
    """Discount per action."""

    tau: float = Field(default=0.7, gt=0, lt=1)
    """Expectile of Qhat that V is regressed on: 0.5 is the mean, towards 1 the best action."""

    alpha: float = Field(default=0.005, gt=0, le=1)
    """Part of the way that target heads go towards their Q heads at once."""

    steps_for_target_q_sync: int = Field(default=1, ge=1)
    """k, updates from one such move to the next."""

    q_coef: float = Field(default=1.0, ge=0)
    """c_Q."""

    v_coef: float = Field(default=1.0, ge=0)
    """c_V."""

    cql_scale: float = Field(default=0.1, ge=0)
    """c_CQL, which holds down the values of tokens that no sample has."""

    awac_scale: float = Field(default=1.0, ge=0)
    """c_AWAC."""

    awac_beta: float = Field(default=0.0, ge=0)
    """eta: how much more the language model learns of better actions."""

    normalise_rewards: bool = True
    """Shift and scale the rewards of all samples to mean 0 and standard deviation 1."""


class ILQLGenerationConfig(GenerationConfig):
    """How completions are sampled, with the heads' say in it."""

    top_k: int = Field(default=20, ge=0)
    """Sample among the k likeliest tokens; 0 turns it off."""

    beta: float = Field(default=1.0, ge=0)
    """Weight of the advantages in decoding; 0 is the language model alone."""


class ILQLEvalGenerationConfig(EvalGenerationConfig):
    """How completions for evaluation are sampled, where it differs from `generation`.

    One of these may be a list: each value is then evaluated, and its metrics are named `...@key=value`.
    """

    beta: float | list[float] | None = None
    """As in `generation`; None takes what stands there."""


class ILQLRunConfig(RunConfig):
    """Everything an ILQL run is made from."""

    generation: ILQLGenerationConfig = ILQLGenerationConfig()
    eval_generation: ILQLEvalGenerationConfig = ILQLEvalGenerationConfig()
    reward: RewardConfig = RewardConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    ilql: ILQLConfig = ILQLConfig()


RUN_CONFIG = ILQLRunConfig

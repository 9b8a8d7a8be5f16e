"""The sections of a run's configuration, validated and frozen.

Each algorithm composes the sections it needs into its own run config (see `algorithms/ppo.py`). A constructor
takes its own section, never the whole. Unknown keys are refused with the nearest valid name. `load` turns a
plain mapping into a section and pydantic's report into one readable ConfigError.
"""

from __future__ import annotations

from conch.config.auth import AuthConfig as AuthConfig
from conch.config.auth import TlsConfig as TlsConfig
from conch.config.base import Section as Section
from conch.config.base import SectionT as SectionT
from conch.config.base import load as load
from conch.config.data import DataConfig as DataConfig
from conch.config.evaluation import GOLD_METRIC as GOLD_METRIC
from conch.config.evaluation import AlarmsConfig as AlarmsConfig
from conch.config.evaluation import EvaluationConfig as EvaluationConfig
from conch.config.evaluation import StopRule as StopRule
from conch.config.generation import EvalGenerationConfig as EvalGenerationConfig
from conch.config.generation import GenerationConfig as GenerationConfig
from conch.config.judge import JudgeConfig as JudgeConfig
from conch.config.judge import JudgeParser as JudgeParser
from conch.config.judge import RubricItem as RubricItem
from conch.config.model import Dtype as Dtype
from conch.config.model import ModelConfig as ModelConfig
from conch.config.model import ReferenceConfig as ReferenceConfig
from conch.config.model import TokenizerConfig as TokenizerConfig
from conch.config.model import full_dtype as full_dtype
from conch.config.optim import OptimizerConfig as OptimizerConfig
from conch.config.optim import SchedulerConfig as SchedulerConfig
from conch.config.reward import EnsembleObjective as EnsembleObjective
from conch.config.reward import EnsembleVariance as EnsembleVariance
from conch.config.reward import FailurePolicy as FailurePolicy
from conch.config.reward import GoalsConfig as GoalsConfig
from conch.config.reward import HttpDialect as HttpDialect
from conch.config.reward import OnMemberFailure as OnMemberFailure
from conch.config.reward import OnModelChange as OnModelChange
from conch.config.reward import RewardAuthConfig as RewardAuthConfig
from conch.config.reward import RewardClientConfig as RewardClientConfig
from conch.config.reward import RewardConfig as RewardConfig
from conch.config.reward import RewardFailureConfig as RewardFailureConfig
from conch.config.rollout import RolloutConfig as RolloutConfig
from conch.config.rollout import RolloutDtype as RolloutDtype
from conch.config.rollout import VLLMSettings as VLLMSettings
from conch.config.run import OnlineRunConfig as OnlineRunConfig
from conch.config.run import RunConfig as RunConfig
from conch.config.run import TrackingConfig as TrackingConfig
from conch.config.run import TrainConfig as TrainConfig
from conch.config.steering import GoalServerConfig as GoalServerConfig
from conch.config.steering import SteeringConfig as SteeringConfig
from conch.config.verifiers import GSM8KConfig as GSM8KConfig
from conch.config.verifiers import IFEvalConfig as IFEvalConfig
from conch.config.verifiers import VerifierName as VerifierName

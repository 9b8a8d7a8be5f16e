"""The run itself: steps, checkpoints, tracking; what every run config has."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from conch.config.base import Section
from conch.config.data import DataConfig
from conch.config.evaluation import EvaluationConfig, StopRule, parse_stop_rule
from conch.config.generation import EvalGenerationConfig, GenerationConfig
from conch.config.model import ModelConfig, ReferenceConfig, TokenizerConfig
from conch.config.optim import OptimizerConfig, SchedulerConfig
from conch.config.reward import RewardConfig
from conch.config.rollout import RolloutConfig


class TrainConfig(Section):
    """Length, numerics and housekeeping of a run."""

    seed: int = Field(default=0, ge=0)
    """Seeds weights, data order and sampling; each rank adds its number to it for sampling."""

    total_steps: int = Field(default=1000, ge=1)
    """Steps of the trainer's loop: optimizer updates offline; one rollout with all its updates for PPO; one
    selection with its updates for RFT."""

    output_dir: Path = Path("outputs")
    """A run's folder is made below: `<output_dir>/<date>/<time>/`."""

    run_dir: Path | None = None
    """Exact folder of the run instead; must not hold another run, unless `resume` continues it."""

    resume: str | None = None
    """Go on with an interrupted run, exactly where a checkpoint left it: the folder of a run or of one of its
    checkpoints, or `auto` for the run in `run_dir` (without one: the newest below `output_dir`), which starts
    anew where there is none."""

    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Micro-batches per optimizer update; changes memory, not the result."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""

    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Autocast precision; None takes what `accelerate launch` was told."""

    num_processes: int | None = Field(default=None, ge=1)
    """Processes this run must have; any other number is refused (some launchers silently start one)."""

    collective_timeout_s: float = Field(default=1800.0, gt=0)
    """Longest wait of a process for the others, in seconds, after which it ends with an error. Must exceed
    what one may do while the rest wait: sample its share of a step (`rollout.deadline_s`), wait for rewards
    (`reward.client.deadline_s`), load a model, write a checkpoint."""

    eval_every: int = Field(default=100, ge=0)
    """Evaluate every so many steps, and at the start and end; 0 never evaluates."""

    eval_repeats: int = Field(default=1, ge=1)
    """Completions sampled per evaluation prompt."""

    save_every: int = Field(default=0, ge=0)
    """Save a checkpoint every so many steps; 0 saves only the last. The end of the run always saves."""

    save_in_background: bool = True
    """Write checkpoints beside training, which waits only while its state is copied in host memory, the
    weights and what of the optimizer's state this machine holds. What comes to stand on the disk is the same.
    Where less than twice the copy's memory is free, and for the last checkpoint, training waits for the write
    as with `false`."""

    keep_last: int | None = Field(default=None, ge=1)
    """Checkpoints to keep beside the best one; older ones are deleted. None keeps all."""

    best_metric: str | None = None
    """Evaluation metric by which the best checkpoint is chosen, for example `eval/reward`; lower is better
    for names that end in `loss`, else higher. None takes the trainer's own choice: `eval/gold/reward` where
    there is an `evaluation.gold`, else the first metric of `metric_fn`, else `eval/reward`; offline
    `eval/loss` or the reward model's accuracy or correlation."""

    early_stopping: int = Field(default=0, ge=0)
    """Stop after so many evaluations in a row without a better `best_metric`; 0 never stops early. One that
    gold decides and was away for does not count."""

    stop_when: str | None = None
    """Stop by a metric of its own: `gold falls for 3 evaluations` once three evaluations in a row were each
    below the best one so far, in gold or in another metric (`eval/reward falls for ...`). One that is as good
    as the best ends the row; one in which most prompts have no figure, as while gold is away, neither ends it
    nor counts. Without a margin any fall counts, noise too: with k = 3 a policy that no longer learns stops
    soon. ` by more than 2 standard errors` behind it counts only an evaluation that is so far below the best,
    in standard errors of the paired difference over prompts."""

    @property
    def stop_rule(self) -> StopRule | None:
        """What `stop_when` says."""
        return None if self.stop_when is None else parse_stop_rule(self.stop_when)

    @field_validator("stop_when")
    @classmethod
    def _stop_rule_can_be_read(cls, text: str | None) -> str | None:
        if text is not None:
            parse_stop_rule(text)
        return text

    @model_validator(mode="after")
    def _stop_rule_can_act(self) -> TrainConfig:
        if self.stop_when is not None and self.eval_every == 0:
            raise ValueError(
                "`stop_when` goes by evaluations, and with `eval_every` = 0 there are none: set one of them"
            )
        return self


class TrackingConfig(Section):
    """Where metrics go. `metrics.jsonl` in the run folder is always written."""

    wandb: bool = False
    """Log to Weights & Biases; never asks for a login: without credentials the run is logged offline."""

    tensorboard: bool = False
    """Log to TensorBoard event files in the run folder."""

    project: str = "conch"
    """Weights & Biases project."""

    sample_rows: int = Field(default=16, ge=0)
    """Rows of each table of samples written to `samples/`."""

    rollouts: bool = False
    """Write every rollout that is trained on to `rollouts/step_N.jsonl`, with its reward and KL."""


class RunConfig(Section):
    """The sections that every trainer's run has; each trainer adds its own.

    The defaults here and in the trainers are all there are: the presets in `configs/` name none.
    """

    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    tracking: TrackingConfig = TrackingConfig()


class OnlineRunConfig(RunConfig):
    """What runs have that sample completions and learn from their rewards."""

    scheduler: SchedulerConfig = SchedulerConfig(name="linear")
    train: TrainConfig = TrainConfig(total_steps=200, eval_every=20)
    generation: GenerationConfig = GenerationConfig()
    eval_generation: EvalGenerationConfig = EvalGenerationConfig()
    rollout: RolloutConfig = RolloutConfig()
    reference: ReferenceConfig = ReferenceConfig()
    reward: RewardConfig = RewardConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _places_in_texts_are_known(self) -> OnlineRunConfig:
        if self.reward.dense and not self.generation.skip_special_tokens:
            raise ValueError(
                "`reward.dense` counts characters of texts without special tokens: leave "
                "`generation.skip_special_tokens` at true"
            )
        return self

"""Settings of `trainer_rl.py`: their names are those of the code of Coste et al. 2023 (arXiv:2310.02743),
below `ppo_config` trlX's.

One that would change nothing here is told and left out, `NO_EFFECT`; one that asks for what is not done here
is refused with the reason, unless its value is what happens anyway, `NOT_HERE`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from conch.config import Dtype, EnsembleObjective, EnsembleVariance, Section
from conch.config.model import full_dtype
from conch.store.manifest import ServedDtype

Objective = Literal["mean", "WCO", "UWO"]
OBJECTIVES: Mapping[Objective, EnsembleObjective] = {"mean": "mean", "WCO": "wco", "UWO": "uwo"}
"""The paper's names -> Conch's."""
Precision = Annotated[ServedDtype, BeforeValidator(full_dtype)]
"""Of served weights; `bf16` and the like will do."""

OPEN_ASSISTANT = "<|prompter|>{instruction}{eos}<|assistant|>"
"""The prompt of OpenAssistant's models, which those of the paper build on."""

NO_EFFECT: Mapping[str, str] = {
    "cache_dir": "the hub's own cache is used (HF_HOME moves it)",
    "local_rank": "the launcher says it",
    "wandb_entity": "`conch.tracking.wandb=true` logs to the account that is logged in",
    "datasets_extra": "name all datasets in `datasets`",
    **{
        f"{section}.{key}": reason
        for section in ("rank_config", "sft_config", "gold_config")
        for key, reason in (
            ("cache_dir", "the hub's own cache is used (HF_HOME moves it)"),
            ("is_reward_model", "the section says it"),
            ("residual_dropout", "dropout is off, so that sampling and training see the same policy"),
            (
                "use_flash_attention",
                "the model's fastest attention is taken; `conch.model.attention` names one",
            ),
        )
    },
    "rank_config.pooling": "the checkpoint says which token is read",
    "sft_config.batch_size": "`ppo_config.train.batch_size` and `ppo_config.method.chunk_size` say it",
    "ppo_config.train.epochs": "`total_steps` ends the run",
    "ppo_config.train.pipeline": "prompts come from `datasets`",
    "ppo_config.train.trainer": "the trainer is Conch's PPO",
    "ppo_config.train.tracker": "`conch.tracking` says where metrics go",
    "ppo_config.train.seq_length": "the model's window bounds a sample",
    "ppo_config.model.model_path": "`sft_config.model_name` names it",
    "ppo_config.tokenizer.tokenizer_path": "it comes with `sft_config.model_name`",
    "ppo_config.tokenizer.padding_side": "no result depends on where padding stands",
    "ppo_config.method.name": "the method is PPO",
    "ppo_config.method.ref_mean": "the mean of rewards is never taken off",
}
"""Settings that change nothing here, with the reason."""

NOT_HERE: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "sft_config.quantization": ((False, None), "no weights are quantised"),
    "sft_config.seq2seqmodel": ((False, None), "encoder-decoders have no prompt that an answer goes on with"),
    "sft_config.freeze_layer": ((None,), "`num_layers_unfrozen` says how many blocks train"),
    "ppo_config.model.model_arch_type": (("causal", None), "policies are decoders"),
    "ppo_config.optimizer.name": (("adamw", None), "there is no other optimizer"),
    "ppo_config.method.gen_kwargs.do_sample": ((True, None), "PPO learns from samples"),
}
"""Settings with one value here, and why there is no other."""


class GoldSettings(Section):
    """The gold reward model, which scores the evaluations once training is over."""

    model_name: str
    """A checkpoint (folder or hub id) or a model of the store, which is served for the evaluation alone; or
    `host:port/model`, `http://host:port/path`, or a function as `file.py:name`."""

    is_alpacafarm_rm: bool = False
    """Show it Alpaca's prompt with the instruction in it, as AlpacaFarm's models read; else what the policy
    read."""

    batch_size: int = Field(default=32, ge=1)
    """Most samples in a request."""

    template: str | None = None
    """How a text is presented to a checkpoint, as in `conch convert --template`; None takes its own."""

    dtype: Precision | None = None
    """Precision that a checkpoint is served in; None takes float16 on a GPU, float32 on a CPU."""


class RankSettings(Section):
    """The reward models to learn from (the proxies)."""

    model_names: tuple[str, ...] = Field(min_length=1)
    """Checkpoints (folders or hub ids), models of the store, or addresses `host:port/model`; several are an
    ensemble. `{seed}` in a single one is what `--rm_seed` says."""

    objective_name: Objective = "mean"
    """Reward of an ensemble: the mean of its members' scores, the lowest (WCO), or the mean less `uwo_weight`
    times their variance (UWO)."""

    uwo_weight: float = Field(default=0.1, ge=0)
    """Cost of a variance of 1, with UWO."""

    variance: EnsembleVariance = "population"
    """What UWO's variance of k members divides by: `population` k, `sample` k - 1, as the paper's PPO does. A
    weight found with the one is worth that of the other times k / (k - 1)."""

    serve_as: Literal["members", "ensemble", "stacked"] = "members"
    """How checkpoints of an ensemble are served: each by itself, and combined here; joined by one model that
    asks each (`ensemble`); or as one that holds them all and reads a text once (`stacked`), for which they
    must be of one architecture and tokenizer, as seeds of one training are."""

    batch_size: int = Field(default=128, ge=1)
    """Most samples in a request."""

    template: str | None = None
    """How a text is presented to checkpoints, as in `conch convert --template`; None takes their own."""

    dtype: Precision | None = None
    """Precision that checkpoints are served in; None takes float16 on a GPU, float32 on a CPU."""

    @field_validator("model_names", mode="before")
    @classmethod
    def _one_is_a_list(cls, names: Any) -> Any:
        return (names,) if isinstance(names, str) else names


class SFTSettings(Section):
    """The policy to start from."""

    model_name: str
    """Folder or hub id of a model that was fine-tuned on instructions."""

    num_layers_unfrozen: int | None = Field(default=None, ge=-1)
    """Blocks that train, from the top; None takes `ppo_config.model`'s."""

    dtype: Dtype | None = None
    """Precision to compute in; None takes the study's."""


class PPOTrain(Section):
    """Length and batches; a step is one optimizer update."""

    total_steps: int = Field(default=3000, ge=1)
    """Optimizer updates."""

    batch_size: int = Field(default=32, ge=1)
    """Samples of an update, for each process."""

    checkpoint_interval: int = Field(default=1000, ge=1)
    """Updates between checkpoints."""

    eval_interval: int = Field(default=100, ge=1)
    """Updates between evaluations; there is one at the start and one at the end as well."""


class PPOModel(Section):
    """The trained part of the policy."""

    num_layers_unfrozen: int = Field(default=2, ge=-1)
    """Blocks that train, from the top; -1 trains all."""


class PPOTokenizer(Section):
    """Prompts that are too long."""

    truncation_side: Literal["left", "right"] = "left"
    """End that they lose."""


class OptimizerArguments(Section):
    """AdamW."""

    lr: float = Field(default=1e-6, gt=0)
    """Peak learning rate."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the means of the gradient and of its square."""

    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""

    weight_decay: float = Field(default=1e-6, ge=0)
    """Decoupled weight decay."""


class PPOOptimizer(Section):
    """The optimizer."""

    kwargs: OptimizerArguments = OptimizerArguments()


class SchedulerArguments(Section):
    """The fall of the learning rate."""

    T_max: float = Field(default=10_000, gt=0)
    """Updates of half a period. Of twice `total_steps` and more, the rate stays what it is; else it falls to
    0 over the run."""

    eta_min: float = Field(default=1e-7, ge=0)
    """Lowest rate; without effect."""


class PPOScheduler(Section):
    """The learning rate over the run."""

    name: Literal["cosine_annealing", "constant", "linear"] = "cosine_annealing"
    """Its shape."""

    kwargs: SchedulerArguments = SchedulerArguments()


class GenerationArguments(Section):
    """How answers are sampled."""

    max_new_tokens: int = Field(default=256, ge=1)
    """Longest answer, in tokens."""

    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits."""

    top_k: int = Field(default=0, ge=0)
    """Sample among the k likeliest tokens; 0 turns it off."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample among the likeliest tokens that hold this much probability."""


class PPOMethod(Section):
    """The algorithm."""

    num_rollouts: int = Field(default=4, ge=1)
    """Samples of a rollout, for each process."""

    chunk_size: int = Field(default=2, ge=1)
    """Samples that are generated at once."""

    ppo_epochs: int = Field(default=4, ge=1)
    """Passes over a rollout."""

    init_kl_coef: float = Field(default=0.1, ge=0)
    """Weight of the KL at the start."""

    target: float | None = Field(default=6.0, gt=0)
    """KL in nats per sample that the weight is steered to; null keeps it fixed."""

    horizon: int = Field(default=10_000, ge=1)
    """Samples over which the weight reacts."""

    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per token."""

    lam: float = Field(default=0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation."""

    cliprange: float = Field(default=0.2, gt=0)
    """Of the policy loss."""

    cliprange_value: float | None = Field(default=0.2, gt=0)
    """Of the value loss."""

    vf_coef: float = Field(default=1.0, ge=0)
    """Weight of the value loss."""

    scale_reward: Literal["running", "ref", "ignored"] | bool | None = False
    """Whether rewards are divided by their standard deviation, over the run (`running`) or at its start."""

    ref_std: float | None = Field(default=None, gt=0)
    """That standard deviation, with `ref`."""

    cliprange_reward: float | None = Field(default=10.0, gt=0)
    """Rewards are clipped to plus or minus this."""

    gen_kwargs: GenerationArguments = GenerationArguments()


class PPOSettings(Section):
    """PPO, in trlX's names."""

    train: PPOTrain = PPOTrain()
    model: PPOModel = PPOModel()
    tokenizer: PPOTokenizer = PPOTokenizer()
    optimizer: PPOOptimizer = PPOOptimizer()
    scheduler: PPOScheduler = PPOScheduler()
    method: PPOMethod = PPOMethod()


class StudyConfig(Section):
    """One policy, trained with PPO against one reward model or an ensemble, and measured by another."""

    output_dir: Path = Path("runs/ppo")
    """Folder of the study; a run's own folder is made below."""

    datasets: tuple[str | dict[str, Any], ...] = Field(min_length=1)
    """Instructions: `alpaca_farm`, a file, a dataset of the hub (`owner/name:split`), or keys of Conch's
    section `data`, as in `{train: mine.jsonl, eval: others.jsonl}`; one, or a list. Of one without `eval` the
    last tenth is kept for evaluations."""

    eval_size: int | None = Field(default=4, ge=1)
    """Instructions to keep for evaluations; null keeps all that there are."""

    num_eval_prompts: int | None = Field(default=4, ge=0)
    """Of these the first ones are evaluated; 0 and null take all."""

    prompt_template: str = OPEN_ASSISTANT
    """What the policy reads: {instruction} is the instruction with its input below, {eos} its tokenizer's
    eos; or `chat`, the tokenizer's chat template."""

    rng_seed: int = Field(default=0, ge=0)
    """Seeds weights, data order and sampling."""

    rm_seed: int | None = Field(default=None, ge=0)
    """Stands for `{seed}` in `rank_config.model_names`."""

    debug: bool = False
    """Train on 10 prompts, one sample a rollout."""

    dtype: Dtype = "bfloat16"
    """Precision to compute in, on GPUs; on a CPU it is float32."""

    model_store: Path = Path("model_store")
    """Folder of converted reward models."""

    gold_config: GoldSettings | None = None
    """The gold reward model; without one, evaluations get no gold scores."""

    rank_config: RankSettings

    sft_config: SFTSettings

    ppo_config: PPOSettings = PPOSettings()

    conch: dict[str, Any] = Field(default_factory=dict)
    """Any setting of `conch train ppo` that has no name here: `conch.train.eval_repeats=16`."""

    @field_validator("datasets", mode="before")
    @classmethod
    def _one_is_a_list(cls, datasets: Any) -> Any:
        return (datasets,) if isinstance(datasets, str | dict) else datasets

    @model_validator(mode="after")
    def _seed_has_its_place(self) -> StudyConfig:
        names = self.rank_config.model_names
        waiting = [name for name in names if "{seed}" in name]
        if waiting and self.rm_seed is None:
            raise ValueError(
                f"`rank_config.model_names` has `{{seed}}` in {waiting[0]}: say which by --rm_seed N, or "
                "write the number in its place"
            )
        if waiting and len(names) > 1:
            raise ValueError(
                f"`rank_config.model_names` has `{{seed}}` in {waiting[0]} and {len(names)} names: it stands "
                "for one seed of a single model; write an ensemble's members out"
            )
        if self.rm_seed is not None and not waiting:
            raise ValueError(
                f"--rm_seed {self.rm_seed} has no `{{seed}}` in `rank_config.model_names` to stand for: "
                f"write it there, as in models/rm_seed{{seed}}, or leave the option out"
            )
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"`rank_config.model_names` has {twice} twice: it would count double")
        return self

    @model_validator(mode="after")
    def _instruction_is_seen(self) -> StudyConfig:
        if self.prompt_template != "chat" and "{instruction}" not in self.prompt_template:
            raise ValueError("`prompt_template` has no {instruction} in it, so the policy would not see it")
        return self

    @property
    def reward_models(self) -> tuple[str, ...]:
        """The reward models' names, with the seed in its place."""
        return tuple(name.replace("{seed}", str(self.rm_seed)) for name in self.rank_config.model_names)

"""Settings of `grpo.py`: their names are those that TorchRL's example of GRPO made known.

A setting that has had two names has both: `RENAMED`. One that would change nothing here is refused with the
reason, unless its value is what happens anyway: `NOT_HERE`. `async_settings.py` has those of `grpo-async.py`,
`translation.py` makes a run of Conch's of either.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from pydantic import Field, model_validator

from conch.config import RewardConfig, Section

Dtype = Literal["bfloat16", "float16", "float32"]
Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"]

RENAMED: Mapping[str, str] = {
    "train.steps_per_batch": "train.dialog_turns_per_batch",
    "train.kl_to_ref_coeff": "policy.kl_coef",
    "train.exp_name": "logging.experiment_name",
    "logging.checkpoint_frequency": "train.checkpoint_frequency",
}
"""Another name of a setting -> its name here."""

NotHere: TypeAlias = Mapping[str, tuple[tuple[Any, ...], str]]
"""Setting or section -> the values that say what happens anyway, and why there is no other."""

_ASYNC = (
    "it belongs to asynchronous training, and this program samples, then trains, then samples again: run "
    "`grpo-async.py`"
)
_QUANTIZED = (
    "no weights are quantised here: `train_model.lora.enabled=true train_model.torch_dtype=bfloat16` keeps "
    "the model in 2 bytes a parameter"
)
_NO_ADAPTER = "the reference is the model as it was at the start, without an adapter"
_VLLM = "vLLM decides it by itself"

NOT_HERE: NotHere = {
    "env.reasoning": (
        (False, None),
        "each prompt asks for the reasoning in <think> and the answer in <answer>",
    ),
    "env.max_steps": ((1, None), "an episode is one prompt with one completion"),
    "env.seed": ((None,), "`train.seed` seeds weights, data order and sampling"),
    "model.compile": ((False, None), "models are not compiled"),
    "train.sync": ((True, None), _ASYNC),
    "train.sync_iter": ((True, None), _ASYNC),
    "train.buffer_size": (
        (None,),
        "a batch is trained on once it is sampled, `train.epochs` times, and kept no longer",
    ),
    "train.empty_replay_buffer": ((True, None), "no batch is kept for a later one"),
    "train.weight_update_frequency": (
        (None,),
        "each batch is sampled with the weights of the last optimizer step",
    ),
    "train.packing": ((None,), "rows are packed wherever the model's attention allows it"),
    "train.logging_frequency": ((1, None), "each step is logged"),
    "train.entropy_coeff": ((0, None), "the loss has no entropy term"),
    "train.use_kl_to_ref": ((True, None), "the reference is left out by `policy.kl_coef=0`"),
    "train.kl_to_inference_coeff": (
        (0, None),
        "`conch.grpo.clip_low` and `conch.grpo.clip_high` bound the distance to the policy that sampled",
    ),
    **{
        f"{model}.quantization.enabled": ((False, None), _QUANTIZED) for model in ("train_model", "ref_model")
    },
    "inference_model.quantization.enabled": ((False, None), "samplers get the trained weights as they are"),
    "inference_model.attn_implementation": ((None,), _VLLM),
    "inference_model.include_stop_str_in_output": (
        (None,),
        "there are no stop strings: a completion ends with its eos token",
    ),
    "inference_model.enable_prefix_caching": ((None,), _VLLM),
    "ref_model.gradient_checkpointing": ((False, None), "the reference takes no backward pass"),
    **{f"ref_model.lora.{key}": ((None,), _NO_ADAPTER) for key in ("r", "alpha", "dropout")},
    "ref_model.lora.enabled": ((False, None), _NO_ADAPTER),
    "logging.checkpoint_dir": (
        ("checkpoints", None),
        "checkpoints stand in `checkpoints/` of the run's folder: `train.output_dir` moves that",
    ),
    "ray": ((None,), _ASYNC),
    "mode": (("sync", None), _ASYNC),
}
"""Settings and sections of TorchRL's example that are none here."""


class EnvSettings(Section):
    """The task: prompts, and how many completions are sampled of them."""

    dataset: Literal["gsm8k", "ifeval"] = "gsm8k"
    """The prompts, and what is checked in completions: `gsm8k`, the number that a word problem comes to;
    `ifeval`, whether a text follows the instructions. The rows are those of `openai/gsm8k` and
    `google/IFEval` on the hub, unless `data` names others."""

    data: str | None = None
    """Rows of the same columns instead: a `.jsonl` (also `.gz`), `.json`, `.csv` or `.parquet` file, a
    folder, or another dataset of the hub."""

    eval_data: str | None = None
    """Rows for evaluations, in the same forms. None takes the test split of `openai/gsm8k`, where the prompts
    are those of the hub; else the last tenth of the prompts, which are then not trained on."""

    max_rows: int | None = Field(default=None, ge=1)
    """Rows to take, the first ones; None takes all."""

    max_eval_rows: int = Field(default=200, ge=1)
    """Rows to evaluate with, the first ones."""

    num_envs: int = Field(default=8, ge=1)
    """Prompts that are sampled at once, `repeats` completions of each, over all training processes. Less
    saves memory."""

    repeats: int = Field(default=16, ge=2)
    """Completions of a prompt, which are compared with each other: the group of GRPO."""


class ModelSettings(Section):
    """The model that is trained."""

    name: str = "Qwen/Qwen2.5-3B"
    """Folder, or id on the hub."""

    revision: str | None = None
    """Commit, tag or branch on the hub."""

    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you have read that code."""


class TrainSettings(Section):
    """Length, batches and checkpoints. A dialog turn is one completion."""

    total_dialog_turns: int = Field(default=100_000, ge=1)
    """Completions to sample and to train on, in whole batches: the last one is not cut."""

    dialog_turns_per_batch: int | None = Field(default=None, ge=1)
    """Completions of a batch (a step): a multiple of `env.repeats`. None takes `env.num_envs` *
    `env.repeats`. Also `steps_per_batch`."""

    optim_batch_size: int | None = Field(default=32, ge=1)
    """Completions of one optimizer step, over all training processes: a divisor of the batch. Less saves
    memory. None takes the batch."""

    gradient_accumulation_steps: int | None = Field(default=None, ge=1)
    """Parts into which a process cuts its share of an optimizer step: more saves memory, and changes nothing
    else. None cuts into parts of at most 4 completions."""

    epochs: int = Field(default=1, ge=1)
    """Passes over a batch."""

    mixed_precision: bool = True
    """Compute in `train_model.torch_dtype` with weights in float32; without LoRA this is what a half
    precision means, since weights in half precision would lose small updates."""

    kl_coef_in_loss: bool = True
    """Add the KL to the reference to the loss; false takes it off the rewards."""

    checkpoint_frequency: int = Field(default=100, ge=0)
    """Save every so many steps (batches); 0 saves only at the end. Also `logging.checkpoint_frequency`."""

    keep_checkpoints: int | None = Field(default=None, ge=1)
    """Checkpoints to keep beside the best; None keeps all."""

    eval_frequency: int = Field(default=0, ge=0)
    """Evaluate every so many steps, at the start and at the end; 0 never evaluates."""

    seed: int = Field(default=0, ge=0)
    """Seeds weights, data order and sampling."""

    output_dir: Path = Path("outputs")
    """A run's folder is made below: `<output_dir>/<date>/<time>/`."""

    run_dir: Path | None = None
    """Exact folder of the run instead."""

    resume: str | None = None
    """Go on with an interrupted run: its folder, one of its `checkpoints/step_N`, or `auto` for the run in
    `run_dir` (without one: the newest below `output_dir`)."""


class LoraSettings(Section):
    """A low-rank adapter that is trained instead of the weights."""

    enabled: bool = True
    """Train an adapter. The reference is then the model without it, and takes no memory."""

    r: int = Field(default=8, ge=1)
    """Rank."""

    alpha: int = Field(default=16, ge=1)
    """Scale, over `r`."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropped inputs of the adapter in updates, and with them the model's own dropout; 0 drops nothing, so
    that sampling and training see the same policy."""

    target_modules: str | list[str] | None = None
    """Layers with an adapter, by the last part of their names, or `all-linear`; None takes those that peft
    knows for the model."""


class TrainModelSettings(Section):
    """The model in training."""

    num_devices: int | None = Field(default=None, ge=1)
    """Devices to train on, a process each. None takes one, which then samples as well unless
    `inference_model` has devices of its own."""

    devices: list[int] | None = None
    """These devices, instead of a number."""

    lora: LoraSettings = LoraSettings()
    """The adapter."""

    attn_implementation: Attention | None = None
    """Kernels of attention; None takes sdpa where the model knows it."""

    torch_dtype: Dtype | None = None
    """Precision of training; None takes bfloat16 on GPUs and float32 on a CPU."""

    gradient_checkpointing: bool = True
    """Compute activations again in the backward pass: less memory, more time."""

    accelerate_config: str = "ddp"
    """Of several training processes on GPUs: a file of `configs/accelerate`, by its name, or a path. `ddp`
    gives each the whole model, `zero2-bf16` and `zero3` spread optimizer and weights by DeepSpeed."""


class InferenceModelSettings(Section):
    """The model that samples."""

    num_devices: int | None = Field(default=None, ge=1)
    """Devices to sample on, apart from training: a copy of the model for each `tensor_parallel_size` of them.
    None samples where the model is trained."""

    devices: list[int] | None = None
    """These devices, instead of a number."""

    backend: Literal["auto", "vllm", "transformers"] = "auto"
    """`auto` takes vLLM where it is installed and there is a GPU."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """Devices that share one copy of the weights; with vLLM."""

    torch_dtype: Dtype | None = None
    """Precision of the sampler; None takes that of training."""

    gpu_memory_utilization: float | None = Field(default=None, gt=0, lt=1)
    """Share of a GPU's memory that vLLM may take. None takes .9 on devices of its own, .3 beside the model in
    training."""

    max_model_len: int | None = Field(default=None, ge=2)
    """Longest prompt and completion together, in tokens, for vLLM; None takes the model's window."""

    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits, in sampling and in the log-probs that are trained on."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample among the likeliest tokens that hold this much probability; 1 turns it off."""

    max_tokens: int = Field(default=1024, ge=1)
    """Longest completion, in tokens."""

    enforce_eager: bool | None = None
    """True: vLLM records no graphs; it starts sooner and samples more slowly."""


class RefModelSettings(Section):
    """The model as it was at the start. It is left out where `policy.kl_coef` is 0."""

    num_devices: int | None = Field(default=None, ge=1)
    """Devices for the reference, a copy on each. None keeps it where the model is trained."""

    devices: list[int] | None = None
    """These devices, instead of a number."""

    attn_implementation: Attention | None = None
    """As in `train_model`, or None: other kernels would round otherwise, and the first KL would not be 0."""

    torch_dtype: Dtype | None = None
    """As in `train_model`, or None, for the same reason."""


class OptimizerSettings(Section):
    """The optimizer."""

    name: Literal["AdamW"] = "AdamW"
    """There is no other."""

    lr: float = Field(default=1e-5, gt=0)
    """Learning rate, constant over the run (`conch.scheduler.name` has other shapes)."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""

    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""

    clip_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""


class PolicySettings(Section):
    """The policy's distance from its start."""

    kl_coef: float = Field(default=1e-2, ge=0)
    """Weight of the KL to the reference; 0 does without a reference. Also `train.kl_to_ref_coeff`."""


class LoggingSettings(Section):
    """Where metrics go. `metrics.jsonl` in the run's folder is always written."""

    wandb: bool = False
    """Log to Weights & Biases, offline where there are no credentials."""

    tensorboard: bool = False
    """Log to TensorBoard files in the run's folder."""

    experiment_name: str | None = None
    """Project on Weights & Biases; None takes `grpo-<dataset>`. Also `train.exp_name`."""


class ExampleConfig(Section):
    """GRPO on verifiable rewards: GSM8K or IFEval.

    Names and meanings are those of TorchRL's example; README.md tells where these differ, and why.
    """

    not_here: ClassVar[NotHere] = NOT_HERE

    env: EnvSettings = EnvSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    train_model: TrainModelSettings = TrainModelSettings()
    inference_model: InferenceModelSettings = InferenceModelSettings()
    ref_model: RefModelSettings = RefModelSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    policy: PolicySettings = PolicySettings()
    logging: LoggingSettings = LoggingSettings()

    reward: RewardConfig = RewardConfig()
    """The reward, as for all trainers of Conch; where it names none, `env.dataset` is the verifier."""

    conch: dict[str, Any] = Field(default_factory=dict)
    """Any setting of `conch train grpo` that has no name here, by its full name: `conch.grpo.loss=dapo`."""

    @model_validator(mode="after")
    def _reference_is_the_start(self) -> ExampleConfig:
        for key in ("attn_implementation", "torch_dtype"):
            own, trained = getattr(self.ref_model, key), getattr(self.train_model, key)
            if own not in (None, trained):
                raise ValueError(
                    f"`ref_model.{key}` = {own}, but `train_model.{key}` = {trained}: the reference is the "
                    "model as it was at the start, so give both the same, or leave the reference's out"
                )
        return self

    @model_validator(mode="before")
    @classmethod
    def _names_known_elsewhere(cls, values: Any) -> Any:
        return in_names_of_here(values, cls.not_here) if isinstance(values, Mapping) else values


def in_names_of_here(values: Mapping[str, Any], not_here: NotHere) -> dict[str, Any]:
    """Bring settings under their names here, and take out those that say what happens anyway.

    not_here: those that are none here.

    Raises:
        ValueError: a setting is none here, or stands under two names with different values.
    """
    nested = _copied(values)
    for name, (harmless, reason) in not_here.items():
        value = _taken(nested, name)
        if value is not _ABSENT and value not in harmless:
            raise ValueError(f"`{name}` = {value!r} is no setting of this program: {reason}")
    for other, name in RENAMED.items():
        value = _taken(nested, other)
        if value is _ABSENT:
            continue
        section, _, key = name.partition(".")
        inner = nested.setdefault(section, {})
        if not isinstance(inner, dict):
            continue
        if key in inner and inner[key] != value:
            raise ValueError(
                f"`{other}` = {value!r} and `{name}` = {inner[key]!r} are one setting: give one of them"
            )
        inner[key] = value
    return nested


_ABSENT = object()


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _copied(value) if isinstance(value, Mapping) else value for name, value in values.items()}


def _taken(values: dict[str, Any], name: str) -> Any:
    """Take a setting out, and the sections that it leaves empty; `_ABSENT` where it does not stand."""
    first, _, rest = name.partition(".")
    if first not in values:
        return _ABSENT
    if not rest:
        return values.pop(first)
    inner = values[first]
    if not isinstance(inner, dict):
        return _ABSENT
    value = _taken(inner, rest)
    if value is not _ABSENT and not inner:
        del values[first]
    return value

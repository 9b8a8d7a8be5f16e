"""From the settings of `grpo.py` to a run of Conch's GRPO, and a table of what became of what."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conch.config import load
from conch.errors import ConfigError
from conch.trainers.grpo import GRPORunConfig
from examples.grpo.batches import Batches, plan_batches
from examples.grpo.devices import DevicePlan, plan_devices
from examples.grpo.settings import ExampleConfig

_HALF = {"bfloat16": "bf16", "float16": "fp16"}
_OWN_SHARE, _SHARED_SHARE = 0.9, 0.3
_ALL_NAMES: dict[str, Any] = {
    "model": {"revision": "a", "trust_remote_code": True},
    "train_model": {"attn_implementation": "eager"},
    "train": {"keep_checkpoints": 1},
}
"""Settings that become one of Conch's only where they are given."""

_CHOSEN = {"scheduler.name", "generation.chunk_size", "grpo.forward_batch_size", "model.disable_dropout"}
"""Settings of Conch's without a name here, which are chosen for what others say."""


@dataclass(frozen=True)
class Became:
    """A setting of Conch's, and where it comes from.

    source: settings here, or a word about the reason.
    name: full name of Conch's.
    value: of it.
    """

    source: str
    name: str
    value: Any


def translate(config: ExampleConfig, plan: DevicePlan, *, has_vllm: bool) -> list[Became]:
    """What the settings become, without the addresses of servers, which are known once these run.

    plan: of the devices.
    has_vllm: whether vLLM can be imported here.

    Raises:
        ConfigError: settings contradict each other; one sentence.
    """
    batches = plan_batches(config, len(plan.train))
    made = [
        *_model(config, plan),
        *_optimizer(config),
        *_batches(config, batches, len(plan.train)),
        *_sampling(config, plan, batches, has_vllm),
        *_reward(config),
        *_run(config),
    ]
    sources = {item.name: item.source.partition(":")[0] for item in made if item.name not in _CHOSEN}
    more = [Became(f"conch.{name}", name, value) for name, value in _leaves(config.conch)]
    for item in more:
        if item.name in sources:
            raise ConfigError(f"`{item.source}` has a name here: set {sources[item.name]} instead")
    return [*made, *more]


def without_effect(config: ExampleConfig, plan: DevicePlan, *, has_vllm: bool) -> list[str]:
    """Settings that were given and change nothing on these devices, each with the reason."""
    uses_vllm = sampler(config, plan, has_vllm=has_vllm) == "vllm"
    one_process = "one process trains" if len(plan.train) == 1 else ""
    on_cpu = "" if plan.on_gpus else "simulated devices train without accelerate's file"
    precision = "weights and all that is computed are float32" if _dtype(config, plan) == "float32" else ""
    if _uses_deepspeed(config, plan):
        precision = "DeepSpeed's file says what is computed in"
    reasons: dict[str, str] = {
        "train_model.accelerate_config": one_process or on_cpu,
        "train.mixed_precision": precision,
    }
    if not uses_vllm:
        for key in ("gpu_memory_utilization", "enforce_eager"):
            reasons[f"inference_model.{key}"] = "it is vLLM's, and transformers samples"
    if not uses_vllm and not plan.inference:
        for key in ("max_model_len", "torch_dtype"):
            reasons[f"inference_model.{key}"] = "completions are sampled by the model in training itself"
    lines = []
    for name, reason in reasons.items():
        section, _, key = name.partition(".")
        given = getattr(config, section)
        value = getattr(given, key)
        if reason and value != type(given).model_fields[key].default:
            lines.append(f"  without effect: `{name}` = {value}: {reason}")
    return lines


def run_config(became: Sequence[Became], more: Mapping[str, Any] | None = None) -> GRPORunConfig:
    """The run that `translate` tells of; where several set the same, the last one holds.

    more: full name -> value, laid over it.

    Raises:
        ConfigError: see `conch.config.load`.
    """
    nested: dict[str, Any] = {}
    for name, value in [*((item.name, item.value) for item in became), *(more or {}).items()]:
        *parents, last = name.split(".")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"`conch.{name}`: `{parent}` is a section and has a value")
        inner[last] = copy.deepcopy(value)
    return load(GRPORunConfig, nested)


def with_names_of_here(text: str) -> str:
    """A message of Conch's, with the settings in it under the names that they have here."""
    plan = plan_devices({}, has_reference=True, num_gpus=0)
    became = translate(load(ExampleConfig, _ALL_NAMES), plan, has_vllm=False)
    sources = {item.name: item.source for item in became if item.name not in _CHOSEN}
    own = {name for name, _ in _leaves(ExampleConfig().model_dump(mode="json"))}
    known = {name for name, _ in _leaves(run_config(became).model_dump(mode="json"))}

    def renamed(match: re.Match[str]) -> str:
        name = match[1]
        source = re.match(r"[a-z_]+\.[a-z_.]+", sources.get(name, ""))
        if source is not None:
            return f"`{source[0]}"
        return f"`conch.{name}" if name in known - own else match[0]

    return re.sub(r"`([a-z_]+\.[a-z_.]*[a-z_])", renamed, text)


def table(became: Sequence[Became]) -> str:
    """A line for each setting of Conch's: its name, its value, and what it comes from."""
    rows = [(f"{item.name} = {item.value}", item.source) for item in became]
    width = min(60, max(len(left) for left, _ in rows))
    return "\n".join(f"{left:{width}}  <- {right}" for left, right in rows)


def _model(config: ExampleConfig, plan: DevicePlan) -> list[Became]:
    model, trained = config.model, config.train_model
    lora = trained.lora
    made = [
        Became("model.name", "model.path", model.name),
        Became(
            "train_model.gradient_checkpointing",
            "model.gradient_checkpointing",
            trained.gradient_checkpointing,
        ),
        *_precision(config, plan),
    ]
    if model.revision is not None:
        made.append(Became("model.revision", "model.revision", model.revision))
    if model.trust_remote_code:
        made.append(Became("model.trust_remote_code", "model.trust_remote_code", True))
    if trained.attn_implementation is not None:
        made.append(Became("train_model.attn_implementation", "model.attention", trained.attn_implementation))
    if lora.enabled:
        adapter = {"r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
        layers = {} if lora.target_modules is None else {"target_modules": lora.target_modules}
        made.append(Became("train_model.lora", "model.peft_config", {**adapter, **layers}))
    if lora.enabled and lora.dropout:
        made.append(Became("train_model.lora.dropout", "model.disable_dropout", False))
    return made


def _uses_deepspeed(config: ExampleConfig, plan: DevicePlan) -> bool:
    file = config.train_model.accelerate_config
    return plan.on_gpus and len(plan.train) > 1 and "zero" in Path(file).name


def _dtype(config: ExampleConfig, plan: DevicePlan) -> str:
    """Precision of training."""
    return config.train_model.torch_dtype or ("bfloat16" if plan.on_gpus else "float32")


def _precision(config: ExampleConfig, plan: DevicePlan) -> list[Became]:
    """Weights train in float32 or under an adapter: in half precision, small updates are lost to rounding."""
    trained, mixed = config.train_model, config.train.mixed_precision
    dtype = _dtype(config, plan)
    source = "train_model.torch_dtype, train.mixed_precision"
    if _uses_deepspeed(config, plan):
        return [Became("train_model.torch_dtype", "model.dtype", dtype)]  # DeepSpeed's file has the rest
    if dtype == "float32":
        return [Became(source, "model.dtype", dtype), Became(source, "train.mixed_precision", "no")]
    if not trained.lora.enabled and not mixed:
        raise ConfigError(
            f"`train_model.torch_dtype` = {dtype} without LoRA and with `train.mixed_precision` = false "
            "would lose small updates to rounding: set `train.mixed_precision=true`, "
            "`train_model.lora.enabled=true` or `train_model.torch_dtype=float32`"
        )
    held = dtype if trained.lora.enabled else "float32"
    return [
        Became(source, "model.dtype", held),
        Became(source, "train.mixed_precision", _HALF[dtype] if mixed else "no"),
    ]


def _optimizer(config: ExampleConfig) -> list[Became]:
    optimizer = config.optimizer
    return [
        Became("optimizer.lr", "optimizer.learning_rate", optimizer.lr),
        Became("optimizer.weight_decay", "optimizer.weight_decay", optimizer.weight_decay),
        Became("optimizer.eps", "optimizer.eps", optimizer.eps),
        Became("optimizer.clip_grad_norm", "train.max_grad_norm", optimizer.clip_grad_norm),
        Became("a constant rate", "scheduler.name", "constant"),
        Became("policy.kl_coef", "grpo.kl.coef", config.policy.kl_coef),
        Became(
            "train.kl_coef_in_loss", "grpo.kl.placement", "loss" if config.train.kl_coef_in_loss else "reward"
        ),
    ]


def _batches(config: ExampleConfig, batches: Batches, num_processes: int) -> list[Became]:
    total = config.train.total_dialog_turns
    steps = f"train.total_dialog_turns: {total} / {batches.turns}"
    if total % batches.turns:
        steps += f", rounded up: {batches.steps * batches.turns} completions"
    optim = f"train.optim_batch_size: {batches.turns} / {config.train.optim_batch_size}"
    return [
        Became(steps, "train.total_steps", batches.steps),
        Became("env.num_envs, train.dialog_turns_per_batch", "grpo.prompts_per_step", batches.prompts),
        Became("env.repeats", "grpo.group_size", config.env.repeats),
        Became("train.epochs", "grpo.epochs", config.train.epochs),
        Became(optim, "grpo.minibatches", batches.minibatches),
        Became(
            "train.gradient_accumulation_steps", "train.gradient_accumulation_steps", batches.accumulation
        ),
        Became("train_model devices", "train.num_processes", num_processes),
        Became("env.num_envs", "generation.chunk_size", batches.at_once),
        Became("env.num_envs", "grpo.forward_batch_size", min(64, batches.at_once)),
    ]


def _sampling(config: ExampleConfig, plan: DevicePlan, batches: Batches, has_vllm: bool) -> list[Became]:
    """Sampling in the training processes; what servers are told stands in `launch.py`."""
    inference = config.inference_model
    engine = sampler(config, plan, has_vllm=has_vllm)
    made = [
        Became("inference_model.temperature", "generation.temperature", inference.temperature),
        Became("inference_model.top_p", "generation.top_p", inference.top_p),
        Became("inference_model.max_tokens", "generation.max_new_tokens", inference.max_tokens),
    ]
    if plan.inference:
        return made
    made.append(Became("inference_model.backend", "rollout.engine", "vllm" if engine == "vllm" else "hf"))
    if engine != "vllm":
        return made
    share = inference.gpu_memory_utilization or _SHARED_SHARE
    made.append(Became("inference_model.gpu_memory_utilization", "rollout.gpu_memory_utilization", share))
    for key, name in (
        ("enforce_eager", "enforce_eager"),
        ("max_model_len", "max_model_len"),
        ("torch_dtype", "dtype"),
    ):
        value = getattr(inference, key)
        if value is not None:
            made.append(Became(f"inference_model.{key}", f"rollout.{name}", value))
    return made


def sampler(config: ExampleConfig, plan: DevicePlan, *, has_vllm: bool) -> str:
    """`vllm` or `transformers`.

    Raises:
        ConfigError: what is asked for is not here, or cannot be done by it.
    """
    inference = config.inference_model
    backend = inference.backend
    if backend == "vllm" and not has_vllm:
        raise ConfigError(
            "`inference_model.backend` = vllm, and vLLM is not installed: pip install 'conch[vllm]'"
        )
    if backend == "auto":
        backend = "vllm" if has_vllm and plan.on_gpus else "transformers"
    if inference.tensor_parallel_size > 1 and (backend != "vllm" or not plan.inference):
        raise ConfigError(
            f"`inference_model.tensor_parallel_size` = {inference.tensor_parallel_size} needs vLLM on "
            "devices of its own: set `inference_model.num_devices`, or leave it at 1"
        )
    if len(plan.inference) % inference.tensor_parallel_size:
        raise ConfigError(
            f"`inference_model` has {len(plan.inference)} devices, which do not divide into copies on "
            f"`inference_model.tensor_parallel_size` = {inference.tensor_parallel_size} of them: take a "
            "multiple"
        )
    return backend


def served_share(config: ExampleConfig) -> float:
    """Share of a GPU's memory for a sampler on a device of its own."""
    return config.inference_model.gpu_memory_utilization or _OWN_SHARE


def _reward(config: ExampleConfig) -> list[Became]:
    reward = config.reward
    made = [Became(f"reward.{name}", f"reward.{name}", value) for name, value in _leaves(_dumped(reward))]
    if reward.url or reward.function or reward.members or reward.replay:
        return [*made, Became("env.dataset", "evaluation.verifier", config.env.dataset)]
    if reward.verifier is None:
        made.append(Became("env.dataset", "reward.verifier", config.env.dataset))
    return made


def _dumped(section: Any) -> dict[str, Any]:
    return section.model_dump(mode="json", exclude_unset=True)


def _run(config: ExampleConfig) -> list[Became]:
    train, logging = config.train, config.logging
    values = {
        "train.checkpoint_frequency": ("train.save_every", train.checkpoint_frequency),
        "train.eval_frequency": ("train.eval_every", train.eval_frequency),
        "train.seed": ("train.seed", train.seed),
        "train.output_dir": ("train.output_dir", str(train.output_dir)),
        "logging.wandb": ("tracking.wandb", logging.wandb),
        "logging.tensorboard": ("tracking.tensorboard", logging.tensorboard),
        "logging.experiment_name": (
            "tracking.project",
            logging.experiment_name or f"grpo-{config.env.dataset}",
        ),
    }
    if train.keep_checkpoints is not None:
        values["train.keep_checkpoints"] = ("train.keep_last", train.keep_checkpoints)
    if train.run_dir is not None:
        values["train.run_dir"] = ("train.run_dir", str(train.run_dir))
    if train.resume is not None:
        values["train.resume"] = ("train.resume", train.resume)
    return [Became(source, name, value) for source, (name, value) in values.items()]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Full name -> value; an empty mapping is a value."""
    leaves: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            leaves += _leaves(value, f"{prefix}{name}.")
        else:
            leaves.append((f"{prefix}{name}", value))
    return leaves

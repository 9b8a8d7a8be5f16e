"""From the settings of `grpo.py` or `grpo-async.py` to a run of Conch's GRPO, and a table of what became of
what."""

from __future__ import annotations

import copy
import functools
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conch.config import Section, load
from conch.config.algorithms.async_grpo import AsyncGRPORunConfig
from conch.config.algorithms.grpo import GRPORunConfig
from conch.config.base import nested_section
from conch.config.reward import VERIFIER
from conch.errors import ConfigError, install_extra
from examples.grpo.async_settings import AsyncExampleConfig, uses_ray
from examples.grpo.batches import Batches, plan_batches, plan_lead
from examples.grpo.devices import DevicePlan, plan_devices
from examples.grpo.settings import ExampleConfig

_HALF = {"bfloat16": "bf16", "float16": "fp16"}
_OWN_SHARE, _SHARED_SHARE = 0.9, 0.3
_MOST_AT_ONCE = 256
_ALL_NAMES: dict[str, Any] = {
    "model": {"revision": "a", "trust_remote_code": True},
    "train_model": {"attn_implementation": "eager"},
    "train": {"keep_checkpoints": 1},
}
"""Settings that become one of Conch's only where they are given."""

_NO_PORT_YET = "127.0.0.1:0"
"""Address of a server that is to run."""

_NAMES_OF_LEAD: dict[str, Any] = {"max_staleness": 1}
"""As above, of `train` in `grpo-async.py`."""

_PROGRAMS = {False: "`grpo.py`", True: "`grpo-async.py`"}
"""Whether sampling goes on while the model is trained -> program."""

_CHECKS = ("reward.gsm8k.", "reward.ifeval.")
"""Beginnings of the names of a verifier's settings."""

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
    more = _below_conch(config)
    batches = plan_batches(config, len(plan.train))
    made = [
        *_model(config, plan),
        *_optimizer(config),
        *_batches(config, batches, len(plan.train)),
        *_sampling(config, plan, batches, has_vllm),
        *_lead(config, batches),
        *_reward(config),
        *_run(config),
    ]
    sources = {
        item.name: item.source.partition(":")[0]
        for item in made
        # What watches may check in another way than the reward.
        if item.name not in _CHOSEN and not item.name.startswith(("evaluation.gsm8k.", "evaluation.ifeval."))
    }
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
        **_unused_anywhere(config),
    }
    if not uses_vllm:
        for key in ("gpu_memory_utilization", "enforce_eager"):
            reasons[f"inference_model.{key}"] = "it is vLLM's, and transformers samples"
    if isinstance(config, AsyncExampleConfig):
        reasons |= _unused_of_ray(config)
    if not uses_vllm and not plan.inference:
        for key in ("max_model_len", "torch_dtype"):
            reasons[f"inference_model.{key}"] = "completions are sampled by the model in training itself"
    lines = []
    for name, reason in reasons.items():
        *sections, key = name.split(".")
        given = functools.reduce(getattr, sections, config)
        value = getattr(given, key)
        if reason and value != type(given).model_fields[key].default:
            lines.append(f"  without effect: `{name}` = {value}: {reason}")
    return lines


def lead_lines(config: ExampleConfig, plan: DevicePlan) -> list[str]:
    """How far sampling runs ahead, to print before anything is loaded; nothing where it does not."""
    if not isinstance(config, AsyncExampleConfig):
        return []
    batches = plan_batches(config, len(plan.train))
    lead = plan_lead(config.train, batches)
    updates = batches.minibatches * config.train.epochs
    often = "each step" if lead.sync_every == 1 else f"every {lead.sync_every} steps"
    bound = f"tokens are at most {_counted(lead.max_staleness, 'step')} old"
    if not lead.max_staleness:
        bound = "0: each step waits for its samples, as in grpo.py"
    prompts, held = _counted(batches.prompts, "prompt"), _counted(lead.max_staleness + 1, "step")
    return [
        "asynchronous",
        f"  a step        {batches.turns} completions of {prompts}, {_counted(updates, 'optimizer step')}",
        f"  buffer        {lead.buffer} completions: {held}, one in training",
        f"  staleness     {bound}",
        f"  new weights   after {often}",
    ]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def run_section(config: ExampleConfig) -> type[GRPORunConfig]:
    """Of Conch's, what the settings become."""
    return AsyncGRPORunConfig if isinstance(config, AsyncExampleConfig) else GRPORunConfig


def run_config(
    became: Sequence[Became],
    more: Mapping[str, Any] | None = None,
    section: type[GRPORunConfig] = GRPORunConfig,
) -> GRPORunConfig:
    """The run that `translate` tells of; where several set the same, the last one holds.

    more: full name -> value, laid over it.
    section: of the run; see `run_section`.

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
    return load(section, nested)


def with_names_of_here(text: str, section: type[ExampleConfig] = ExampleConfig) -> str:
    """A message of Conch's, with the settings in it under the names that they have here.

    section: of the program.
    """
    overlaps = issubclass(section, AsyncExampleConfig)
    train = {**_ALL_NAMES["train"], **(_NAMES_OF_LEAD if overlaps else {})}
    config = load(section, {**_ALL_NAMES, "train": train})
    plan = plan_devices({}, has_reference=True, num_gpus=0, overlaps=overlaps)
    became = translate(config, plan, has_vllm=False)
    sources = {item.name: item.source for item in became if item.name not in _CHOSEN}
    own = {name for name, _ in _leaves(config.model_dump(mode="json"))}
    known = {
        name for name, _ in _leaves(run_config(became, None, run_section(config)).model_dump(mode="json"))
    }

    def renamed(match: re.Match[str]) -> str:
        name = match[1]
        source = re.match(r"[a-z_]+\.[a-z_.]+", sources.get(name, ""))
        if source is not None:
            return f"`{source[0]}"
        return f"`conch.{name}" if name in known - own else match[0]

    text = re.sub(r"an? (Async)?GRPORunConfig", lambda run: _PROGRAMS[bool(run[1])], text)
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
    optim = f"train.optim_batch_size: {batches.turns} / {batches.turns // batches.minibatches}"
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
    if isinstance(config, AsyncExampleConfig) and uses_ray(config):
        return [*made, *_ray(config, plan, engine), *_of_engine(config, plan, engine)]
    if isinstance(config, AsyncExampleConfig):
        copies = len(plan.inference) // inference.tensor_parallel_size
        urls = ",".join([_NO_PORT_YET] * copies)
        made.append(Became("inference_model.served_by", "rollout.engine", "hf"))  # the default is Ray
        return [*made, Became("inference_model devices", "rollout.urls", urls)]
    if plan.inference:
        return made
    made.append(Became("inference_model.backend", "rollout.engine", "vllm" if engine == "vllm" else "hf"))
    return made if engine != "vllm" else [*made, *_of_engine(config, plan, engine)]


def _of_engine(config: ExampleConfig, plan: DevicePlan, engine: str) -> list[Became]:
    """Settings of the section `rollout` that an engine takes."""
    inference = config.inference_model
    made: list[Became] = []
    keys = [("max_model_len", "max_model_len"), ("torch_dtype", "dtype")]
    if engine == "vllm":
        share = served_share(config, plan)
        made.append(Became("inference_model.gpu_memory_utilization", "rollout.gpu_memory_utilization", share))
        keys.append(("enforce_eager", "enforce_eager"))
    for key, name in keys:
        value = getattr(inference, key)
        if value is not None:
            made.append(Became(f"inference_model.{key}", f"rollout.{name}", value))
    return made


def _ray(config: AsyncExampleConfig, plan: DevicePlan, engine: str) -> list[Became]:
    """Samplers that are actors of Ray.

    Raises:
        ConfigError: they ask for more CPUs than the cluster may have.
    """
    copies = len(plan.inference) // config.inference_model.tensor_parallel_size
    limit, each = config.ray.init_config.num_cpus, config.ray.collector_config.num_cpus
    if limit is not None and copies * (each or 1) > limit:
        raise ConfigError(
            f"{copies} samplers with {each or 1:g} CPUs each (`ray.collector_config.num_cpus`) take "
            f"{copies * (each or 1):g}, and `ray.init_config.num_cpus` = {limit:g}: raise it, or lower the "
            "other"
        )
    source = "ray.collector_config.num_cpus"
    if each is None and not plan.on_gpus and (cpus := len(os.sched_getaffinity(0))) < copies:
        each, source = round(cpus / copies, 4), f"{source}: {cpus} CPUs for {copies} simulated devices"
    made = [
        Became("inference_model.served_by", "rollout.engine", "ray"),
        Became("inference_model devices", "rollout.ray.samplers", copies),
        Became("inference_model devices", "rollout.ray.num_gpus", 1 if plan.on_gpus else 0),
        Became("inference_model.backend", "rollout.ray.engine", engine),
        Became("env.num_envs", "rollout.max_num_seqs", at_once_of_each(config, copies)),
    ]
    if each is not None:
        made.append(Became(source, "rollout.ray.num_cpus", each))
    return made


def _below_conch(config: ExampleConfig) -> list[Became]:
    """The settings below `conch`.

    Raises:
        ConfigError: a section among them has a value, which would replace what this program sets in it.
    """
    made: list[Became] = []
    for name, value in _leaves(config.conch):
        section: type[Section] | None = run_section(config)
        annotation: Any = section
        for part in name.split("."):
            field = section.model_fields.get(part) if section is not None else None
            annotation = None if field is None else field.annotation
            section = None if field is None else nested_section(annotation)
        if section is None or annotation is not section:
            made.append(Became(f"conch.{name}", name, value))
        elif value != {}:
            keys = ", ".join(f"`conch.{name}.{key}`" for key in section.model_fields)
            raise ConfigError(f"`conch.{name}` = {value!r} is a section, no value: its keys are {keys}")
    return made


def _lead(config: ExampleConfig, batches: Batches) -> list[Became]:
    """How far sampling runs ahead; nothing where it does not."""
    if not isinstance(config, AsyncExampleConfig):
        return []
    train, lead = config.train, plan_lead(config.train, batches)
    weighs = dict(_leaves(config.conch)).get("grpo.correction.kind") != "none"
    if config.inference_model.top_p < 1 and weighs:
        raise ConfigError(
            f"`inference_model.top_p` = {config.inference_model.top_p} cuts the distribution that older "
            "samples are weighed by: leave it at 1, or weigh none, `conch.grpo.correction.kind=none`"
        )
    updates = f"train.weight_update_frequency: in steps of {batches.minibatches * train.epochs} updates"
    return [
        Became(lead.source, "asynchronous.max_staleness", lead.max_staleness),
        Became(updates, "asynchronous.sync_every", lead.sync_every),
        Became("train.partial_rollouts", "asynchronous.partial_rollouts", train.partial_rollouts),
    ]


def _unused_anywhere(config: ExampleConfig) -> dict[str, str]:
    """Settings that change nothing on any devices, for what others say, with the reason."""
    reasons = _unused_checks(config)
    if not config.train_model.lora.enabled:
        full = "all weights are trained, `train_model.lora.enabled` = false"
        reasons |= {f"train_model.lora.{key}": full for key in ("r", "alpha", "dropout", "target_modules")}
    if not config.train.eval_frequency:
        never = "nothing is evaluated, `train.eval_frequency` = 0"
        reasons |= {"env.eval_data": never, "env.max_eval_rows": never}
    return reasons


def _unused_of_ray(config: AsyncExampleConfig) -> dict[str, str]:
    """Settings of the section `ray` that change nothing here, with the reason."""
    reasons = {
        "ray.train_handler_config.num_cpus": "training processes are no actors of Ray",
        "ray.replay_buffer_config.num_cpus": "the buffer is in the training processes",
        "ray.init_config.num_cpus": "it is a limit, and samplers ask for less",
    }
    if uses_ray(config):
        return reasons
    no_ray = "`inference_model.served_by` = servers does without Ray"
    return dict.fromkeys([*reasons, "ray.collector_config.num_cpus"], no_ray)


def sampler(config: ExampleConfig, plan: DevicePlan, *, has_vllm: bool) -> str:
    """`vllm` or `transformers`.

    Raises:
        ConfigError: what is asked for is not here, or cannot be done by it.
    """
    inference = config.inference_model
    backend = inference.backend
    if backend == "vllm" and not has_vllm:
        raise ConfigError(
            f"`inference_model.backend` = vllm, and vLLM is not installed: {install_extra('vllm')}"
        )
    if backend == "auto":
        backend = "vllm" if has_vllm and plan.on_gpus else "transformers"
    if inference.tensor_parallel_size > 1 and uses_ray(config):
        raise ConfigError(
            f"`inference_model.tensor_parallel_size` = {inference.tensor_parallel_size}: an actor of Ray "
            "holds its copy on one device here; set `inference_model.served_by=servers`, or leave it at 1"
        )
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


def served_share(config: ExampleConfig, plan: DevicePlan) -> float:
    """Share of a GPU's memory for a sampler."""
    return config.inference_model.gpu_memory_utilization or (_OWN_SHARE if plan.inference else _SHARED_SHARE)


def at_once_of_each(config: ExampleConfig, copies: int) -> int:
    """Completions that a sampler of its own samples at once."""
    return min(_MOST_AT_ONCE, math.ceil(config.env.num_envs * config.env.repeats / copies))


def _reward(config: ExampleConfig) -> list[Became]:
    reward = config.reward
    made = [Became(f"reward.{name}", f"reward.{name}", value) for name, value in _leaves(_dumped(reward))]
    if reward.members.get(config.env.dataset) == VERIFIER + config.env.dataset:
        return made  # a member's figures have the names that those of what watches would have
    if _watches(config):
        checks = [item for item in made if item.name.startswith(_CHECKS)]
        made += [
            Became(item.source, f"evaluation.{item.name.partition('.')[2]}", item.value) for item in checks
        ]
        return [*made, Became("env.dataset", "evaluation.verifier", config.env.dataset)]
    if reward.verifier is None:
        made.append(Became("env.dataset", "reward.verifier", config.env.dataset))
    return made


def _watches(config: ExampleConfig) -> bool:
    """Whether the dataset's verifier is not the reward, and watches in evaluations."""
    return config.reward.replay is not None or bool(set(config.reward.named_by) - {"verifier"})


def _unused_checks(config: ExampleConfig) -> dict[str, str]:
    """Settings of the verifiers that check nothing here, with the reason."""
    reward = config.reward
    learns = {word.removeprefix(VERIFIER) for word in reward.members.values()}
    learns |= set() if _watches(config) else {reward.verifier or config.env.dataset}
    reasons: dict[str, str] = {}
    given = {"gsm8k": _dumped(reward.gsm8k), "ifeval": _dumped(reward.ifeval)}
    for name in (f"{verifier}.{key}" for verifier, keys in given.items() for key in keys):
        verifier = name.partition(".")[0]
        if verifier in learns:
            continue
        if not _watches(config) or verifier != config.env.dataset:
            reasons[f"reward.{name}"] = f"nothing is checked by the verifier {verifier}"
        elif not config.train.eval_frequency:
            reasons[f"reward.{name}"] = f"{verifier} watches in evaluations, and `train.eval_frequency` = 0"
    return reasons


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

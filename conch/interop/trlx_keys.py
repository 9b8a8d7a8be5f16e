"""What each key of trlX is here.

Sizes of trlX are those of one process, which collects and learns by itself; ours are of all processes
together.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from conch.errors import ConfigError

Algorithm = Literal["ppo", "ilql", "sft", "rft"]
Outcome = Literal["taken as", "renamed to", "not needed:"]


@dataclass(frozen=True, slots=True)
class Line:
    """What became of one key.

    key: trlX's full name.
    keys: ours, none where it is not needed.
    text: why, or what else changes with it.
    """

    key: str
    outcome: Outcome
    keys: tuple[str, ...] = ()
    text: str = ""

    def __str__(self) -> str:
        return " ".join(
            part for part in (f"{self.key}:", self.outcome, ", ".join(self.keys), self.text) if part
        )


@dataclass
class Work:
    """A translation under way."""

    algorithm: Algorithm
    given: Mapping[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)

    def set(self, key: str, value: Any, theirs: str, text: str = "") -> None:
        """Give one of our keys a value, and tell of it."""
        *parents, name = key.split(".")
        inner = self.values
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
        last = self.lines[-1] if self.lines else None
        if last is not None and last.key == theirs:
            joined = "; ".join(part for part in (last.text, text) if part)
            self.lines[-1] = Line(theirs, last.outcome, (*last.keys, key), joined)
            return
        outcome: Outcome = "taken as" if theirs.rpartition(".")[2] == name else "renamed to"
        self.lines.append(Line(theirs, outcome, (key,), text))

    def drop(self, theirs: str, why: str) -> None:
        """Tell why a key is not needed."""
        self.lines.append(Line(theirs, "not needed:", (), why))

    @property
    def updates_per_step(self) -> int:
        """Updates of trlX's between two collections of samples, which are one step of ours; offline 1."""
        if self.algorithm != "ppo":
            return 1
        return self.minibatches * int(self.given.get("method.ppo_epochs", 1))

    @property
    def minibatches(self) -> int:
        return max(
            1, math.ceil(_count(self.given, "method.num_rollouts") / _count(self.given, "train.batch_size"))
        )


def _count(given: Mapping[str, Any], key: str) -> int:
    value = given.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"`{key}` = {value!r}: PPO of trlX needs a number of at least 1 there")
    return value


_Rule = Callable[[Work, str, Any], None]


def take(work: Work, key: str) -> None:
    """Translate one key.

    Raises:
        ConfigError: trlX has no such key.
    """
    value = work.given[key]
    for table in (_OF[work.algorithm], _ALL):
        rule = table.get(key)
        if isinstance(rule, str):
            work.set(rule, value, key)
            return
        if rule is not None:
            rule(work, key, value)
            return
    others = {name for table in _OF.values() for name in table}
    if key in others:
        work.drop(key, f"another algorithm's; this is {work.algorithm}")
        return
    near = difflib.get_close_matches(key, [*others, *_ALL], n=1)
    raise ConfigError(f"trlX has no key `{key}`" + (f"; did you mean `{near[0]}`?" if near else ""))


def _no(why: str) -> _Rule:
    return lambda work, key, value: work.drop(key, why)


def _unless(nothing: Sequence[Any], ours: str, why: str) -> _Rule:
    """Take a value, but for those that mean nothing."""

    def rule(work: Work, key: str, value: Any) -> None:
        # 0 and False are equal, and both mean that nothing is done.
        if value in nothing:
            work.drop(key, why)
        else:
            work.set(ours, value, key)

    return rule


def _refused_unless_empty(work: Work, key: str, value: Any) -> None:
    if value:
        raise ConfigError(f"`{key}` = {value!r} has no counterpart: leave it out, and see docs/from_trlx.md")
    work.drop(key, "it is empty")


def _total_steps(work: Work, key: str, value: Any) -> None:
    steps = int(value)
    if work.algorithm == "rft":
        work.drop(key, "RFT counts selections: see train.epochs")
        return
    if work.algorithm == "ppo" and "train.epochs" in work.given:
        steps = min(steps, int(work.given["train.epochs"]) * work.updates_per_step)
    text = f"(steps of {work.updates_per_step} updates)" if work.updates_per_step > 1 else ""
    work.set("train.total_steps", max(1, math.ceil(steps / work.updates_per_step)), key, text)


def _epochs(work: Work, key: str, value: Any) -> None:
    if work.algorithm == "rft":
        work.set("train.total_steps", int(value), key, "(one selection with its updates)")
    elif work.algorithm == "ppo":
        work.drop(key, "train.total_steps holds the smaller of the two")
    else:
        work.drop(key, "a run has train.total_steps updates, however often that passes over the rows")


def _interval(ours: str) -> _Rule:
    """An interval in updates as one in steps."""

    def rule(work: Work, key: str, value: Any) -> None:
        steps = max(1, round(int(value) / work.updates_per_step))
        if ours == "train.save_every" and int(value) >= int(work.given.get("train.total_steps", math.inf)):
            work.drop(key, "it is no shorter than the run, whose end is always saved")
        else:
            work.set(ours, steps, key, "(steps)" if work.updates_per_step > 1 else "")

    return rule


def _batch_size(work: Work, key: str, value: Any) -> None:
    if work.algorithm == "ppo":
        work.set("ppo.minibatches", work.minibatches, key, "(updates for each pass over method.num_rollouts)")
    else:
        work.set(f"{work.algorithm}.batch_size", value, key, "(of all processes: multiply by their number)")


def _minibatch_size(work: Work, key: str, value: Any) -> None:
    if value is None:
        work.drop(key, "an update is one micro-batch unless told otherwise")
        return
    parts = max(1, math.ceil(_count(work.given, "train.batch_size") / int(value)))
    work.set("train.gradient_accumulation_steps", parts, key, "(parts of an update)")


def _seq_length(work: Work, key: str, value: Any) -> None:
    longest = work.given.get("method.gen_kwargs.max_new_tokens", 0)
    if work.algorithm == "sft":
        work.set("sft.max_length", value, key)
    elif work.algorithm == "ilql" or not isinstance(longest, int) or not 0 < longest < int(value):
        work.drop(key, "the model's window bounds texts; data.max_tokens leaves longer ones out")
    else:
        work.set("tokenizer.max_prompt_tokens", int(value) - longest, key, "(less generation.max_new_tokens)")
        work.set("tokenizer.truncate_prompts", True, key)


def _tracker(work: Work, key: str, value: Any) -> None:
    names = [value] if isinstance(value, str) else list(value or ())
    known = [name for name in names if name in ("wandb", "tensorboard")]
    if known != names:
        raise ConfigError(f"`{key}` = {value!r}: there are wandb and tensorboard")
    if not names:
        work.drop(key, "metrics.jsonl is always written")
    for name in names:
        work.set(f"tracking.{name}", True, key)


def _optimizer(work: Work, key: str, value: Any) -> None:
    if str(value).lower() not in ("adam", "adamw"):
        raise ConfigError(f"`{key}` = {value!r} has no counterpart: AdamW is the only optimizer")
    work.drop(key, "AdamW is the only optimizer")


def _scheduler(work: Work, key: str, value: Any) -> None:
    name = str(value).lower()
    if name not in ("cosine_annealing", "linear", "constant"):
        raise ConfigError(f"`{key}` = {value!r} has no counterpart: there are constant, linear and cosine")
    rate, last = (work.given.get(each) for each in ("optimizer.kwargs.lr", "scheduler.kwargs.eta_min"))
    if name == "cosine_annealing" and rate is not None and rate == last:
        work.set("scheduler.name", "constant", key, "(eta_min is the rate itself)")
    else:
        work.set("scheduler.name", "cosine" if name == "cosine_annealing" else name, key)


def _last_rate(work: Work, key: str, value: Any) -> None:
    """The older form, which names the first and the last rate."""
    first = work.given.get("train.lr_init", work.given.get("train.learning_rate_init"))
    if value == first:
        work.set("scheduler.name", "constant", key, "(it is the first rate)")
    else:
        work.set("scheduler.name", "cosine", key, "(which falls to 0)")


def _score_scaling(work: Work, key: str, value: Any) -> None:
    if value in ("running", "ref"):
        work.set("shaping.scaling", "running" if value == "running" else "reference", key)
    elif value in (None, False, "ignored"):
        work.drop(key, "scores are not scaled unless told so")
    else:
        raise ConfigError(f"`{key}` = {value!r}: trlX has running, ref and ignored")


def _reference_std(work: Work, key: str, value: Any) -> None:
    if value is None or work.given.get("method.scale_reward") != "ref":
        work.drop(key, "measured where shaping.scaling=reference needs it")
    else:
        work.set("shaping.reference_std", value, key)


def _lora_of_delta(work: Work, key: str, value: Any) -> None:
    if not value:
        work.drop(key, "it is empty")
        return
    if value.get("delta_type") != "lora":
        raise ConfigError(f"`{key}.delta_type` = {value.get('delta_type')!r} has no counterpart: take lora")
    names = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
    lora = {ours: value[theirs] for theirs, ours in names.items() if theirs in value}
    modules = value.get("modified_modules")
    if isinstance(modules, list):
        lora["target_modules"] = modules
    text = "(modified_modules are ranges or words of OpenDelta: set target_modules)"
    work.set("model.peft_config", lora, key, "" if isinstance(modules, list | None) else text)


def _lora(work: Work, key: str, value: Any) -> None:
    if not value:
        work.drop(key, "it is empty")
        return
    if str(value.get("peft_type", "LORA")).upper() != "LORA":
        raise ConfigError(f"`{key}.peft_type` = {value['peft_type']!r} has no counterpart: take LORA")
    left_out = ("peft_type", "task_type", "inference_mode")
    work.set("model.peft_config", {name: each for name, each in value.items() if name not in left_out}, key)


def _layers(work: Work, key: str, value: Any) -> None:
    if value == 0:
        raise ConfigError(
            f"`{key}` = 0 trains heads alone, which Conch does not: take at least 1, or -1 for all"
        )
    work.set("model.num_layers_unfrozen", value, key)


def _sampled(name: str, ours: str, *, whole: bool = False) -> _Rule:
    """A setting of sampling: a list is swept in evaluations, and `gen_kwargs` are evaluation's alone where
    training has `gen_experience_kwargs`."""

    def rule(work: Work, key: str, value: Any) -> None:
        evaluates = key.startswith("method.gen_kwargs.") and (
            isinstance(value, list)
            or any(each.startswith("method.gen_experience_kwargs.") for each in work.given)
        )
        plain = [int(each) for each in value] if whole and isinstance(value, list) else value
        plain = int(value) if whole and not isinstance(value, list) else plain
        work.set(f"eval_generation.{name}" if evaluates else ours, plain, key)

    return rule


def _longest(work: Work, key: str, value: Any) -> None:
    if key.replace("max_length", "max_new_tokens") in work.given:
        work.drop(key, "max_new_tokens wins")
    else:
        work.set(
            "generation.max_new_tokens", value, key, "(without the prompt: lower it by the prompt's tokens)"
        )


def _do_sample(work: Work, key: str, value: Any) -> None:
    if value:
        work.drop(key, "completions are sampled")
    else:
        work.set("eval_generation.do_sample", False, key, "(training samples in any case)")


def _stop_token(work: Work, key: str, value: Any) -> None:
    ids = value if isinstance(value, list) else [value]
    work.set("generation.stop_token_ids", ids, key, "(beside the tokenizer's eos)")


def _betas(work: Work, key: str, value: Any) -> None:
    work.set("eval_generation.beta", value, key, "(each is evaluated)")


_GENERATION: Mapping[str, _Rule] = {
    "max_new_tokens": _sampled("max_new_tokens", "generation.max_new_tokens"),
    "max_length": _longest,
    "temperature": _sampled("temperature", "generation.temperature"),
    "top_k": _sampled("top_k", "generation.top_k", whole=True),
    "top_p": _sampled("top_p", "generation.top_p"),
    "do_sample": _do_sample,
    "eos_token_id": _stop_token,
    "min_length": _no("a completion may end at any token; shaping.missing_eos_penalty is about long ones"),
    "min_new_tokens": _no("a completion may end at any token"),
    "num_return_sequences": _no(
        "each prompt has one sample a step, and as many as train.eval_repeats in evaluations"
    ),
    "pad_token_id": _no("padding is masked, whatever its token"),
    "use_cache": _no("the cache is always used"),
}

_ALL: Mapping[str, str | _Rule] = {
    "model.model_path": "model.path",
    "model.num_layers_unfrozen": _layers,
    "model.model_arch_type": _no("config.json of the model says it"),
    "model.model_type": _no("the algorithm is named by the command"),
    "model.tokenizer_path": "tokenizer.path",
    "model.delta_kwargs": _lora_of_delta,
    "model.peft_config": _lora,
    "model.model_extra_configs": _refused_unless_empty,
    "tokenizer.tokenizer_path": "tokenizer.path",
    "tokenizer.truncation_side": "tokenizer.truncation_side",
    "tokenizer.padding_side": _no("padding is masked, on either side"),
    "tokenizer.tokenizer_extra_configs": _refused_unless_empty,
    "optimizer.name": _optimizer,
    "optimizer.kwargs.lr": "optimizer.learning_rate",
    "optimizer.kwargs.betas": "optimizer.betas",
    "optimizer.kwargs.eps": "optimizer.eps",
    "optimizer.kwargs.weight_decay": "optimizer.weight_decay",
    "scheduler.name": _scheduler,
    "scheduler.kwargs.T_max": _no("a schedule ends with the run"),
    "scheduler.kwargs.eta_min": _no("a schedule falls to 0, or is constant"),
    "scheduler.kwargs.total_iters": _no("a schedule ends with the run"),
    "scheduler.kwargs.warmup_steps": "scheduler.warmup_updates",
    "train.total_steps": _total_steps,
    "train.epochs": _epochs,
    "train.batch_size": _batch_size,
    "train.minibatch_size": _minibatch_size,
    "train.seq_length": _seq_length,
    "train.eval_interval": _interval("train.eval_every"),
    "train.checkpoint_interval": _interval("train.save_every"),
    "train.checkpoint_dir": "train.output_dir",
    "train.resume_from_checkpoint": _unless(
        (None,), "train.resume", "the run starts anew unless told otherwise"
    ),
    "train.seed": "train.seed",
    "train.project_name": "tracking.project",
    "train.tracker": _tracker,
    "train.trackers": _tracker,
    "train.entity_name": _no("set WANDB_ENTITY"),
    "train.group_name": _no("set WANDB_RUN_GROUP"),
    "train.tags": _no("set WANDB_TAGS"),
    "train.logging_dir": _no("everything of a run is in its folder"),
    "train.rollout_logging_dir": lambda work, key, value: (
        work.set("tracking.rollouts", True, key, "(in the run's folder)")
        if value
        else work.drop(key, "rollouts are written with tracking.rollouts")
    ),
    "train.save_best": _no("the best checkpoint is always kept, by train.best_metric"),
    "train.save_optimizer": _no("a checkpoint holds all that the run goes on from"),
    "train.reward_only_in_main_process": _no("each process asks for the rewards of its own samples"),
    "train.pipeline": _no("the data's form says what it is"),
    "train.orchestrator": _no("samples are collected by the trainer"),
    "train.trainer": _no("the algorithm is named by the command"),
    "train.trainer_kwargs": _refused_unless_empty,
    # The older form.
    "train.lr_init": "optimizer.learning_rate",
    "train.learning_rate_init": "optimizer.learning_rate",
    "train.lr_target": _last_rate,
    "train.learning_rate_target": _last_rate,
    "train.lr_ramp_steps": "scheduler.warmup_updates",
    "train.lr_decay_steps": _no("a schedule ends with the run"),
    "train.opt_betas": "optimizer.betas",
    "train.opt_eps": "optimizer.eps",
    "train.weight_decay": "optimizer.weight_decay",
    "method.name": _no("the algorithm is named by the command"),
    **{f"method.gen_kwargs.{name}": rule for name, rule in _GENERATION.items()},
    **{f"method.gen_experience_kwargs.{name}": rule for name, rule in _GENERATION.items()},
    "method.gen_experience_kwargs": _refused_unless_empty,
    "method.gen_kwargs": _refused_unless_empty,
}
"""Full name of a key -> ours, or what is done with it."""

_OF: Mapping[Algorithm, Mapping[str, str | _Rule]] = {
    "ppo": {
        "method.ppo_epochs": "ppo.epochs",
        "method.num_rollouts": lambda work, key, value: work.set(
            "ppo.rollouts_per_step", value, key, "(of all processes: multiply by their number)"
        ),
        "method.chunk_size": "generation.chunk_size",
        "method.init_kl_coef": "ppo.kl.coef",
        "method.target": _unless(
            (None,), "ppo.kl.target", "the weight of the KL is fixed unless told otherwise"
        ),
        "method.horizon": "ppo.kl.horizon",
        "method.gamma": "ppo.gamma",
        "method.lam": "ppo.lam",
        "method.cliprange": "ppo.clip_ratio",
        "method.cliprange_value": "ppo.clip_value",
        "method.vf_coef": "ppo.value_coef",
        "method.num_value_layers_unfrozen": "ppo.num_value_layers_unfrozen",
        "method.scale_reward": _score_scaling,
        "method.ref_mean": _no("the mean is never taken off: the sign of a reward keeps its meaning"),
        "method.ref_std": _reference_std,
        "method.cliprange_reward": _unless(
            (None, 0, False), "shaping.clip", "scores are not clipped unless told so"
        ),
    },
    "ilql": {
        "method.tau": "ilql.tau",
        "method.gamma": "ilql.gamma",
        "method.cql_scale": "ilql.cql_scale",
        "method.awac_scale": "ilql.awac_scale",
        "method.alpha": "ilql.alpha",
        "method.beta": "ilql.awac_beta",
        "method.steps_for_target_q_sync": "ilql.steps_for_target_q_sync",
        "method.two_qs": lambda work, key, value: work.set("ilql.num_q_heads", 2 if value else 1, key),
        "method.betas": _betas,
        "method.gen_kwargs.beta": _sampled("beta", "generation.beta"),
    },
    "sft": {},
    "rft": {
        "method.start_percentile": "rft.start_percentile",
        "method.end_percentile": "rft.end_percentile",
        "method.n_improve_steps": "rft.n_improve_steps",
        "method.n_generations_per_prompt": "rft.n_generations_per_prompt",
    },
}
"""The same for what one algorithm alone has."""

TRANSLATED = frozenset({*_ALL, *(key for table in _OF.values() for key in table)})
"""Every key of trlX that is known."""

"""The GRPO example's settings, and what they become of Conch's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from conch.cli import describe, load_run_config
from conch.config import Section, load
from conch.config.base import nested_section
from conch.errors import ConfigError
from conch.rewards.verifiers.named import named_verifier
from conch.trainers.grpo import GRPORunConfig
from examples.grpo.async_settings import AsyncExampleConfig
from examples.grpo.batches import Batches, plan_batches
from examples.grpo.devices import ROLES, DevicePlan, Wish, plan_devices
from examples.grpo.grpo import CONFIGS, DEFAULT, config_name
from examples.grpo.launch import servers_of, training_command
from examples.grpo.outputs import overrides_in
from examples.grpo.prompts import form_asked_for
from examples.grpo.settings import NOT_HERE, RENAMED, ExampleConfig
from examples.grpo.translation import (
    run_config,
    run_section,
    sampler,
    translate,
    with_names_of_here,
    without_effect,
)

ONE = plan_devices({}, has_reference=True, num_gpus=0)
GPU = plan_devices({}, has_reference=True, num_gpus=1)


def settings(*words: str, section: type[ExampleConfig] = ExampleConfig) -> ExampleConfig:
    """The settings of a command line, not by the program's own way, which takes a quarter of a second.

    section: of the program.
    """
    values: dict[str, Any] = {}
    for name, _, value in (word.partition("=") for word in words):
        *parents, key = name.split(".")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[key] = yaml.safe_load(value)
    return load(section, values)


def became(*words: str, plan: DevicePlan = ONE, has_vllm: bool = False) -> GRPORunConfig:
    """The run that a command line asks for."""
    return run_config(translate(settings(*words), plan, has_vllm=has_vllm))


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_file_is_a_run(file: Path) -> None:
    words = ["--config-name", file.stem, "optimizer.lr=2e-5"]
    config = load_run_config(ExampleConfig, words, default_name=DEFAULT, config_dir=CONFIGS)
    assert file.stem == f"grpo_{config.env.dataset}"
    run = run_config(translate(config, ONE, has_vllm=False))
    assert (run.reward.verifier, run.optimizer.learning_rate) == (config.env.dataset, 2e-5)


TENSOR_PARALLEL = ("GPUs apart, with vLLM", "servers while training")
LEAVES_NO_TRACE = {"optimizer.name", "conch"}
"""Settings with a single value, and those that stand for others."""

OTHER: dict[str, Any] = {
    "env.dataset": "ifeval",
    "inference_model.backend": "transformers",
    "inference_model.tensor_parallel_size": 2,
    "train.dialog_turns_per_batch": 64,
    "train.gradient_accumulation_steps": 2,
    "train_model.accelerate_config": "zero3",
    "train_model.attn_implementation": "eager",
    "train_model.lora.target_modules": "all-linear",
    "policy.kl_coef": 0.0,
    "train.optim_batch_size": 16,
    "train.buffer_size": 100,
    "inference_model.served_by": "servers",
    "ray.init_config.num_cpus": 64,
    "ray.collector_config.num_cpus": 2,
}
"""Another value, where a rule gives none that makes a run."""

APART = ["train_model.num_devices=2", "inference_model.num_devices=2"]
PLANS: dict[str, tuple[type[ExampleConfig], list[str], int, bool]] = {
    "one process": (ExampleConfig, [], 0, False),
    "one GPU with vLLM": (ExampleConfig, [], 1, True),
    "GPUs apart, with vLLM": (ExampleConfig, APART, 8, True),
    "simulated apart": (ExampleConfig, APART, 0, False),
    "ray": (AsyncExampleConfig, APART, 0, False),
    "ray with vLLM": (AsyncExampleConfig, APART, 8, True),
    "servers while training": (AsyncExampleConfig, [*APART, "inference_model.served_by=servers"], 8, True),
    "without an adapter": (ExampleConfig, ["train_model.lora.enabled=false"], 0, False),
    "with evaluations": (ExampleConfig, ["train.eval_frequency=10"], 0, False),
}


def leaves(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Full name of each setting, and its field."""
    for name, field in section.model_fields.items():
        nested = nested_section(field.annotation)
        if nested is None:
            yield f"{prefix}{name}", field
        elif name != "reward":
            yield from leaves(nested, f"{prefix}{name}.")


def another(name: str, field: Any) -> Any:
    """A value that is not the default."""
    if name in OTHER:
        return OTHER[name]
    default, kinds = field.default, str(field.annotation)
    if isinstance(default, bool) or "bool" in kinds:
        return not default
    if isinstance(default, float):
        return default / 2 or 0.5
    if isinstance(default, int):
        return default * 2 or 3
    if "float16" in kinds:
        return "float16"
    return 0.5 if "float" in kinds else 512 if "int" in kinds else "other"


@pytest.mark.parametrize("case", PLANS)
def test_every_setting_changes_something_or_the_program_says_that_it_does_not(case: str) -> None:
    section, words, num_gpus, has_vllm = PLANS[case]

    def effect(*more: str) -> tuple[Any, list[str]]:
        config = settings(*words, *more, section=section)
        wishes = {name: Wish(getattr(config, name).num_devices) for name in ROLES}
        has_reference, overlaps = config.policy.kl_coef > 0, section is AsyncExampleConfig
        plan = plan_devices(wishes, has_reference=has_reference, num_gpus=num_gpus, overlaps=overlaps)
        run = run_config(translate(config, plan, has_vllm=has_vllm), None, run_section(config))
        servers = servers_of(config, run, plan, has_vllm=has_vllm)
        command = training_command(config, plan, Path("task"))
        command = command[: command.index("task") - 3]  # without a port
        told = [server.settings for server in servers]
        unused = without_effect(config, plan, has_vllm=has_vllm)
        env = config.env
        if not config.train.eval_frequency:
            env = env.model_copy(update={"eval_data": None, "max_eval_rows": 0})
        return (run, plan, command, told, env), unused

    plain, unused = effect()
    assert not unused
    wrong: list[str] = []
    for name, field in leaves(section):
        first = name.partition(".")[0]
        if name in LEAVES_NO_TRACE or name.endswith(("devices", "num_devices")) or first == "ref_model":
            continue
        if name == "inference_model.tensor_parallel_size" and case not in TENSOR_PARALLEL:
            continue  # refused
        if name == "inference_model.top_p" and section is AsyncExampleConfig:
            continue  # refused
        if name == "inference_model.served_by" and case == "servers while training":
            continue  # the other value is the default
        if name == "train_model.lora.enabled" and case == "without an adapter":
            continue  # so is the other value
        if name == "inference_model.backend" and not has_vllm:
            continue  # it is transformers then, asked for or not
        changed, unused = effect(f"{name}={json.dumps(another(name, field))}")
        if (changed != plain) == any(f"`{name}`" in line for line in unused):
            wrong.append(name)
    assert not wrong


# --------------------------------------------------------------------------------------------------- batches


def cut(num_processes: int, **settings: Any) -> Batches:
    """The batches of these settings of `train`, with `num_envs` and `repeats` of `env`."""
    env = {name: settings.pop(name) for name in ("num_envs", "repeats") if name in settings}
    return plan_batches(load(ExampleConfig, {"env": env, "train": settings}), num_processes)


def test_batches_of_the_defaults() -> None:
    made = cut(1)
    assert (made.turns, made.prompts, made.minibatches, made.accumulation) == (128, 8, 4, 8)
    assert made.at_once == 128
    assert made.steps * made.turns >= 100_000 > (made.steps - 1) * made.turns


@pytest.mark.parametrize("num_processes", [1, 2, 4])
@pytest.mark.parametrize("turns", [64, 100, 1000, 100_000])
def test_all_turns_are_trained_whatever_the_accumulation(num_processes: int, turns: int) -> None:
    for parts in (1, 2, 4):
        made = cut(
            num_processes, total_dialog_turns=turns, optim_batch_size=16, gradient_accumulation_steps=parts
        )
        trained_per_step = made.minibatches * 16
        assert trained_per_step == made.turns == made.prompts * 16
        assert 0 <= made.steps * trained_per_step - turns < made.turns


@pytest.mark.parametrize("optim", [1, 2, 4, 8, 16, 32, 64, 128])
def test_an_optimizer_step_is_cut_into_parts_of_at_most_four(optim: int) -> None:
    parts = cut(1, optim_batch_size=optim).accumulation
    assert optim % parts == 0 and optim // parts == min(4, optim)


def test_fewer_environments_sample_fewer_at_once() -> None:
    whole = cut(2, dialog_turns_per_batch=128)
    less = cut(2, dialog_turns_per_batch=128, num_envs=2)
    assert (whole.at_once, less.at_once) == (64, 16)
    assert (whole.turns, whole.prompts) == (less.turns, less.prompts) == (128, 8)


@pytest.mark.parametrize(
    ("num_processes", "values", "message"),
    [
        (1, {"dialog_turns_per_batch": 40}, "= 40 is not whole groups of `env.repeats` = 16: take 32 or 48"),
        (1, {"dialog_turns_per_batch": 8}, "= 8 is not whole groups of `env.repeats` = 16: take 16"),
        (
            3,
            {"dialog_turns_per_batch": 128},
            r"= 128 has 8 prompts \(128 / 16\), which 3 training processes do not share evenly: "
            "take 96 or 144",
        ),
        (
            1,
            {"optim_batch_size": 48},
            r"`env.num_envs` \* `env.repeats` = 8 \* 16 = 128 does not divide into optimizer steps of "
            "`train.optim_batch_size` = 48: take 32 or 64",
        ),
        (1, {"dialog_turns_per_batch": 16, "optim_batch_size": 32}, "= 32: take 16$"),
        (
            2,
            {"optim_batch_size": 1},
            "`train.optim_batch_size` = 1 does not divide into 2 training processes: take 2$",
        ),
        (
            2,
            {"optim_batch_size": 32, "gradient_accumulation_steps": 32},
            r"= 32 does not divide into 2 training processes times 32 parts "
            r"\(`train.gradient_accumulation_steps`\): take 64",
        ),
        (
            1,
            {"optim_batch_size": 4, "gradient_accumulation_steps": 8},
            r"= 4 does not divide into 8 parts \(`train.gradient_accumulation_steps`\): take 8",
        ),
    ],
)
def test_batches_that_do_not_come_out_are_one_sentence(
    num_processes: int, values: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        cut(num_processes, **values)
    assert "\n" not in str(raised.value)


def test_what_a_message_offers_holds() -> None:
    """Each number that is offered instead is taken, for all of many settings."""
    for num_processes in (1, 2, 3, 4):
        for repeats in (2, 6, 16):
            for optim in (1, 5, 12, 32):
                for parts in (None, 1, 3):
                    values = {"num_envs": 12, "repeats": repeats, "gradient_accumulation_steps": parts}
                    try:
                        cut(num_processes, optim_batch_size=optim, **values)
                    except ConfigError as error:
                        for offered in re.findall(r"\d+", str(error).rpartition("take ")[2]):
                            cut(num_processes, optim_batch_size=int(offered), **values)


# ----------------------------------------------------------------------------------------------- translation


@pytest.mark.parametrize(
    ("word", "name", "value"),
    [
        ("model.name=some/model", "model.path", "some/model"),
        ("optimizer.lr=2.0e-5", "optimizer.learning_rate", 2e-5),
        ("optimizer.weight_decay=0.01", "optimizer.weight_decay", 0.01),
        ("optimizer.clip_grad_norm=0.5", "train.max_grad_norm", 0.5),
        ("policy.kl_coef=0.1", "grpo.kl.coef", 0.1),
        ("train.kl_to_ref_coeff=0.1", "grpo.kl.coef", 0.1),
        ("train.kl_coef_in_loss=false", "grpo.kl.placement", "reward"),
        ("train.checkpoint_frequency=7", "train.save_every", 7),
        ("logging.checkpoint_frequency=7", "train.save_every", 7),
        ("train.keep_checkpoints=2", "train.keep_last", 2),
        ("train.total_dialog_turns=1000", "train.total_steps", 8),
        ("train.steps_per_batch=32", "grpo.prompts_per_step", 2),
        ("train.dialog_turns_per_batch=32", "grpo.prompts_per_step", 2),
        ("train.optim_batch_size=64", "grpo.minibatches", 2),
        ("train.gradient_accumulation_steps=2", "train.gradient_accumulation_steps", 2),
        ("train.epochs=3", "grpo.epochs", 3),
        ("env.num_envs=4", "grpo.prompts_per_step", 4),
        ("env.num_envs=2", "generation.chunk_size", 32),
        ("env.repeats=4", "grpo.group_size", 4),
        ("env.dataset=ifeval", "reward.verifier", "ifeval"),
        ("reward.gsm8k.version=torchrl", "reward.gsm8k.version", "torchrl"),
        ("reward.gsm8k.version=torchrl", "reward.verifier", "gsm8k"),
        ("reward.url=host:8001/rm", "reward.verifier", None),
        ("reward.url=host:8001/rm", "evaluation.verifier", "gsm8k"),
        ("reward.judge={url: 'http://h:8001/v1', model: m}", "reward.verifier", None),
        ("reward.judge={url: 'http://h:8001/v1', model: m}", "evaluation.verifier", "gsm8k"),
        ("reward.judge={file: judge.yaml}", "reward.verifier", None),
        ("reward.judge={file: judge.yaml}", "evaluation.verifier", "gsm8k"),
        ("reward.members={a: 'h:1/m', gsm8k: 'verifier:gsm8k'}", "evaluation.verifier", None),
        ("reward.members={gsm8k: 'h:1/m', a: 'verifier:gsm8k'}", "evaluation.verifier", "gsm8k"),
        ("reward.gsm8k.extractor=strict", "evaluation.verifier", None),
        ("inference_model.temperature=0.8", "generation.temperature", 0.8),
        ("inference_model.top_p=0.9", "generation.top_p", 0.9),
        ("inference_model.max_tokens=99", "generation.max_new_tokens", 99),
        ("train_model.attn_implementation=eager", "model.attention", "eager"),
        ("train_model.gradient_checkpointing=false", "model.gradient_checkpointing", False),
        ("train_model.lora.enabled=false", "model.peft_config", None),
        ("train_model.lora.r=4", "model.peft_config", {"r": 4, "lora_alpha": 16, "lora_dropout": 0.0}),
        ("train_model.lora.dropout=0.1", "model.disable_dropout", False),
        ("train.seed=3", "train.seed", 3),
        ("logging.wandb=true", "tracking.wandb", True),
        ("logging.experiment_name=mine", "tracking.project", "mine"),
        ("train.exp_name=mine", "tracking.project", "mine"),
        ("conch.grpo.loss=dapo", "grpo.loss", "dapo"),
        ("conch.scheduler.name=cosine", "scheduler.name", "cosine"),
    ],
)
def test_settings_become_those_of_conch(word: str, name: str, value: object) -> None:
    found: Any = became(word)
    for part in name.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    "reward",
    [
        "reward.url=h:1/m",
        "reward.members={rm: h:1/m, right: 'verifier:gsm8k'}",
        "reward.function=f.py:score",
        "reward.judge.file=judge.yaml",
        "reward.replay=run",
    ],
)
def test_the_verifier_that_watches_checks_as_the_reward_was_told_to(reward: str) -> None:
    how = ("reward.gsm8k.extractor=verl", "reward.gsm8k.last_characters=300")
    run = became(reward, *how)
    assert run.evaluation.gsm8k == run.reward.gsm8k
    assert (run.evaluation.gsm8k.extractor, run.evaluation.gsm8k.last_characters) == ("verl", 300)
    run = became(reward, "reward.gsm8k.extractor=flexible", "conch.evaluation.gsm8k.extractor=strict")
    assert (run.reward.gsm8k.extractor, run.evaluation.gsm8k.extractor) == ("flexible", "strict")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("reward.gsm8k.extractor=strict",), ""),
        (("reward.gsm8k.extractor=strict", "reward.url=h:1/m", "train.eval_frequency=5"), ""),
        (
            ("reward.gsm8k.extractor=strict", "reward.url=h:1/m"),
            "`reward.gsm8k.extractor` = strict: gsm8k watches in evaluations, and `train.eval_frequency` = 0",
        ),
        (("reward.gsm8k.extractor=strict", "reward.members={a: h:1/m, b: 'verifier:gsm8k'}"), ""),
        (
            ("env.dataset=ifeval", "reward.gsm8k.extractor=strict"),
            "`reward.gsm8k.extractor` = strict: nothing is checked by the verifier gsm8k",
        ),
        (("env.dataset=ifeval", "reward.ifeval.loose=true"), ""),
        (("env.dataset=ifeval", "reward.verifier=gsm8k", "reward.gsm8k.extractor=strict"), ""),
    ],
)
def test_settings_of_a_verifier_that_checks_nothing_are_told(words: tuple[str, ...], told: str) -> None:
    lines = without_effect(settings(*words), ONE, has_vllm=False)
    assert lines == ([f"  without effect: {told}"] if told else [])


CHECKED: dict[str, tuple[dict[str, Any], str, str]] = {
    "gsm8k": ({"answer": "9 * 2 = 18\n#### 18"}, "18", "17"),
    "ifeval": (
        {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        "A river runs",
        "Yes, it runs",
    ),
}
"""Dataset -> a row, a right answer and a wrong one."""


@pytest.mark.parametrize("words", [(), ("reward.url=host:8001/rm",)], ids=["learns", "watches"])
@pytest.mark.parametrize("section", [ExampleConfig, AsyncExampleConfig])
@pytest.mark.parametrize(
    ("dataset", "version"),
    [(name, version) for name in CHECKED for version in ("", "torchrl")] + [("gsm8k", "seed")],
)
def test_the_form_that_a_prompt_asks_for_is_what_the_reward_reads(
    dataset: str, version: str, section: type[ExampleConfig], words: tuple[str, ...]
) -> None:
    """The thinking holds the other answer, so that a reward which reads it is wrong."""
    row, right, wrong = CHECKED[dataset]
    given = [f"reward.{dataset}.version={version}"] if version else []
    config = settings(f"env.dataset={dataset}", *words, *given, section=section)
    plan = plan_devices({}, has_reference=True, num_gpus=0, overlaps=section is AsyncExampleConfig)
    run = run_config(translate(config, plan, has_vllm=False), None, run_section(config))
    judge = run.evaluation if words else run.reward
    assert judge.verifier == dataset
    verifier = named_verifier(dataset, judge.gsm8k, judge.ifeval)
    asked = form_asked_for(dataset, run.reward)
    assert "between <think> and </think>" in asked
    tags = ("<answer>", "</answer>") if "between <answer> and </answer>" in asked else ("", "")
    for answer, other, correct in ((right, wrong, 1.0), (wrong, right, 0.0)):
        completion = f"<think>So it is {other}</think>{answer.join(tags)}"
        verdict = verifier.verify(completion, verifier.read_key(row))
        assert verdict.facts[verifier.success] == correct, completion


@pytest.mark.parametrize(
    ("words", "plan", "dtype", "mixed"),
    [
        ((), ONE, "float32", "no"),
        ((), GPU, "bfloat16", "bf16"),
        (("train_model.lora.enabled=false",), GPU, "float32", "bf16"),
        (("train_model.torch_dtype=float16", "train_model.lora.enabled=false"), GPU, "float32", "fp16"),
        (("train_model.torch_dtype=float32",), GPU, "float32", "no"),
        (("train.mixed_precision=false",), GPU, "bfloat16", "no"),
    ],
)
def test_weights_keep_small_updates(words: tuple[str, ...], plan: DevicePlan, dtype: str, mixed: str) -> None:
    run = became(*words, plan=plan)
    assert (run.model.dtype, run.train.mixed_precision) == (dtype, mixed)


def test_half_precision_that_would_lose_updates_is_refused() -> None:
    with pytest.raises(ConfigError, match="would lose small updates"):
        became("train_model.lora.enabled=false", "train.mixed_precision=false", plan=GPU)


def test_vllm_is_taken_where_it_is_installed_and_there_is_a_gpu() -> None:
    assert became(plan=GPU, has_vllm=True).rollout.engine == "vllm"
    assert became(plan=GPU, has_vllm=False).rollout.engine == "hf"
    assert became(plan=ONE, has_vllm=True).rollout.engine == "hf"
    run = became("inference_model.gpu_memory_utilization=0.4", plan=GPU, has_vllm=True)
    assert run.rollout.gpu_memory_utilization == 0.4
    with pytest.raises(ConfigError, match="vLLM is not installed"):
        became("inference_model.backend=vllm", plan=GPU)


def test_copies_of_the_sampler_take_whole_devices() -> None:
    plan = plan_devices({"inference_model": Wish(3)}, has_reference=True, num_gpus=4)
    with pytest.raises(ConfigError, match=r"3 devices, which do not divide into copies on .* = 2"):
        sampler(settings("inference_model.tensor_parallel_size=2"), plan, has_vllm=True)
    with pytest.raises(ConfigError, match="needs vLLM on devices of its own"):
        sampler(settings("inference_model.tensor_parallel_size=2"), GPU, has_vllm=True)


# ------------------------------------------------------------------------------------- names of elsewhere


@pytest.mark.parametrize(("other", "name"), RENAMED.items())
def test_two_names_of_a_setting_must_agree(other: str, name: str) -> None:
    one, two = ("a", "b") if "name" in name else (32, 64)
    assert (
        settings(f"{other}={one}") == settings(f"{name}={one}") == settings(f"{other}={one}", f"{name}={one}")
    )
    with pytest.raises(ConfigError, match=f"`{other}` = .* and `{name}` = .* are one setting"):
        settings(f"{other}={one}", f"{name}={two}")


@pytest.mark.parametrize("name", NOT_HERE)
def test_what_means_nothing_here_is_refused_with_a_reason(name: str) -> None:
    harmless, reason = NOT_HERE[name]
    with pytest.raises(
        ConfigError, match=re.escape(f"`{name}` = 'never' is no setting of this program: {reason}")
    ):
        settings(f"{name}=never")
    for value in harmless:
        assert settings(f"{name}={'null' if value is None else str(value).lower()}") == settings()


def test_reasons_name_settings_that_exist() -> None:
    """A setting that a reason names is one of the example's, or of Conch's below `conch.`."""
    here, there = describe(ExampleConfig), describe(GRPORunConfig)
    for _, reason in NOT_HERE.values():
        for name in re.findall(r"`([a-z_]+\.[a-z_0-9.]+)", reason):
            listed = there if name.startswith("conch.") else here
            assert re.search(rf"(?m)^\s*{re.escape(name.removeprefix('conch.'))}\b", listed), name


def test_a_section_of_elsewhere_is_refused_whole() -> None:
    with pytest.raises(
        ConfigError, match=r"`ray` = .* is no setting of this program: it belongs to asynchronous"
    ):
        settings("ray.init_config.num_cpus=4")


def test_the_reference_is_what_is_trained() -> None:
    same = ("train_model.torch_dtype=bfloat16", "ref_model.torch_dtype=bfloat16")
    assert settings(*same).ref_model.torch_dtype == "bfloat16"
    with pytest.raises(ConfigError, match=r"`ref_model.torch_dtype` = bfloat16, but .* = None"):
        settings("ref_model.torch_dtype=bfloat16")


def test_unknown_keys_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown key `env.repeat`; did you mean `env.repeats`"):
        settings("env.repeat=4")
    with pytest.raises(ConfigError, match=r"unknown key `grpo.los`; did you mean `grpo.loss`"):
        became("conch.grpo.los=dapo")


def test_a_setting_of_conch_with_a_name_here_is_set_by_that() -> None:
    with pytest.raises(
        ConfigError, match=r"`conch.optimizer.learning_rate` has a name here: set optimizer.lr"
    ):
        became("conch.optimizer.learning_rate=1.0")
    with pytest.raises(
        ConfigError, match=r"`conch.train.total_steps` has a name .* set train.total_dialog_turns"
    ):
        became("conch.train.total_steps=3")
    adapter = became("conch.model.peft_config.use_rslora=true").model.peft_config
    assert adapter == {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "use_rslora": True}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lower `generation.max_new_tokens`", "lower `inference_model.max_tokens`"),
        ("with `data.max_tokens=240`, or", "with `conch.data.max_tokens=240`, or"),
        ("`train.save_every` = 3", "`train.checkpoint_frequency` = 3"),
        ("set `train.keep_last` and `model.path`", "set `train.keep_checkpoints` and `model.name`"),
        ("set `train.resume` or `reward.url`", "set `train.resume` or `reward.url`"),
        ("`train.num_processes` = 2", "`conch.train.num_processes` = 2"),
        ("`question` of `model.safetensors`", "`question` of `model.safetensors`"),
    ],
)
def test_messages_name_settings_as_they_are_named_here(text: str, told: str) -> None:
    assert with_names_of_here(text) == told


# ------------------------------------------------------------------------------------------- the command line


def test_words_of_a_command_line() -> None:
    argv = ["--config-name", "grpo_ifeval", "env.repeats=4", "--config-dir=x", "~train.seed"]
    assert config_name(argv) == "grpo_ifeval"
    assert config_name(["--config-name=other"]) == "other" and config_name([]) == DEFAULT
    assert overrides_in(argv) == ["env.repeats=4", "~train.seed"]

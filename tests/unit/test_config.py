from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from pydantic import ValidationError, model_validator

from conch.cli import add_options, default_config_dir, describe, load_run_config
from conch.config import (
    AlarmsConfig,
    AuthConfig,
    EvaluationConfig,
    GenerationConfig,
    ModelConfig,
    RewardAuthConfig,
    RewardClientConfig,
    RewardConfig,
    RewardFailureConfig,
    RolloutConfig,
    Section,
    StopRule,
    TlsConfig,
    TrainConfig,
    load,
)
from conch.config.algorithms import run_config_of
from conch.config.base import describe_field, refuse_unknown_keys
from conch.converters.options import ConversionOptions
from conch.errors import ConfigError
from conch.trainers.ppo import PPORunConfig
from examples.hh import hh_data
from examples.sentiments import reviews

CONFIGS = default_config_dir()
# The program that a file belongs to, by its stem or with its folder -> module and class of its settings.
RUN_CONFIG_CLASSES = {
    "sft": ("conch.trainers.sft", "SFTRunConfig"),
    "reward_model": ("conch.trainers.reward_model", "RewardModelRunConfig"),
    "ppo": ("conch.trainers.ppo", "PPORunConfig"),
    "ppo_exact": ("conch.trainers.ppo", "PPORunConfig"),
    "ilql": ("conch.trainers.ilql", "ILQLRunConfig"),
    "grpo": ("conch.trainers.grpo", "GRPORunConfig"),
    "async_grpo": ("conch.trainers.async_grpo", "AsyncGRPORunConfig"),
    "asynchronous": ("conch.trainers.async_grpo", "AsyncGRPORunConfig"),
    "rft": ("conch.trainers.rft", "RFTRunConfig"),
    "best_of_n": ("conch.evaluation.sampling.config", "BestOfNRunConfig"),
    "quickstart": ("examples.randomwalks.quickstart", "QuickstartConfig"),
    "sentiments/offline": ("examples.sentiments.offline", "OfflineConfig"),
    **{
        f"hh/{trainer}_{size}": (f"examples.hh.{program}", section)
        for trainer, program, section in (
            ("sft", "sft_hh", "SFTHHConfig"),
            ("reward_model", "train_reward_hh", "RewardModelRunConfig"),
            ("ppo", "ppo_hh", "PPOHHConfig"),
            ("ilql", "ilql_hh", "ILQLHHConfig"),
        )
        for size in hh_data.SIZES
    },
    **{
        f"sentiments/{trainer}_{size}": (f"examples.sentiments.{program}_sentiments", section)
        for trainer, program, section in (
            ("sft", "sft", "SFTSentimentsConfig"),
            ("reward_model", "train_reward", "RewardSentimentsConfig"),
            ("ppo", "ppo", "PPOSentimentsConfig"),
            ("dense_ppo", "dense_ppo", "PPOSentimentsConfig"),
            ("rft", "rft", "RFTSentimentsConfig"),
            ("ilql", "ilql", "ILQLSentimentsConfig"),
        )
        for size in reviews.SIZES
    },
    "laboratory/laboratory": ("examples.overoptimisation.laboratory.settings", "LaboratoryConfig"),
}


def program_of(file: Path) -> str | None:
    """The key in RUN_CONFIG_CLASSES; None where no program is known for the file."""
    names = (str(file.relative_to(CONFIGS).with_suffix("")), file.stem)
    return next((name for name in names if name in RUN_CONFIG_CLASSES), None)


RUN_CONFIGS = sorted(file for file in CONFIGS.rglob("*.yaml") if program_of(file))
PRESETS = [file for file in RUN_CONFIGS if file.parent == CONFIGS]
ACCELERATE_CONFIGS = sorted((CONFIGS / "accelerate").glob("*.yaml"))


class Outer(Section):
    """Two sections in one."""

    train: TrainConfig = TrainConfig()
    reward: RewardConfig = RewardConfig()


def run_config_class(file: Path) -> type[Section]:
    module, name = RUN_CONFIG_CLASSES[program_of(file) or ""]
    return getattr(importlib.import_module(module), name)


def groups_of(file: Path) -> set[str]:
    """The folders from which a run config's `defaults` list takes a file."""
    defaults = yaml.safe_load(file.read_text()).get("defaults", [])
    return {group.removeprefix("/") for entry in defaults if isinstance(entry, dict) for group in entry}


GROUP_CHOICES = [
    (run, choice)
    for group in sorted(set().union(*map(groups_of, RUN_CONFIGS)))
    for run in [next(run for run in RUN_CONFIGS if group in groups_of(run))]
    for choice in sorted((CONFIGS / group).glob("*.yaml"))
]


def parse(file: Path, *overrides: str) -> Section:
    name = str(file.relative_to(CONFIGS).with_suffix(""))
    # Presets are made for any model, and name none.
    names_one = any(override.startswith("model=") for override in overrides)
    model = [] if file not in PRESETS or names_one else ["model.path=m"]
    return load_run_config(
        run_config_class(file), [*model, *overrides], default_name=name, config_dir=CONFIGS
    )


def test_every_config_file_is_tried() -> None:
    tried = {*RUN_CONFIGS, *ACCELERATE_CONFIGS, *(choice for _, choice in GROUP_CHOICES)}
    strays = set(CONFIGS.rglob("*.yaml")) - tried
    assert RUN_CONFIGS
    assert not strays, "a file that no trainer is known for, or a folder that no `defaults` list names"


@pytest.mark.parametrize("file", RUN_CONFIGS, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_shipped_run_config_parses(file: Path) -> None:
    assert isinstance(parse(file), run_config_class(file))


@pytest.mark.parametrize(("run", "choice"), GROUP_CHOICES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_shipped_group_choice_parses(run: Path, choice: Path) -> None:
    assert isinstance(parse(run, f"{choice.parent.name}={choice.stem}"), run_config_class(run))


@pytest.mark.parametrize("file", ACCELERATE_CONFIGS, ids=lambda file: file.name)
def test_shipped_accelerate_config_parses_and_leaves_the_number_of_processes_open(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig)
    assert file.read_text().startswith("# ")  # when to take it
    assert not {"num_processes", "gpu_ids", "main_process_ip"} & yaml.safe_load(file.read_text()).keys()
    # -1 makes accelerate ask for --num_processes; without a distributed type there is one process anyhow.
    assert config.num_processes == (1 if file.stem == "cpu" else -1)


def test_accelerate_configs_are_all_there() -> None:
    deepspeed = {"zero2-bf16", "zero2-fp16", "zero2-bf16-multinode", "zero3", "zero3-offload"}
    assert {file.stem for file in ACCELERATE_CONFIGS} == {*deepspeed, "ddp", "fsdp2", "cpu"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"xyz": 1}, r"unknown key `xyz`; valid here: train, reward"),
        ({"sed": 1}, r"unknown key `sed`; did you mean `train\.seed`\?"),
        ({"trian": {}}, r"unknown key `trian`; did you mean `train`\?"),
        ({"train": {"sed": 1}}, r"unknown key `train\.sed`; did you mean `train\.seed`\?"),
        ({"train": {"total_step": 1}}, r"did you mean `train\.total_steps`\?"),
        ({"reward": {"max_inflight": 1}}, r"did you mean `reward\.client\.max_in_flight`\?"),
        ({"train": {"seed": -1}}, r"`train\.seed`: .*greater than or equal to 0 \(got -1\)"),
        ({"train": {"seed": "many"}}, r"`train\.seed`: .*integer.* \(got 'many'\)"),
        (
            {"reward": {"failure": {"policy": "ignore"}}},
            r"`reward\.failure\.policy`: .*'raise', 'drop' or 'wait' \(got 'ignore'\)",
        ),
    ],
)
def test_load_mistake_names_key_and_remedy(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(Outer, values)


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_a_preset_runs_with_the_defaults_that_help_shows_and_python_has(file: Path) -> None:
    section = run_config_class(file)
    assert parse(file) == load(section, {"model": {"path": "m"}})
    assert describe(section, parse(file)).replace("'m'", "None") == describe(section)


def test_a_run_configs_own_defaults_hold_where_a_section_is_given_in_part() -> None:
    model = {"path": "m"}
    default = load(PPORunConfig, {"model": model}).train
    assert (default.total_steps, default.eval_every) == (200, 20) != (TrainConfig().total_steps, 100)
    assert load(PPORunConfig, {"model": model, "train": {"seed": 3}}).train == default.model_copy(
        update={"seed": 3}
    )
    in_python = PPORunConfig(model=ModelConfig(path="m"), train=TrainConfig(total_steps=7))
    assert in_python.train == default.model_copy(update={"total_steps": 7})
    explicit = TrainConfig(total_steps=7, eval_every=100)
    assert PPORunConfig(model=ModelConfig(path="m"), train=explicit).train == explicit


def test_own_defaults_reach_sections_in_sections() -> None:
    class Inner(Outer):
        reward: RewardConfig = RewardConfig(client=RewardClientConfig(batch_rows=3), weights={"a": 1.0})

    config = load(Inner, {"reward": {"client": {"cache_size": 1}}}).reward
    assert (config.client.batch_rows, config.client.cache_size, config.weights) == (3, 1, {"a": 1.0})
    assert load(Inner, {"reward": {"weights": {"b": 2.0}}}).reward.weights == {"b": 2.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reward": {"failure": "drop"}}, r"`reward\.failure` is a section.*`reward\.failure\.policy=drop`"),
        (
            {"reward": {"failure": 3}},
            r"`reward\.failure` is a section.*its keys are `reward\.failure\.policy`",
        ),
        ({"train": None}, r"`train` is a section.*its keys are `train\.seed`"),
        ({"ppo": {"kl_coef": 1}}, r"unknown key `ppo\.kl_coef`; did you mean `ppo\.kl\.coef`\?"),
        ({"ppo": {"beta": 1}}, r"did you mean `ppo\.kl\.coef`\?"),
        ({"lr": 1}, r"did you mean `optimizer\.learning_rate`\?"),
        ({"train": {"max_steps": 1}}, r"did you mean `train\.total_steps`\?"),
        ({"train": {"micro_batch_size": 1}}, r"did you mean `train\.gradient_accumulation_steps`\?"),
        (
            {"grpo": {"group_size": 4}},
            r"unknown key `grpo`; it is a section of `conch train grpo`.*algorithm=",
        ),
        ({"model": {}}, r"`model`: give exactly one of `path`"),
    ],
)
def test_what_users_of_other_programs_write_is_answered(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(PPORunConfig, {"model": {"path": "m"}, **values})


def test_a_run_config_without_a_model_says_what_is_needed() -> None:
    with pytest.raises(ConfigError, match="`model`: give exactly one of `path`, a folder or hub id"):
        load(PPORunConfig, {})


def test_load_reports_all_mistakes_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load(Outer, {"train": {"sed": 1, "total_steps": 0}})
    assert "train.seed" in str(caught.value) and "train.total_steps" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("deadline_s", "client.deadline_s"),
        ("max_in_flight", "client.max_in_flight"),
        ("attempt_timeout_per_1k_tokens_s", "client.timeout_per_1k_tokens_s"),
        ("micro_batch_tokens", "client.batch_tokens"),
        ("secret_env", "auth.secret_env"),
        ("tls", "auth.tls"),
        ("max_failed_fraction", "failure.max_fraction"),
        ("on_model_change", "failure.on_model_change"),
        ("on_failure", r"failure\.policy"),
        ("micro_batch_size", r"client\.batch_rows"),
        ("attempt_timeout_s", r"client\.request_timeout_s"),
        ("remember", r"client\.cache_size"),
        ("ca", "auth.tls.ca"),
    ],
)
def test_key_at_the_wrong_depth_is_found_in_the_nested_section(old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown key `reward\.{old}`; did you mean `reward\.{new}`\?"):
        load(Outer, {"reward": {old: 1}})


@pytest.mark.parametrize("key", ["micro_batches", "try_timeout"])
def test_key_that_is_only_a_little_like_one_of_another_section_gets_the_list(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"`reward\.{key}`; valid here: url, .*, client, auth, failure"):
        load(Outer, {"reward": {key: 1}})


def test_nested_reward_settings_are_read() -> None:
    values = {"client": {"cache_size": 0}, "auth": {"tls": {"ca": "x"}}, "failure": {"policy": "wait"}}
    reward = load(Outer, {"reward": values}).reward
    assert reward.client.cache_size == 0 and reward.client.deadline_s == 60
    assert reward.auth.tls.ca == Path("x") and reward.failure.policy == "wait"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("ppo.kl.coef", "did you mean `grpo.kl.coef`?"),
        ("ppo.clip_value", "it is a section of `conch train ppo`, in Python of"),
        (
            "reward_model.loss.kind",
            "it is a section of `conch train reward-model`, in Python of `conch.trainers.rew",
        ),
        ("polic", "valid here: model, "),
        ("kl_coeff", "did you mean `grpo.kl.coef`?"),
    ],
)
def test_key_of_another_algorithm_is_told_as_this_one_s(key: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"unknown key `{key}`; {said}")):
        refuse_unknown_keys(run_config_of("grpo"), [key])


def test_section_is_frozen() -> None:
    config = TrainConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of `path`.* and `architecture`"),
        ({"path": "x", "architecture": {"model_type": "gpt2"}}, "exactly one of `path`.* and `architecture`"),
        ({"architecture": {"n_layer": 2}}, "needs `model_type`"),
        ({"path": "x", "num_layers_unfrozen": 0}, "nothing would be trained"),
        ({"path": "x", "num_layers_unfrozen": -2}, "num_layers_unfrozen"),
    ],
)
def test_model_config_refuses_contradictions(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(ModelConfig, values)


@pytest.mark.parametrize("values", [{"temperature": 0}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}])
def test_generation_config_refuses_values_out_of_range(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        load(GenerationConfig, values)


@pytest.mark.parametrize(
    "section",
    [
        *(ModelConfig, TrainConfig, GenerationConfig, RewardConfig),
        *(RewardClientConfig, RewardAuthConfig, RewardFailureConfig, RolloutConfig, AuthConfig, TlsConfig),
        *(EvaluationConfig, AlarmsConfig),
    ],
)
def test_every_field_is_documented(section: type[Section]) -> None:
    undocumented = [name for name in section.model_fields if not describe_field(section, name)]
    assert undocumented == []


@pytest.mark.parametrize(
    ("short", "full"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"), ("half", "float16")]
)
def test_short_names_of_precisions_are_understood(short: str, full: str) -> None:
    assert load(ModelConfig, {"path": "m", "dtype": short}).dtype == full
    assert load(RolloutConfig, {"dtype": short}).dtype == full
    assert load(ConversionOptions, {"dtype": short}).dtype == full
    with pytest.raises(ConfigError, match=r"`dtype`: .*\(got 'b16'\)"):
        load(ModelConfig, {"path": "m", "dtype": "b16"})


def test_short_names_of_precisions_are_understood_on_a_command_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, ConversionOptions)
    assert vars(parser.parse_args(["--dtype", "bf16"])) == {"dtype": "bfloat16"}
    with pytest.raises(SystemExit):
        parser.parse_args(["--dtype", "b16"])
    assert "invalid choice: 'b16'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("gold falls for 3 evaluations", StopRule("eval/gold/reward", 3)),
        ("gold  falls for 1 evaluation", StopRule("eval/gold/reward", 1)),
        ("eval/reward@beta=10 falls for 2 evaluations", StopRule("eval/reward@beta=10", 2)),
        (
            "gold falls for 3 evaluations by more than 1.5 standard errors",
            StopRule("eval/gold/reward", 3, 1.5),
        ),
    ],
)
def test_a_rule_to_stop_by_is_read(text: str, rule: StopRule) -> None:
    assert load(TrainConfig, {"stop_when": text}).stop_rule == rule
    assert load(TrainConfig, {}).stop_rule is None


@pytest.mark.parametrize(
    "text",
    [
        *("gold", "gold falls", "gold rises for 3 evaluations", "gold falls for 0 evaluations"),
        *("reward falls for 3 evaluations", "gold falls for 3 evaluations by 2 standard errors", ""),
    ],
)
def test_a_rule_to_stop_by_that_cannot_be_read_shows_how_to_write_one(text: str) -> None:
    grammar = r"`stop_when`: write `<gold\|eval/metric> falls for <k> evaluations\[ by more than <s> standard"
    with pytest.raises(ConfigError, match=grammar):
        load(TrainConfig, {"stop_when": text})


def test_a_rule_to_stop_by_that_cannot_act_is_refused() -> None:
    rule = {"stop_when": "gold falls for 3 evaluations"}
    with pytest.raises(ConfigError, match="goes by evaluations, and with `eval_every` = 0 there are none"):
        load(TrainConfig, {**rule, "eval_every": 0})
    with pytest.raises(ConfigError, match=r"stop by it with `train\.early_stopping`"):
        load(TrainConfig, {"stop_when": "eval/loss falls for 3 evaluations"})


def test_a_rule_to_stop_by_goes_through_a_command_line() -> None:
    words = ["model.path=m", "train.stop_when='gold falls for 3 evaluations by more than 2 standard errors'"]
    config = load_run_config(PPORunConfig, words, default_name="ppo")
    assert config.train.stop_rule == StopRule("eval/gold/reward", 3, 2.0)


class _Renaming(Section):
    """A section that takes another name of its key."""

    size: int = 1

    @model_validator(mode="before")
    @classmethod
    def _other_name(cls, values: Any) -> Any:
        return {"size" if name == "length" else name: value for name, value in values.items()}


class _Run(Section):
    """A run with it."""

    text: _Renaming = _Renaming()
    seed: int = 0


class _Switch(Section):
    enabled: bool = False


class _Enabled(Section):
    train: TrainConfig = TrainConfig()
    first: _Switch = _Switch()
    second: _Switch = _Switch()
    third: _Switch = _Switch()
    fourth: _Switch = _Switch()


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("rollout.batch_size", "did you mean `sft.batch_size`?"),
        ("rollout.learning_rate", "did you mean `optimizer.learning_rate`?"),
        ("grpo.learning_rate", "did you mean `optimizer.learning_rate`?"),
        (
            "data.max_new_tokens",
            "did you mean `generation.max_new_tokens` or `eval_generation.max_new_tokens`?",
        ),
        ("train.save_evry", "did you mean `train.save_every`?"),
    ],
)
def test_key_that_stands_in_another_section_is_named_in_full(key: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"unknown key `{key}`; {said}")):
        refuse_unknown_keys(run_config_of("sft"), [key])


def test_key_that_too_many_sections_have_gets_the_list_of_its_own() -> None:
    with pytest.raises(ConfigError, match=r"unknown key `train\.enabled`; valid here: seed, "):
        refuse_unknown_keys(_Enabled, ["train.enabled"])


def test_keys_of_a_section_that_reads_other_names_are_left_to_it() -> None:
    refuse_unknown_keys(_Run, ["text.length", "text.size", "seed"])
    assert load(_Run, {"text": {"length": 3}}).text.size == 3
    with pytest.raises(ConfigError, match="unknown key `sed`; did you mean `seed`"):
        refuse_unknown_keys(_Run, ["text.length", "sed"])


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("trian.seed", r"did you mean `train\.seed`\?"),
        ("trian.sed", r"did you mean `train\.seed`\?"),
        ("reward.clent.max_inflight", r"did you mean `reward\.client\.max_in_flight`\?"),
        ("xyz.seed", r"did you mean `train\.seed` or `reward\.judge\.seed`\?"),
        ("reward.xyz.seed", r"did you mean `reward\.judge\.seed` or `train\.seed`\?"),
        ("xyz.sed", "valid here: train, reward"),
        ("reward.xyz.sed", r"valid here: reward\.url, "),
    ],
)
def test_key_in_a_section_that_is_not_there_names_the_nearest_that_is(key: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key `{key}`; {remedy}"):
        refuse_unknown_keys(Outer, [key])

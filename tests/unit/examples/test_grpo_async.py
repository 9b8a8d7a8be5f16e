"""`grpo-async.py`: its settings, what they become, and how far they let sampling run ahead."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from conch.cli import describe
from conch.config import load
from conch.errors import ConfigError
from conch.trainers.async_grpo import AsyncGRPORunConfig
from examples.grpo import grpo, translation
from examples.grpo.async_settings import NOT_HERE, AsyncExampleConfig, AsyncTrainSettings
from examples.grpo.batches import Batches, Lead, plan_batches, plan_lead
from examples.grpo.devices import DevicePlan, Wish, plan_devices
from examples.grpo.grpo import CONFIGS
from examples.grpo.launch import addresses, devices_of_training, servers_of
from examples.grpo.outputs import write_hydra_files
from examples.grpo.training import Task
from examples.grpo.translation import (
    lead_lines,
    run_config,
    run_section,
    translate,
    with_names_of_here,
    without_effect,
)


def plan(num_gpus: int = 0, **asked: int) -> DevicePlan:
    """A plan of these numbers for `train`, `inference` and `ref`."""
    wishes = {f"{name}_model": Wish(number) for name, number in asked.items()}
    return plan_devices(wishes, has_reference=True, num_gpus=num_gpus, overlaps=True)


EACH = {"train": 2, "inference": 2, "ref": 2}


def settings(*words: str) -> AsyncExampleConfig:
    """The settings of a command line."""
    values: dict[str, Any] = {}
    for name, _, value in (word.partition("=") for word in words):
        *sections, key = name.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = yaml.safe_load(value)
    return load(AsyncExampleConfig, values)


def became(*words: str, where: DevicePlan | None = None, has_vllm: bool = False) -> AsyncGRPORunConfig:
    """The run that a command line asks for."""
    config = settings(*words)
    run = run_config(translate(config, where or plan(), has_vllm=has_vllm), None, run_section(config))
    assert isinstance(run, AsyncGRPORunConfig)
    return run


# ------------------------------------------------------------------------------------ what a command becomes


def test_the_defaults() -> None:
    """A batch of 16 completions, an update of four parts of four, two batches at once, the KL in rewards."""
    run = became()
    assert (run.grpo.samples_per_step, run.grpo.minibatches) == (16, 1)
    assert run.train.gradient_accumulation_steps == 4
    assert run.grpo.kl.placement == "reward"
    assert run.asynchronous.max_staleness == run.asynchronous.sync_every == 1
    assert not run.asynchronous.partial_rollouts
    assert (run.rollout.engine, run.rollout.ray.samplers, run.rollout.ray.engine) == (
        "ray",
        1,
        "transformers",
    )
    assert (run.rollout.ray.num_gpus, run.rollout.ray.num_cpus) == (0, 1)
    assert run.train.total_steps == 6250


def test_two_devices_for_each() -> None:
    """A batch grows until each training process has a whole group."""
    run = became(where=plan(**EACH))
    assert (run.grpo.prompts_per_step, run.grpo.group_size) == (2, 16)
    assert (run.train.num_processes, run.train.gradient_accumulation_steps) == (2, 4)
    assert run.rollout.ray.samplers == 2
    on_gpus = became(where=plan(6, **EACH), has_vllm=True)
    assert (on_gpus.rollout.ray.samplers, on_gpus.rollout.ray.num_gpus) == (2, 1)
    assert on_gpus.rollout.ray.engine == "vllm"
    assert on_gpus.rollout.gpu_memory_utilization == 0.9


@pytest.mark.parametrize(
    ("word", "name", "value"),
    [
        ("train.max_staleness=3", "asynchronous.max_staleness", 3),
        ("train.max_staleness=0", "asynchronous.max_staleness", 0),
        ("train.buffer_size=32", "asynchronous.max_staleness", 1),
        ("train.buffer_size=128", "asynchronous.max_staleness", 7),
        ("train.weight_update_frequency=10", "asynchronous.sync_every", 10),
        ("train.weight_update_frequency=10", "asynchronous.max_staleness", 10),
        ("train.partial_rollouts=true", "asynchronous.partial_rollouts", True),
        ("train.kl_coef_in_loss=true", "grpo.kl.placement", "loss"),
        ("train.steps_per_batch=32", "grpo.prompts_per_step", 2),
        ("train.optim_batch_size=4", "grpo.minibatches", 4),
        ("train.gradient_accumulation_steps=2", "train.gradient_accumulation_steps", 2),
        ("ray.collector_config.num_cpus=2", "rollout.ray.num_cpus", 2),
        ("inference_model.max_model_len=512", "rollout.max_model_len", 512),
        ("inference_model.torch_dtype=float16", "rollout.dtype", "float16"),
        ("inference_model.served_by=servers", "rollout.urls", "127.0.0.1:0"),
        ("train.total_dialog_turns=64", "grpo.correction.kind", "truncate"),
        ("conch.grpo.correction.level=sequence", "grpo.correction.kind", "truncate"),
        ("env.num_envs=2", "rollout.max_num_seqs", 32),
        ("conch.asynchronous.deadline_s=60", "asynchronous.deadline_s", 60),
        ("mode=async", "asynchronous.max_staleness", 1),
    ],
)
def test_settings_become_those_of_conch(word: str, name: str, value: object) -> None:
    found: Any = became(word)
    for part in name.split("."):
        found = getattr(found, part)
    assert found == value


def test_simulated_samplers_share_the_cpus_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translation.os, "sched_getaffinity", lambda _: {0, 1})
    assert became(where=plan(inference=4)).rollout.ray.num_cpus == 0.5
    assert became(where=plan(inference=2)).rollout.ray.num_cpus == 1
    assert became(where=plan(5, inference=4)).rollout.ray.num_cpus == 1
    given = became("ray.collector_config.num_cpus=1", where=plan(inference=4))
    assert given.rollout.ray.num_cpus == 1  # is refused by Ray, with the numbers


# ------------------------------------------------------------------------------------------- how far ahead


def lead(updates: int = 1, **values: int) -> Lead:
    """With batches of 16 completions in so many updates."""
    train = load(AsyncTrainSettings, {"optim_batch_size": 16 // updates, **values})
    batches = plan_batches(AsyncExampleConfig(train=train), 1)
    assert (batches.turns, batches.minibatches) == (16, updates)
    return plan_lead(train, batches)


@pytest.mark.parametrize(
    ("updates", "values", "bound", "every"),
    [
        (1, {}, 1, 1),
        (4, {}, 1, 1),
        (1, {"max_staleness": 0}, 0, 1),
        (1, {"max_staleness": 4}, 4, 1),
        (1, {"buffer_size": 1}, 0, 1),
        (1, {"buffer_size": 16}, 0, 1),
        (1, {"buffer_size": 17}, 1, 1),
        (1, {"buffer_size": 32}, 1, 1),
        (1, {"buffer_size": 32, "max_staleness": 1}, 1, 1),
        (1, {"weight_update_frequency": 2}, 2, 2),
        (1, {"weight_update_frequency": 2, "max_staleness": 1}, 1, 2),
        (4, {"weight_update_frequency": 4}, 1, 1),
        (4, {"weight_update_frequency": 5}, 2, 2),
        (4, {"weight_update_frequency": 1}, 1, 1),
        (1, {"weight_update_frequency": 3, "buffer_size": 64}, 3, 3),
        (2, {"epochs": 2, "weight_update_frequency": 8}, 2, 2),
    ],
)
def test_staleness_is_bounded_by_what_was_asked_for(
    updates: int, values: dict[str, int], bound: int, every: int
) -> None:
    made = lead(updates, **values)
    assert (made.max_staleness, made.sync_every) == (bound, every)
    assert made.buffer == 16 * (bound + 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"weight_update_frequency": 10, "max_staleness": 1},
            "with `train.weight_update_frequency` = 10, .* up to 9 steps old, but `train.max_staleness` = 1, "
            "which allows 1: take `train.weight_update_frequency=2`, or `train.max_staleness=10`",
        ),
        (
            {"weight_update_frequency": 10, "buffer_size": 32},
            "but `train.buffer_size` = 32 is 2 batches of 16, one in training, which allows 1: take "
            "`train.weight_update_frequency=2`, or `train.buffer_size=176`",
        ),
        (
            {"buffer_size": 32, "max_staleness": 4},
            "`train.buffer_size` = 32 is 2 batches of 16, .* `train.max_staleness` = 4: give one of them",
        ),
    ],
)
def test_bounds_that_contradict_are_one_sentence(values: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        lead(**values)
    assert "\n" not in str(raised.value)
    for name, offered in re.findall(r"`train\.(\w+)=(\d+)`", str(raised.value)):
        lead(**{**values, name: int(offered)})


def test_what_runs_ahead_is_told() -> None:
    shown = "\n".join(lead_lines(settings("train.weight_update_frequency=2"), plan(**EACH)))
    assert "a step        32 completions of 2 prompts, 1 optimizer step" in shown
    assert "buffer        96 completions: 3 steps, one in training" in shown
    assert "tokens are at most 2 steps old" in shown and "after every 2 steps" in shown
    waits = "\n".join(lead_lines(settings("train.max_staleness=0"), plan()))
    assert "staleness     0: each step waits for its samples, as in grpo.py" in waits


def test_a_batch_that_does_not_come_out_is_told() -> None:
    with pytest.raises(ConfigError, match=r"= 16 has 1 prompts .* 2 training processes .* take 32"):
        plan_batches(settings("train.steps_per_batch=16"), 2)
    assert plan_batches(settings("env.repeats=6"), 2) == Batches(24, 4, 4167, 1, 3, 12)


# --------------------------------------------------------------------------------------- names of elsewhere


@pytest.mark.parametrize("name", NOT_HERE)
def test_what_means_nothing_here_is_refused_with_a_reason(name: str) -> None:
    harmless, reason = NOT_HERE[name]
    with pytest.raises(
        ConfigError, match=re.escape(f"`{name}` = 'never' is no setting of this program: {reason}")
    ):
        settings(f"{name}=never")
    for value in harmless:
        assert settings(f"{name}={'null' if value is None else str(value).lower()}") == settings()


def test_either_program_names_the_other() -> None:
    with pytest.raises(ConfigError, match=r"`mode` = 'sync' is no setting .* run `grpo.py`"):
        settings("mode=sync")
    with pytest.raises(ConfigError, match=r"`mode` = 'async' is no setting .* run `grpo-async.py`"):
        load(grpo.ExampleConfig, {"mode": "async"})


def test_reasons_name_settings_that_exist() -> None:
    here, there = describe(AsyncExampleConfig), describe(AsyncGRPORunConfig)
    for _, reason in NOT_HERE.values():
        for name in re.findall(r"`([a-z_]+\.[a-z_0-9.]+)`", reason.replace("grpo.py", "")):
            listed = there if name.startswith("conch.") else here
            assert re.search(rf"(?m)^\s*{re.escape(name.removeprefix('conch.'))}\b", listed), name


def test_cpus_of_ray() -> None:
    words = ("ray.collector_config.num_cpus=3", "ray.init_config.num_cpus=5")
    with pytest.raises(ConfigError, match=r"2 samplers with 3 CPUs each .* take 6, and .* = 5: raise it"):
        became(*words, where=plan(**EACH))
    given = settings("ray.train_handler_config.num_cpus=8", "ray.init_config.num_cpus=96")
    unused = without_effect(given, plan(), has_vllm=False)
    assert [line.strip() for line in unused] == [
        "without effect: `ray.train_handler_config.num_cpus` = 8.0: training processes are no actors of Ray",
        "without effect: `ray.init_config.num_cpus` = 96.0: it is a limit, and samplers ask for less",
    ]


def test_a_cut_distribution_weighs_no_samples() -> None:
    with pytest.raises(
        ConfigError, match=r"`inference_model.top_p` = 0.9 .*`conch.grpo.correction.kind=none`"
    ):
        became("inference_model.top_p=0.9")
    assert became("inference_model.top_p=0.9", "conch.grpo.correction.kind=none").generation.top_p == 0.9


@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.parametrize(
    ("word", "keys"),
    [
        ("conch.grpo=3", "`conch.grpo.loss`"),
        ("conch.grpo=null", "`conch.grpo.loss`"),
        ("conch.grpo=[]", "`conch.grpo.loss`"),
        ("conch.grpo.correction=3", "`conch.grpo.correction.kind`"),
        ("conch.asynchronous=fast", "`conch.asynchronous.deadline_s`"),
        ("conch.rollout.ray=4", "`conch.rollout.ray.samplers`"),
        ("conch.train=1", "`conch.train.total_steps`"),
    ],
)
def test_a_section_that_is_given_a_value_is_told_with_its_keys(word: str, keys: str, top_p: float) -> None:
    name = word.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^`{name}` = .* is a section, no value: its keys are .*{keys}"):
        became(word, f"inference_model.top_p={top_p}")


def test_an_empty_section_sets_nothing() -> None:
    words = ("conch.grpo={}", "conch.grpo.correction={}", "conch.train={}")
    for word in words:
        assert became(word) == became()


def test_an_actor_takes_one_device() -> None:
    with pytest.raises(ConfigError, match=r"set `inference_model.served_by=servers`"):
        became("inference_model.tensor_parallel_size=2", where=plan(8, inference=4), has_vllm=True)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("raise `asynchronous.max_staleness`", "raise `train.max_staleness`"),
        ("`asynchronous.sync_every` = 3", "`train.weight_update_frequency` = 3"),
        ("lower `rollout.ray.num_cpus`", "lower `conch.rollout.ray.num_cpus`"),
        ("within `asynchronous.deadline_s` = 3", "within `conch.asynchronous.deadline_s` = 3"),
        ("set `train.resume` or `grpo.group_size`", "set `train.resume` or `env.repeats`"),
        (
            "is of a GRPORunConfig, this run is a AsyncGRPORunConfig",
            "is of `grpo.py`, this run is `grpo-async.py`",
        ),
    ],
)
def test_messages_name_settings_as_they_are_named_here(text: str, told: str) -> None:
    assert with_names_of_here(text, AsyncExampleConfig) == told


def test_a_setting_of_conch_with_a_name_here_is_set_by_that() -> None:
    told = r"`conch.asynchronous.max_staleness` has a name here: set train.max_staleness"
    for more in ((), ("train.max_staleness=2",)):
        with pytest.raises(ConfigError, match=told):
            became("conch.asynchronous.max_staleness=3", *more)


# --------------------------------------------------------------------------------- processes, files, command


def test_ray_samples_behind_the_devices_that_train() -> None:
    """Training processes take their devices by rank, the cluster that they start those that are left."""
    where = plan(6, **EACH)
    config = settings()
    run = run_config(translate(config, where, has_vllm=True), None, run_section(config))
    assert [server.name for server in servers_of(config, run, where, has_vllm=True)] == [
        "reference-0",
        "reference-1",
    ]
    assert devices_of_training(config, where) == (0, 1, 2, 3)


def test_servers_sample_as_for_grpo() -> None:
    where, config = plan(6, **EACH), settings("inference_model.served_by=servers")
    became = translate(config, where, has_vllm=True)
    run = run_config(became, None, run_section(config))
    assert run.rollout.urls == "127.0.0.1:0,127.0.0.1:0"
    servers = servers_of(config, run, where, has_vllm=True)
    assert [server.devices for server in servers] == [(2,), (3,), (4,), (5,)]
    final = run_config(became, addresses(servers), run_section(config))
    assert final.rollout.urls == f"{servers[0].url},{servers[1].url}"
    assert devices_of_training(config, where) == (0, 1)


def test_a_task_is_read_as_it_was_written(tmp_path: Path) -> None:
    task = Task(settings("train.max_staleness=2"), became("train.max_staleness=2"), ["a=b"], "grpo_gsm8k")
    task.write(tmp_path / "task.json")
    assert Task.read(tmp_path / "task.json") == task


def test_files_of_the_run_name_the_program(tmp_path: Path) -> None:
    write_hydra_files(tmp_path, settings(), ["train.seed=1"], "grpo_gsm8k")
    about = yaml.safe_load((tmp_path / ".hydra/hydra.yaml").read_text())
    assert about["hydra"]["job"]["name"] == "grpo-async"
    written = yaml.safe_load((tmp_path / ".hydra/config.yaml").read_text())
    assert load(AsyncExampleConfig, written) == settings()


def test_print_config_shows_what_becomes_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    program = runpy.run_path(str(CONFIGS.parent / "grpo-async.py"))
    with pytest.raises(SystemExit) as left:
        program["main"](
            ["--print-config", "--config-name", "grpo_ifeval", "mode=async", "train.max_staleness=2"]
        )
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown)["env"]["dataset"] == "ifeval"
    assert re.search(r"^# asynchronous.max_staleness = 2 +<- train.max_staleness$", shown, re.M)
    assert "#   sampling      simulated device 1" in shown
    assert "#   staleness     tokens are at most 2 steps old" in shown

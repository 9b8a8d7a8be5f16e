"""Configurations of trlX, in the forms that its files have had, become ours."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from conch.cli import load_run_config
from conch.config import load
from conch.errors import ConfigError
from conch.interop.trlx import main, translate
from conch.trainers.ilql import ILQLRunConfig
from conch.trainers.ppo import PPORunConfig
from conch.trainers.rft import RFTRunConfig
from conch.trainers.sft import SFTRunConfig
from tests.forks import quick_python

SECTIONS = {"ppo": PPORunConfig, "ilql": ILQLRunConfig, "sft": SFTRunConfig, "rft": RFTRunConfig}


def newer(trainer: str, method: dict[str, Any], **train: Any) -> dict[str, Any]:
    """A `TRLConfig` whose optimizer, schedule and tokenizer have sections of their own."""
    return {
        "train": {
            "seq_length": 1024,
            "epochs": 100,
            "total_steps": 10000,
            "batch_size": 32,
            "checkpoint_interval": 10000,
            "eval_interval": 100,
            "pipeline": "PromptPipeline",
            "trainer": trainer,
            **train,
        },
        "model": {"model_path": "gpt2", "num_layers_unfrozen": 2},
        "tokenizer": {"tokenizer_path": "gpt2", "truncation_side": "right"},
        "optimizer": {
            "name": "adamw",
            "kwargs": {"lr": 3e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 1e-6},
        },
        "scheduler": {"name": "cosine_annealing", "kwargs": {"T_max": 1e12, "eta_min": 3e-5}},
        "method": method,
    }


PPO_METHOD = {
    "name": "PPOConfig",
    "num_rollouts": 128,
    "chunk_size": 128,
    "ppo_epochs": 4,
    "init_kl_coef": 0.001,
    "target": None,
    "horizon": 10000,
    "gamma": 1,
    "lam": 0.95,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 1,
    "scale_reward": "ignored",
    "ref_mean": None,
    "ref_std": None,
    "cliprange_reward": 10,
    "gen_kwargs": {"max_new_tokens": 40, "top_k": 0, "top_p": 1.0, "do_sample": True},
}
ILQL_METHOD = {
    "name": "ilqlconfig",
    "tau": 0.7,
    "gamma": 0.99,
    "cql_scale": 0.1,
    "awac_scale": 1,
    "alpha": 0.001,
    "beta": 0,
    "steps_for_target_q_sync": 5,
    "two_qs": True,
    "gen_kwargs": {"max_new_tokens": 56, "top_k": 20, "beta": [1, 4], "temperature": 1.0},
}
OLDER_TRAIN = {
    "seq_length": 48,
    "epochs": 100,
    "total_steps": 10000,
    "batch_size": 64,
    "opt_betas": [0.9, 0.95],
    "weight_decay": 1e-6,
    "checkpoint_interval": 10000,
    "eval_interval": 100,
}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo": ("ppo", newer("AcceleratePPOTrainer", PPO_METHOD)),
    "ppo of hh": (
        "ppo",
        newer(
            "AcceleratePPOTrainer",
            {**PPO_METHOD, "scale_reward": "running", "target": 6, "num_rollouts": 64, "chunk_size": 16},
            batch_size=4,
            checkpoint_dir="checkpoints/ppo_hh",
        ),
    ),
    "ppo, older": (
        "ppo",
        {
            "model": {
                "model_path": "gpt2",
                "tokenizer_path": "gpt2",
                "model_type": "AcceleratePPOModel",
                "num_layers_unfrozen": 2,
            },
            "train": {
                **OLDER_TRAIN,
                "lr_init": 1.4e-4,
                "lr_target": 1.4e-4,
                "opt_eps": 1e-8,
                "pipeline": "PPOPipeline",
                "orchestrator": "PPOOrchestrator",
            },
            "method": {
                **{
                    name: value
                    for name, value in PPO_METHOD.items()
                    if name not in ("scale_reward", "ref_mean", "ref_std", "cliprange_reward")
                },
                "name": "ppoconfig",
                "target": 6,
                "gen_kwargs": {
                    "max_length": 48,
                    "min_length": 48,
                    "top_k": 0.0,
                    "top_p": 1.0,
                    "do_sample": True,
                },
            },
        },
    ),
    "ilql": ("ilql", newer("AccelerateILQLTrainer", ILQL_METHOD, seq_length=64)),
    "ilql, older": (
        "ilql",
        {
            "model": {
                "model_path": "gpt2",
                "tokenizer_path": "gpt2",
                "model_type": "ILQLModel",
                "num_layers_unfrozen": -1,
            },
            "train": {
                **OLDER_TRAIN,
                "lr_ramp_steps": 100,
                "lr_decay_steps": 3366,
                "learning_rate_init": 1e-4,
                "learning_rate_target": 1e-5,
                "pipeline": "OfflinePipeline",
                "orchestrator": "OfflineOrchestrator",
                "seed": 1000,
            },
            "method": {
                **{name: value for name, value in ILQL_METHOD.items() if name not in ("beta", "gen_kwargs")},
                "betas": [8],
            },
        },
    ),
    "sft": (
        "sft",
        newer(
            "AccelerateSFTTrainer",
            {"name": "sftconfig", "gen_kwargs": {"max_new_tokens": 40, "top_k": 0, "do_sample": True}},
            tracker="wandb",
            minibatch_size=8,
        ),
    ),
    "sft, with the method of PPO": ("sft", newer("AccelerateSFTTrainer", PPO_METHOD)),
    "rft": (
        "rft",
        newer(
            "AccelerateRFTTrainer",
            {
                "name": "rftconfig",
                "start_percentile": 0.7,
                "end_percentile": 0.95,
                "n_improve_steps": 4,
                "n_generations_per_prompt": 32,
                "gen_kwargs": {"max_new_tokens": 40, "top_p": 1.0, "temperature": 1.0},
            },
        ),
    ),
}


def keys_of(config: dict[str, Any]) -> set[str]:
    found: set[str] = set()
    for section, values in config.items():
        for name, value in values.items():
            inner = value if name in ("kwargs", "gen_kwargs") else None
            found |= {f"{section}.{name}.{each}" for each in inner} if inner else {f"{section}.{name}"}
    return found


@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_trlx_becomes_a_valid_configuration_with_a_line_for_each_key(form: str) -> None:
    algorithm, config = FORMS[form]

    translation = translate(config)

    assert translation.algorithm == algorithm
    load(SECTIONS[algorithm], translation.values)
    assert {line.key for line in translation.lines} == keys_of(config)
    assert len(translation.lines) == len(keys_of(config))
    assert all(line.keys or line.text for line in translation.lines)


def ppo(method: dict[str, Any] | None = None, **train: Any) -> PPORunConfig:
    config = newer("AcceleratePPOTrainer", {**PPO_METHOD, **(method or {})}, **train)
    return load(PPORunConfig, translate(config).values)


def test_ppo_counts_rollouts_where_trlx_counts_updates() -> None:
    run = ppo(total_steps=160, eval_interval=32, checkpoint_interval=80)

    # 128 rollouts in batches of 32, four times: 16 updates a step.
    assert (run.ppo.rollouts_per_step, run.ppo.minibatches, run.ppo.epochs) == (128, 4, 4)
    assert (run.train.total_steps, run.train.eval_every, run.train.save_every) == (10, 2, 5)
    assert ppo(total_steps=160, epochs=3).train.total_steps == 3


def test_ppo_keeps_what_the_equations_need() -> None:
    run = ppo({"target": 6, "scale_reward": "ref", "ref_std": 2.5, "vf_coef": 2.3, "init_kl_coef": 0.2})

    assert (run.ppo.kl.coef, run.ppo.kl.target, run.ppo.kl.horizon, run.ppo.value_coef) == (
        0.2,
        6,
        10000,
        2.3,
    )
    assert (run.shaping.scaling, run.shaping.reference_std, run.shaping.clip) == ("reference", 2.5, 10)
    assert (run.tokenizer.max_prompt_tokens, run.tokenizer.truncate_prompts) == (1024 - 40, True)
    assert run.scheduler.name == "constant" and run.optimizer.weight_decay == 1e-6


def test_sampling_of_training_and_of_evaluation_are_told_apart() -> None:
    both = {
        "gen_kwargs": {"max_new_tokens": 40, "temperature": 0.5},
        "gen_experience_kwargs": {"max_new_tokens": 40, "temperature": 1.0},
    }
    run = ppo(both)
    assert (run.generation.temperature, run.eval_generation.temperature) == (1.0, 0.5)

    swept = load(ILQLRunConfig, translate(FORMS["ilql"][1]).values)
    assert swept.eval_generation.beta == [1, 4] and swept.ilql.num_q_heads == 2


def test_adapters_of_peft_and_of_opendelta_become_lora() -> None:
    config = newer("AcceleratePPOTrainer", PPO_METHOD)
    config["model"] = {
        "model_path": "gpt2",
        "delta_kwargs": {"delta_type": "lora", "lora_r": 8, "lora_alpha": 16, "modified_modules": ["c_attn"]},
    }
    lora = {"r": 8, "lora_alpha": 16, "target_modules": ["c_attn"]}
    assert load(PPORunConfig, translate(config).values).model.peft_config == lora

    config["model"] = {"model_path": "gpt2", "peft_config": {"peft_type": "LORA", "r": 4}}
    assert load(PPORunConfig, translate(config).values).model.peft_config == {"r": 4}


@pytest.mark.parametrize(
    ("section", "name", "value", "words"),
    [
        ("train", "batchsize", 3, "no key `train.batchsize`; did you mean `train.batch_size`"),
        ("method", "cliprang", 3, "did you mean `method.cliprange`"),
        ("optimizer", "name", "lion", "AdamW is the only optimizer"),
        ("scheduler", "name", "exponential", "constant, linear and cosine"),
        ("model", "num_layers_unfrozen", 0, "heads alone"),
        ("model", "peft_config", {"peft_type": "PREFIX_TUNING"}, "take LORA"),
        ("model", "delta_kwargs", {"delta_type": "bitfit"}, "take lora"),
        ("train", "trainer", "NeMoILQLTrainer", "NeMo"),
        ("train", "trainer_kwargs", {"a": 1}, "no counterpart"),
        ("train", "tracker", "comet", "wandb and tensorboard"),
        ("train", "batch_size", 0, "at least 1"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(section: str, name: str, value: Any, words: str) -> None:
    config = newer("AcceleratePPOTrainer", PPO_METHOD)
    config[section] = {**config[section], name: value}

    with pytest.raises(ConfigError) as refusal:
        translate(config)
    assert words in str(refusal.value)


@pytest.mark.parametrize("config", [{}, {"ppo": {"gamma": 1}}, {"model": {}, "train": {}}])
def test_what_is_no_configuration_of_trlx_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="`model`, `train` and `method`"):
        translate(config)


def test_a_section_that_trlx_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="no section `reward`"):
        translate({**newer("AcceleratePPOTrainer", PPO_METHOD), "reward": {}})


def test_file_becomes_a_file_that_the_command_line_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = yaml.safe_dump(FORMS["ppo"][1]).replace("1.0e-06", "1e-6")
    assert "weight_decay: 1e-6" in theirs, "which YAML reads as a text"
    (tmp_path / "trlx.yml").write_text(theirs)
    done = subprocess.run(
        [quick_python(), "-m", "conch.interop.trlx", str(tmp_path / "trlx.yml")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "# method.init_kl_coef: renamed to ppo.kl.coef" in done.stdout
    (tmp_path / "conch.yaml").write_text(done.stdout)

    words = ["--config-dir", str(tmp_path), "--config-name", "conch", "train.seed=3"]
    run = load_run_config(PPORunConfig, words, default_name="ppo")

    assert (run.train.seed, run.ppo.kl.coef, run.optimizer.weight_decay) == (3, 0.001, 1e-6)


def test_what_conch_does_not_take_together_is_told_beside_the_file(tmp_path: Path) -> None:
    method = {**PPO_METHOD, "target": 6.0, "gen_kwargs": {"max_new_tokens": 40, "top_k": 50}}
    (tmp_path / "trlx.yml").write_text(yaml.safe_dump(newer("AcceleratePPOTrainer", method)))
    done = subprocess.run(
        [quick_python(), "-m", "conch.interop.trlx", str(tmp_path / "trlx.yml")],
        capture_output=True,
        text=True,
    )
    said = "`generation.top_k` or `top_p` do not measure: leave one of them out"
    comments = " ".join(line for line in done.stdout.splitlines() if line.startswith("#"))
    assert done.returncode == 0
    assert said in done.stderr and said in comments
    assert yaml.safe_load(done.stdout)["ppo"]["kl"]["target"] == 6.0


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "a text"])
def test_a_file_that_holds_no_sections_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "trlx.yml").write_text(text)
    with pytest.raises(ConfigError, match=r"trlx\.yml"):
        main([str(tmp_path / "trlx.yml")])
    with pytest.raises(ConfigError, match="no such file; did you mean"):
        main([str(tmp_path / "trlx.yaml")])

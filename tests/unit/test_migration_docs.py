"""The pages for users of other libraries name settings of ours that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from conch.cli import describe, load_run_config
from conch.config import Section
from conch.errors import ConfigError
from conch.interop.trlx_keys import TRANSLATED
from conch.trainers.async_grpo import AsyncGRPORunConfig
from conch.trainers.grpo import GRPORunConfig
from conch.trainers.ilql import ILQLRunConfig
from conch.trainers.ppo import PPORunConfig
from conch.trainers.reward_model import RewardModelRunConfig
from conch.trainers.rft import RFTRunConfig
from conch.trainers.sft import SFTRunConfig

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ("from_trl", "from_openrlhf", "from_trlx")
RUNS: tuple[type[Section], ...] = (
    *(PPORunConfig, AsyncGRPORunConfig, RFTRunConfig, ILQLRunConfig, SFTRunConfig, RewardModelRunConfig),
)
KEYS = {key for run in RUNS for key in re.findall(r"^  ([\w.]+): ", describe(run), re.MULTILINE)}


def rows(name: str) -> list[tuple[str, str]]:
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    return re.findall(r"^\| (.+?) \| (.+?) \|$", page, re.MULTILINE)


@pytest.mark.parametrize("name", PAGES)
def test_every_setting_of_ours_exists(name: str) -> None:
    named = [part.partition("=")[0] for _, ours in rows(name) for part in re.findall(r"`([^`]+)`", ours)]
    settings = {part for part in named if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", part)} - {"conch.train"}
    assert len(settings) >= 30
    assert settings - KEYS == set()


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("rollout.n_samples_per_prompt", "grpo.group_size"),
        ("algo.kl.init_coef", "grpo.kl.coef"),
        ("actor.adam.lr", "optimizer.learning_rate"),
        ("critic.value_clip", "ppo.clip_value"),
        ("micro_train_batch_size", "train.gradient_accumulation_steps"),
        ("pretrain", "model.path"),
        ("train.num_train_epochs", "train.total_steps"),
        ("optimizer.warmup_ratio", "scheduler.warmup_updates"),
        ("train.logging_steps", "tracking.wandb"),
    ],
)
def test_key_by_a_name_of_others_is_answered_with_ours(key: str, ours: str) -> None:
    section = PPORunConfig if ours.startswith("ppo.") else GRPORunConfig
    with pytest.raises(ConfigError, match=f"unknown key `{key}`; did you mean `{ours}`"):
        load_run_config(section, ["model.path=m", f"{key}=1"], default_name="grpo")


def test_the_page_about_trlx_has_what_the_translator_does() -> None:
    theirs = {key for left, _ in rows("from_trlx") for key in re.findall(r"`((?:\w+\.)+\w+)`", left)}
    assert {key for key in theirs if not key.startswith("trlx.")} <= TRANSLATED


def test_the_command_in_place_of_openrlhfs_is_valid() -> None:
    page = (DOCS / "from_openrlhf.md").read_text(encoding="utf-8")
    block = re.search(r"# Conch\n(conch train grpo .*?)```", page, re.DOTALL)
    assert block is not None
    words = shlex.split(block[1].replace("\\\n", " "))[3:]
    run = load_run_config(GRPORunConfig, words, default_name="grpo")
    assert (run.grpo.prompts_per_step, run.grpo.group_size) == (2, 4)

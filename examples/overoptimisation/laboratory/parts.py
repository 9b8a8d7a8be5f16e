"""The parts of a laboratory: places, and what is trained, sampled and scored for a seed."""

from __future__ import annotations

import json
import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conch.atomic_files import replace_text
from conch.cli import compose
from conch.config import load
from conch.runs.reading import steps_of
from conch.trainers.ppo import PPORunConfig, PPOTrainer
from conch.trainers.reward_model import RewardModelRunConfig, RewardModelTrainer
from conch.trainers.sft import SFTRunConfig, SFTTrainer
from examples.overoptimisation.laboratory.hidden_preference import (
    demonstrations,
    gold,
    labelled_pairs,
    letter_tokenizer,
    prompts,
)
from examples.overoptimisation.laboratory.proxies import Proxy, sampled_texts
from examples.overoptimisation.laboratory.settings import ROOT, LaboratoryConfig

GOLD = f"{ROOT}/examples/overoptimisation/laboratory/hidden_preference.py:gold"
SINGLE = "single"
ENSEMBLES = ("mean", "wco", "uwo")
"""Objectives over all members that a policy is trained on, beside single members."""

_DRAWS = 4
_DEMONSTRATIONS, _PAIRS, _BEST_OF_N, _START = range(_DRAWS)
"""Keep apart the seeds of a laboratory's draws."""


@dataclass(frozen=True)
class Places:
    """Where a seed's parts lie."""

    folder: Path

    @property
    def start(self) -> Path:
        """Run of the starting policy."""
        return self.folder / "start"

    def member(self, number: int) -> Path:
        """Run of a reward model."""
        return self.folder / f"reward_model_{number}"

    def policy(self, reward: str) -> Path:
        """Run of PPO."""
        return self.folder / f"ppo_{reward}"

    @property
    def texts(self) -> Path:
        """Texts of the starting policy that scores are normalised on."""
        return self.folder / "start_texts.json"

    def pairs(self, member: int) -> Path:
        """The labelled pairs that a reward model learns from."""
        return self.folder / f"pairs_{member}.jsonl"

    @property
    def best_of_n(self) -> Path:
        """Scores of the starting policy's samples."""
        return self.folder / "best_of_n.npz"


def places(config: LaboratoryConfig, seed: int) -> Places:
    """A seed's folder, made."""
    folder = config.output / f"seed_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    return Places(folder)


# ------------------------------------------------------------------------------------------------------ parts


def train_start(config: LaboratoryConfig, seed: int) -> None:
    """Imitate the demonstrations; then draw the texts that scores are normalised on, and the pairs."""
    at, rng = places(config, seed), np.random.default_rng((_DEMONSTRATIONS, seed))
    values = trainer_values("sft", at.start, seed)
    if not is_finished(at.start, values):
        texts = demonstrations(config.num_demonstrations, rng)
        run_config = load(SFTRunConfig, values)
        with closing(SFTTrainer(run_config, samples=texts, tokenizer=letter_tokenizer())) as trainer:
            trainer.fit()
    policy, openings = last_checkpoint(at.start), len(prompts())
    if not at.texts.is_file():
        drawn = sampled_texts(policy, -(-config.num_start_texts // openings), seed=_DRAWS * seed + _START)
        replace_text(at.texts, json.dumps(drawn))
    for member in range(config.num_members):
        if at.pairs(member).is_file():
            continue
        key = config.num_members * seed + member
        drawn = sampled_texts(policy, -(-2 * config.num_pairs // openings), seed=_PAIRS + _DRAWS * (key + 1))
        rng = np.random.default_rng((_PAIRS, seed, member))
        rng.shuffle(drawn)
        rows = labelled_pairs(drawn, config.label_noise, rng)[: config.num_pairs]
        replace_text(at.pairs(member), "".join(json.dumps(row) + "\n" for row in rows))


def train_members(config: LaboratoryConfig, seed: int) -> None:
    """Train the reward models, each from weights of its own on pairs of its own."""
    at = places(config, seed)
    texts = json.loads(at.texts.read_text())
    for number in range(config.num_members):
        values = trainer_values("reward_model", at.member(number), seed)
        values["reward_model"] |= {"rng_seed": config.num_members * seed + number, "eval_fraction": 0.0}
        if is_finished(at.member(number), values):
            continue
        pairs = [json.loads(line) for line in at.pairs(number).read_text().splitlines()]
        run_config = load(RewardModelRunConfig, values)
        with closing(
            RewardModelTrainer(run_config, samples=pairs, reference=texts, tokenizer=letter_tokenizer())
        ) as trainer:
            trainer.fit()


def rewards_of(config: LaboratoryConfig) -> dict[str, list[str]]:
    """Rewards that are compared, each with what PPO is run on: `single` on members 0, 1, ..., one at a
    time."""
    singles = [f"{SINGLE}_{number}" for number in range(min(config.num_single, config.num_members))]
    return {SINGLE: singles, **{objective: [objective] for objective in ENSEMBLES}}


def train_policy(config: LaboratoryConfig, seed: int, reward_name: str) -> None:
    """PPO on one of the rewards, with gold watching.

    reward_name: an objective, or `single_0` for the first member.
    """
    at = places(config, seed)
    values = trainer_values("ppo", at.policy(reward_name), seed)
    values["model"] = {"path": str(last_checkpoint(at.start))}
    values["evaluation"] = {"gold": GOLD}
    for key, value in {"total_steps": config.ppo_steps, "eval_repeats": config.eval_repeats}.items():
        if value is not None:
            values["train"][key] = value
    if is_finished(at.policy(reward_name), values):
        return
    proxies = members(at, config.num_members)
    if reward_name in ENSEMBLES:
        reward: Any = {f"member_{number}": proxy.scores for number, proxy in enumerate(proxies)}
        values["reward"]["combine"] = reward_name
    else:
        reward = proxies[int(reward_name.removeprefix(f"{SINGLE}_"))].scores
    run_config = load(PPORunConfig, values)
    with closing(PPOTrainer(run_config, reward=reward, prompts=prompts())) as trainer:
        trainer.fit()


def score_best_of_n(config: LaboratoryConfig, seed: int) -> None:
    """Sample each prompt `best_of` times from the starting policy, and keep all scores: [prompts, samples],
    of the members with an axis of their own in front."""
    at = places(config, seed)
    if at.best_of_n.is_file():
        return
    texts = sampled_texts(last_checkpoint(at.start), config.best_of, seed=_DRAWS * seed + _BEST_OF_N)
    shape = (len(prompts()), config.best_of)
    scores = np.array([proxy.scores(texts) for proxy in members(at, config.num_members)])
    partial = at.best_of_n.with_name(".partial.npz")
    np.savez(partial, members=scores.reshape(-1, *shape), gold=np.reshape(gold(texts), shape))
    os.replace(partial, at.best_of_n)


def members(at: Places, number: int) -> list[Proxy]:
    """A seed's reward models."""
    return [Proxy(last_checkpoint(at.member(each))) for each in range(number)]


def trainer_values(trainer: str, run_dir: Path, seed: int) -> dict[str, Any]:
    """`configs/laboratory/<trainer>.yaml` for a run that goes on where it was interrupted."""
    values = compose(f"laboratory/{trainer}", [], ROOT / "configs")
    values["train"] |= {"seed": seed, "run_dir": str(run_dir), "resume": "auto"}
    return values


def is_finished(run_dir: Path, values: dict[str, Any]) -> bool:
    """Whether a run has its last checkpoint."""
    return values["train"]["total_steps"] in steps_of(run_dir)


def last_checkpoint(run_dir: Path) -> Path:
    """The checkpoint that the end of a run saved."""
    return next(iter(steps_of(run_dir).values()))

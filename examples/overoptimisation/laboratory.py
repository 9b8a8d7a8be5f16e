"""Overoptimisation on a CPU, in one command: from the checkout,

    python -m examples.overoptimisation.laboratory
    python -m examples.overoptimisation.laboratory seed=1 output=outputs/lab

A hidden preference (gold) over short texts labels 1,000 pairs of texts of the starting policy, a quarter of
the labels wrong. Five reward models (proxies) learn from these; PPO without a KL penalty trains the policy on
one of them, and on the mean, the worst case (WCO) and the uncertainty-weighted mean (UWO) of all five. Gold
watches. Best-of-n of the starting policy, chosen by the same rewards, stands beside. The numbers come with a
figure, a CSV and `summary.json`; docs/overoptimisation.md explains them.

Every finished part stays in `output`, and training goes on from its last checkpoint: after an interruption
the same command does what is left.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator

from conch.atomic_files import replace_text
from conch.cli import compose, load_run_config, run_main
from conch.config import Section, load
from conch.log import get_logger, setup_logging
from conch.runs.checkpoint import steps_of
from conch.trainers.ppo import PPORunConfig, PPOTrainer
from conch.trainers.reward_model import RewardModelRunConfig, RewardModelTrainer
from conch.trainers.sft import SFTRunConfig, SFTTrainer
from examples.overoptimisation.hidden_preference import (
    demonstrations,
    gold,
    labelled_pairs,
    letter_tokenizer,
    prompts,
)
from examples.overoptimisation.laboratory_results import report
from examples.overoptimisation.proxies import Proxy, sampled_texts

_log = get_logger("conch.laboratory")

ROOT = Path(__file__).resolve().parents[2]
GOLD = f"{ROOT}/examples/overoptimisation/hidden_preference.py:gold"
ARMS = ("single", "mean", "wco", "uwo")
"""Rewards that a policy is trained on: the first member, or an objective over all of them."""

_DEMONSTRATIONS, _PAIRS, _BEST_OF_N, _START = range(4)
"""Keep apart the seeds of a laboratory's draws."""


class LaboratoryConfig(Section):
    """The laboratory's own settings; those of its trainers stand in `configs/laboratory/`."""

    seed: tuple[int, ...] = (0, 1, 2)
    """Seeds of whole chains: data, starting policy, members and policies; `seed=1` or `seed=[0,1,2]`."""

    output: Path = ROOT / "outputs/laboratory"
    """Where everything goes, one folder a seed."""

    workers: int = Field(default=2, ge=1)
    """Processes that work at once, each on one core."""

    num_demonstrations: int = Field(default=3000, ge=128)
    """Texts that the starting policy imitates."""

    num_pairs: int = Field(default=1000, ge=64)
    """Labelled pairs that every member learns from."""

    label_noise: float = Field(default=0.25, ge=0, lt=0.5)
    """Share of the pairs' labels that are wrong."""

    num_members: int = Field(default=5, ge=2)
    """Reward models of the ensemble."""

    best_of: int = Field(default=4096, ge=2)
    """Samples of each prompt for best-of-n, and the largest n."""

    num_start_texts: int = Field(default=4000, ge=100)
    """Texts of the starting policy that gold and proxies are normalised on."""

    ppo_steps: int | None = Field(default=None, ge=1)
    """Steps of PPO; None takes those of `configs/laboratory/ppo.yaml`."""

    eval_repeats: int | None = Field(default=None, ge=1)
    """Completions of each of the eight prompts in an evaluation of PPO; None takes those of the same file."""

    @field_validator("seed", mode="before")
    @classmethod
    def _one_or_several(cls, seed: Any) -> Any:
        return (seed,) if isinstance(seed, int) else seed


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

    def policy(self, arm: str) -> Path:
        """Run of PPO."""
        return self.folder / f"ppo_{arm}"

    @property
    def texts(self) -> Path:
        """Texts of the starting policy that scores are normalised on."""
        return self.folder / "start_texts.json"

    @property
    def pairs(self) -> Path:
        """The labelled pairs."""
        return self.folder / "pairs.jsonl"

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
        drawn = sampled_texts(policy, -(-config.num_start_texts // openings), seed=10 * seed + _START)
        replace_text(at.texts, json.dumps(drawn))
    if not at.pairs.is_file():
        rng = np.random.default_rng((_PAIRS, seed))
        drawn = sampled_texts(policy, -(-2 * config.num_pairs // openings), seed=10 * seed + _PAIRS)
        rng.shuffle(drawn)
        rows = labelled_pairs(drawn, config.label_noise, rng)[: config.num_pairs]
        replace_text(at.pairs, "".join(json.dumps(row) + "\n" for row in rows))


def train_members(config: LaboratoryConfig, seed: int) -> None:
    """Train the reward models; they differ by the weights they start from and by the order of the pairs."""
    at = places(config, seed)
    pairs = [json.loads(line) for line in at.pairs.read_text().splitlines()]
    texts = json.loads(at.texts.read_text())
    for number in range(config.num_members):
        values = trainer_values("reward_model", at.member(number), seed)
        values["reward_model"] |= {"rng_seed": config.num_members * seed + number, "eval_fraction": 0.0}
        if is_finished(at.member(number), values):
            continue
        run_config = load(RewardModelRunConfig, values)
        with closing(
            RewardModelTrainer(run_config, samples=pairs, reference=texts, tokenizer=letter_tokenizer())
        ) as trainer:
            trainer.fit()


def train_policy(config: LaboratoryConfig, seed: int, arm: str) -> None:
    """PPO on one of the rewards, with gold watching."""
    at = places(config, seed)
    values = trainer_values("ppo", at.policy(arm), seed)
    values["model"] = {"path": str(last_checkpoint(at.start))}
    values["evaluation"] = {"gold": GOLD}
    for key, value in {"total_steps": config.ppo_steps, "eval_repeats": config.eval_repeats}.items():
        if value is not None:
            values["train"][key] = value
    if is_finished(at.policy(arm), values):
        return
    proxies = members(at, config.num_members)
    if arm == "single":
        reward: Any = proxies[0].scores
    else:
        reward = {f"member_{number}": proxy.scores for number, proxy in enumerate(proxies)}
        values["reward"]["combine"] = arm
    run_config = load(PPORunConfig, values)
    with closing(PPOTrainer(run_config, reward=reward, prompts=prompts())) as trainer:
        trainer.fit()


def score_best_of_n(config: LaboratoryConfig, seed: int) -> None:
    """Sample each prompt `best_of` times from the starting policy, and keep all scores: [prompts, samples],
    of the members with an axis of their own in front."""
    at = places(config, seed)
    if at.best_of_n.is_file():
        return
    texts = sampled_texts(last_checkpoint(at.start), config.best_of, seed=10 * seed + _BEST_OF_N)
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


# -------------------------------------------------------------------------------------------------- the whole


@dataclass(frozen=True)
class Part:
    """Something to do for a seed. name: of its log file. do: with its arguments behind the config."""

    name: str
    do: Callable[..., None]
    arguments: tuple[Any, ...]


def first_parts(seed: int) -> list[Part]:
    """What the other parts of a seed build on, in order."""
    return [Part("start", train_start, (seed,)), Part("members", train_members, (seed,))]


def last_parts(seed: int) -> list[Part]:
    """What can be done at once when the first parts of a seed are there."""
    policies = [Part(f"ppo_{arm}", train_policy, (seed, arm)) for arm in ARMS]
    return [*policies, Part("best_of_n", score_best_of_n, (seed,))]


def run(config: LaboratoryConfig) -> dict[str, Any]:
    """All parts of all seeds, and the report; returns what `summary.json` holds."""
    started, done = time.perf_counter(), 0
    total = sum(len(first_parts(seed)) + len(last_parts(seed)) for seed in config.seed)
    with ProcessPoolExecutor(
        config.workers, mp_context=get_context("spawn"), initializer=_begin_worker
    ) as pool:
        under_way: dict[Future[float], tuple[int, Part, list[Part]]] = {}

        def submit(seed: int, part: Part, then: list[Part]) -> None:
            under_way[pool.submit(_perform, config, seed, part)] = (seed, part, then)

        for seed in config.seed:
            first, *then = first_parts(seed)
            submit(seed, first, then)
        while under_way:
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                seed, part, then = under_way.pop(future)
                seconds, done = future.result(), done + 1
                _log.info("[%d/%d] seed %d: %s in %.0f s", done, total, seed, part.name, seconds)
                if then:
                    submit(seed, then[0], then[1:])
                elif part.do is train_members:
                    for each in last_parts(seed):
                        submit(seed, each, [])
    at = {seed: places(config, seed) for seed in config.seed}
    return report(
        {seed: {arm: of.policy(arm) for arm in ARMS} for seed, of in at.items()},
        {seed: of.best_of_n for seed, of in at.items()},
        trainer_values("ppo", config.output, 0)["reward"]["uwo_weight"],
        config.output,
        seconds=round(time.perf_counter() - started, 1),
    )


def _begin_worker() -> None:
    """Make a worker one that computes on one core, and that ends with the command that started it."""
    torch.set_num_threads(1)
    Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()


def _leave_with(parent: int) -> None:
    """End this process as SIGTERM does, training saved, once another has its parent's place."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _perform(config: LaboratoryConfig, seed: int, part: Part) -> float:
    """Do a part in a worker, what it says going to a file; returns the seconds it took."""
    start = time.perf_counter()
    with _told_to(places(config, seed).folder / f"{part.name}.log"):
        setup_logging()
        part.do(config, *part.arguments)
    return time.perf_counter() - start


@contextmanager
def _told_to(path: Path) -> Iterator[None]:
    """Send what this process writes to a file, by its descriptors: libraries write there as well."""
    kept = [os.dup(number) for number in (1, 2)]
    with path.open("a") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value` overrides of the settings above."""
    run(load_run_config(LaboratoryConfig, argv, default_name="laboratory/laboratory"))


if __name__ == "__main__":
    run_main(main)

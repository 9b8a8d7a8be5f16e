"""The whole of the sentiment example on a CPU, from a file of labelled reviews, in one command:

    python -m examples.sentiments.offline data=rt-polarity.jsonl.gz

A writer is trained by SFT on one half of the reviews, a classifier on the labels of that half, and a gold
classifier, which nothing is ever trained against, on the other half. Triton serves both. PPO raises what the
first says of the writer's continuations of neutral prompts, and the gold one tells whether they became
positive or only please the first. Leaves with code 1 where a figure falls short of what is promised.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TypeVar

from pydantic import Field

from conch.cli import load_run_config, run_main
from conch.config import DataConfig, RewardConfig, RunConfig, Section
from conch.converters.to_triton import to_triton
from conch.errors import ConfigError
from conch.log import get_logger
from conch.rewards.factory import from_user
from conch.runs.plots import plot_against, read_metric
from conch.runs.reading import steps_of
from conch.serving.server.runtime import find_bundle
from conch.serving.server.server import TritonServer
from examples.sentiments import ppo_sentiments, sft_sentiments, train_reward_sentiments
from examples.sentiments.positive import PositiveProbability, probabilities
from examples.sentiments.reviews import Review, ReviewsConfig, reviews

_log = get_logger("conch.sentiments")

SERVED, GOLD = "reviews-tiny", "reviews-gold"
ERRORS = 3.0
"""Standard errors by which a classifier must beat chance."""
SERVED_AIM, GOLD_AIM = 0.85, 0.75
"""Mean P(positive) of continuations after PPO, by the served and by the gold classifier."""
START = 0.1
"""How far from 0.5 the mean may be before PPO."""

SectionT = TypeVar("SectionT", bound=RunConfig)


class OfflineConfig(Section):
    """The settings of the whole path; those of its trainers stand in `configs/sentiments/*_tiny.yaml`."""

    data: Path | None = None
    """File of reviews with labels; must be given."""

    output: Path = Path("outputs/sentiments/offline")
    """Folder of all runs, of the model store, the curves and `summary.json`."""

    seed: int = Field(default=0, ge=0)
    """Seeds the writer, its classifier and PPO; the gold classifier has the next seed."""

    share: float = Field(default=1.0, gt=0, le=1)
    """Part of all steps to take, to see that it runs."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A line of the table. before: NaN where there is none. wanted: what it is judged by, "" where it is only
    shown."""

    name: str
    before: float
    after: float
    wanted: str = ""
    ok: bool = True


class Phases:
    """Seconds that each phase took, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Announce and time one phase."""
        _log.info("== %s", name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


def run(config: OfflineConfig) -> list[Figure]:
    """All phases; returns the table.

    Raises:
        ConchError: a phase cannot be done; what can be known before is said before the first.
    """
    find_bundle()  # a machine that cannot run the server is told so now, not after three trainings
    if config.data is None:
        raise ConfigError("no reviews: give data=<file>, whose rows have a `text` and a `label` of 1 or 0")
    _, held_out = reviews(DataConfig(train=str(config.data)), ReviewsConfig())
    phases, folder, store = Phases(), config.output.resolve(), config.output.resolve() / "model_store"
    with phases.timed("writer"):
        writer = train_writer(config, "writer", "first", config.seed)
    with phases.timed("classifier"):
        classifier = train_classifier(config, "classifier", writer, "first", config.seed)
    with phases.timed("gold classifier"):
        start = train_writer(config, "gold_start", "second", config.seed + 1)
        gold = train_classifier(config, "gold", start, "second", config.seed + 1)
    with phases.timed("conversion"):
        for name, checkpoint in ((SERVED, classifier), (GOLD, gold)):
            to_triton(checkpoint, name=name, model_store=store, instance_kind="cpu")
    with (
        phases.timed("PPO"),
        TritonServer(store, [SERVED, GOLD], log_file=folder / "tritonserver.log") as server,
    ):
        endpoints = [server.endpoint(name) for name in (SERVED, GOLD)]
        found = [accuracy(endpoint, held_out) for endpoint in endpoints]
        train_ppo(config, writer, *endpoints)
    table = figures(folder, found, len(held_out))
    labels = {"eval/reward": "mean P(positive), served", "eval/gold": "mean P(positive), gold"}
    curves = plot_against(folder / "ppo", "eval/kl", "KL to the start, nats per continuation", labels)
    report(table, phases, curves)
    rows = {"figures": [asdict(figure) for figure in table], "seconds": phases.seconds}
    (folder / "summary.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return table


def settings(
    section: type[SectionT], trainer: str, config: OfflineConfig, name: str, *overrides: str
) -> SectionT:
    """`configs/sentiments/<trainer>_tiny.yaml` for the run `name` of this path."""
    made = load_run_config(section, overrides, default_name=f"sentiments/{trainer}_tiny")
    changed = {
        "run_dir": config.output.resolve() / name,
        "total_steps": max(2, round(made.train.total_steps * config.share)),
        "eval_every": max(1, round(made.train.eval_every * config.share)),
    }
    return made.model_copy(
        update={
            "train": made.train.model_copy(update=changed),
            "data": made.data.model_copy(update={"train": str(config.data)}),
        }
    )


def train_writer(config: OfflineConfig, name: str, half: str, seed: int) -> Path:
    """SFT from nothing on one half of the reviews, of either kind; returns the checkpoint."""
    overrides = ("learn=all", "measure_reward=false", f"reviews.half={half}", f"train.seed={seed}")
    made = settings(sft_sentiments.SFTSentimentsConfig, "sft", config, name, *overrides)
    return sft_sentiments.train(made) / "checkpoints" / "best"


def train_classifier(config: OfflineConfig, name: str, start: Path, half: str, seed: int) -> Path:
    """A classifier from the weights `start`, on the labels of one half; returns the checkpoint.

    It is the last one, not the best: what is held out measures and chooses nothing.
    """
    overrides = (f"reviews.half={half}", f"train.seed={seed}")
    made = settings(train_reward_sentiments.RewardSentimentsConfig, "reward_model", config, name, *overrides)
    made = made.model_copy(update={"model": made.model.model_copy(update={"path": str(start)})})
    return next(iter(steps_of(train_reward_sentiments.train(made)).values()))


def accuracy(endpoint: str, held_out: Sequence[Review]) -> float:
    """Share of reviews on whose side of 1/2 the served P(positive) is."""
    with PositiveProbability(from_user(endpoint, RewardConfig())) as source:
        found = probabilities(source, [row.text for row in held_out])
    return fmean((value > 0.5) == bool(row.label) for value, row in zip(found, held_out, strict=True))


def train_ppo(config: OfflineConfig, writer: Path, served: str, gold: str) -> None:
    """PPO of the writer against `served`; evaluations ask `gold` as well, which decides nothing."""
    made = settings(
        ppo_sentiments.PPOSentimentsConfig,
        "ppo",
        config,
        "ppo",
        "reviews.half=first",
        f"train.seed={config.seed}",
    )
    made = made.model_copy(
        update={
            "model": made.model.model_copy(update={"path": str(writer)}),
            "reward": made.reward.model_copy(update={"url": served}),
        }
    )
    with PositiveProbability(from_user(gold, RewardConfig())) as judge:
        ppo_sentiments.train(made, lambda samples, **_: {"gold": probabilities(judge, samples)})


def figures(folder: Path, found: Sequence[float], num_reviews: int) -> list[Figure]:
    """The table. found: accuracies of the served and of the gold classifier on held-out reviews."""
    kl = read_metric(folder / "ppo", "eval/kl")[1]
    loss = read_metric(folder / "writer", "eval/loss")[1]
    chance = 0.5 + ERRORS * math.sqrt(0.25 / num_reviews)
    wanted = f"above {chance:.3f}: chance and {ERRORS:g} standard errors"
    return [
        Figure("writer: loss, nats a token", loss[0], min(loss), "falls", min(loss) < loss[0]),
        *(
            Figure(f"{name}: accuracy on {num_reviews} reviews", math.nan, value, wanted, value > chance)
            for name, value in zip(("classifier", "gold classifier"), found, strict=True)
        ),
        risen(folder / "ppo", "eval/reward", "PPO: P(positive), served", SERVED_AIM),
        risen(folder / "ppo", "eval/gold", "PPO: P(positive), gold", GOLD_AIM),
        Figure("PPO: KL to the start, nats", kl[0], kl[-1]),
    ]


def risen(run: Path, metric: str, name: str, aim: float) -> Figure:
    """A mean probability that begins near 1/2 and reaches `aim`."""
    _, values = read_metric(run, metric)
    ok = abs(values[0] - 0.5) <= START and values[-1] >= aim
    return Figure(name, values[0], values[-1], f"from {0.5 - START:g}..{0.5 + START:g} to {aim} at least", ok)


def report(table: Sequence[Figure], phases: Phases, curves: Path) -> None:
    """Print what came of it."""
    print(f"\ncurves   {curves}")
    print("seconds  " + "  ".join(f"{name} {value:.0f}" for name, value in phases.seconds.items()))
    print(f"{'':44}{'before':>9}{'after':>9}")
    for line in table:
        before = "" if math.isnan(line.before) else f"{line.before:.3f}"
        verdict = f"  {'ok' if line.ok else 'NOT'}: {line.wanted}" if line.wanted else ""
        print(f"{line.name:44}{before:>9}{line.after:9.3f}{verdict}")


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value` settings of `OfflineConfig`."""
    table = run(load_run_config(OfflineConfig, argv, default_name="sentiments/offline"))
    if not all(figure.ok for figure in table):
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)

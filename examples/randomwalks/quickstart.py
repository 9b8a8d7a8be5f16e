"""The whole of Conch on a laptop CPU, in one command: `make quickstart`, or, from the checkout,

    python -m examples.randomwalks.quickstart seed=1

It trains a policy by SFT on random walks, trains a reward model on scored walks, converts that with
`to_triton`, serves it with the bundled tritonserver, and improves the policy by PPO whose only reward is gRPC
calls to that server. The exact optimality of walks, which PPO never sees, tells whether the policy learned
the task or learned to please the reward model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from conch.cli import compose, load_run_config, run_main
from conch.config import Section, TrainConfig, load
from conch.config.algorithms.ppo import PPORunConfig
from conch.config.algorithms.reward_model import RewardModelRunConfig
from conch.config.algorithms.sft import SFTRunConfig
from conch.converters.to_triton import to_triton
from conch.log import get_logger
from conch.runs.plots import plot_run
from conch.runs.reading import steps_of
from conch.runs.tracking import make_run_dir
from conch.serving.server.runtime import find_bundle
from conch.serving.server.server import TritonServer
from conch.types import Metrics
from examples.randomwalks.task import RandomWalks, letter_tokenizer

if TYPE_CHECKING:
    from conch.trainers.ppo import PPOTrainer

_log = get_logger("conch.quickstart")

ROOT = Path(__file__).resolve().parents[2]
MODEL_NAME = "randomwalks"
NUM_SHOWN = 5


class QuickstartConfig(Section):
    """The quickstart's own settings; those of its three trainers stand in `configs/randomwalks/`."""

    seed: int = Field(default=0, ge=0)
    """Seeds all three trainings."""

    graph_seed: int = Field(default=1000, ge=0)
    """Seeds the graph and its 1,000 walks."""

    num_eval_samples: int = Field(default=4000, ge=100)
    """Walks sampled from all start nodes to measure the policy before and after."""

    num_scored_walks: int = Field(default=20_000, ge=100)
    """Walks that the reward model learns from; a tenth as many again are held out."""

    ppo_steps: int | None = Field(default=None, ge=1)
    """Steps of PPO; None takes those of `configs/randomwalks/ppo.yaml`."""

    output_dir: Path = ROOT / "outputs"
    """Where the run folder is made."""

    model_store: Path = ROOT / "model_store"
    """Where the converted reward model is published."""


@dataclass
class Phases:
    """Seconds each phase took, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str, title: str) -> Iterator[None]:
        """Announce and time one phase."""
        _log.info("[%d/6] %s", len(self.seconds) + 1, title)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)


def run(config: QuickstartConfig) -> dict[str, Any]:
    """All six phases; returns what `summary.json` holds."""
    find_bundle()  # a machine that cannot run the server is told so now, not after two trainings
    task, phases = RandomWalks(config.graph_seed), Phases()
    run_dir = make_run_dir(TrainConfig(output_dir=config.output_dir))
    with phases.timed("sft", "the starting policy: SFT on 1,000 random walks"):
        policy = train_policy(config, task, run_dir)
    with phases.timed("reward_model", f"the reward model: {config.num_scored_walks} scored walks"):
        reward_model = train_reward_model(config, task, run_dir)
    with phases.timed("to_triton", "conversion into the model store"):
        conversion = to_triton(reward_model, name=MODEL_NAME, model_store=config.model_store, force=True)
    print(conversion.parity.table())
    server = TritonServer(config.model_store, [MODEL_NAME], log_file=run_dir / "tritonserver.log")
    try:
        with phases.timed(
            "server_start", "tritonserver: start, and wait until its golden prompts score right"
        ):
            server.start()
        with phases.timed("ppo", f"PPO against {server.endpoint(MODEL_NAME)}"):
            before, after, walks = train_ppo(config, task, run_dir, policy, server.endpoint(MODEL_NAME))
    finally:
        start = time.perf_counter()
        server.stop()
    phases.seconds["server_stop"] = round(time.perf_counter() - start, 2)
    summary = summarise(config, before, after, walks, phases, reward_model)
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _log.info("[6/6] the server is down; the run in figures:")
    report(summary, run_dir, plot_run(run_dir))
    return summary


def train_policy(config: QuickstartConfig, task: RandomWalks, run_dir: Path) -> Path:
    """Imitate all walks, good and bad; returns the checkpoint.

    It is saved to `<output_dir>/randomwalks/sft` as well, where `configs/randomwalks/ppo.yaml` looks for it.
    """
    from conch.trainers.sft import SFTTrainer  # loads torch, which help and mistyped keys do without

    trainer = SFTTrainer(
        load(SFTRunConfig, composed("sft", config, run_dir / "sft")),
        samples=task.walks,
        tokenizer=letter_tokenizer(),
    )
    trainer.fit()
    shared = config.output_dir / "randomwalks"
    trainer.save_pretrained(shared / "sft")
    (shared / "prompts.txt").write_text("\n".join(task.start_nodes) + "\n")
    trainer.close()
    return last_checkpoint(run_dir / "sft")


def train_reward_model(config: QuickstartConfig, task: RandomWalks, run_dir: Path) -> Path:
    """Regress optimality; prints the rank correlation on held-out walks and returns the checkpoint."""
    from conch.trainers.reward_model import RewardModelTrainer

    walks = task.scored_walks(config.num_scored_walks * 11 // 10, seed=config.seed)
    known = {walk["text"] for walk in walks[: config.num_scored_walks]}
    held_out = [walk for walk in walks[config.num_scored_walks :] if walk["text"] not in known]
    trainer = RewardModelTrainer(
        load(RewardModelRunConfig, composed("reward_model", config, run_dir / "reward_model")),
        samples=walks[: config.num_scored_walks],
        eval_samples=held_out,
        tokenizer=letter_tokenizer(),
    )
    trainer.fit()
    rho = trainer.evaluate()["eval/spearman"]
    print(f"reward model: rank correlation with gold {rho:.3f} on {len(held_out)} walks it never saw")
    trainer.close()
    return last_checkpoint(run_dir / "reward_model")


def train_ppo(
    config: QuickstartConfig, task: RandomWalks, run_dir: Path, policy: Path, endpoint: str
) -> tuple[Metrics, Metrics, dict[str, list[str]]]:
    """PPO with the served reward; returns the measurements before and after, and some walks of both."""
    from conch.trainers.ppo import PPOTrainer

    values = composed("ppo", config, run_dir)
    values["model"]["path"] = str(policy)
    values["reward"] = {**values.get("reward", {}), "url": endpoint}
    if config.ppo_steps is not None:
        values["train"]["total_steps"] = config.ppo_steps
    trainer = PPOTrainer(load(PPORunConfig, values), prompts=task.start_nodes, metric_fn=task.metric)
    repeats = -(-config.num_eval_samples // len(task.start_nodes))
    shown = task.start_nodes[-NUM_SHOWN:]
    try:
        before = trainer.evaluate(repeats=repeats)
        walks = {"before": walks_from(trainer, shown)}
        trainer.fit()
        after = trainer.evaluate(repeats=repeats)
        walks["after"] = walks_from(trainer, shown)
    finally:
        trainer.close()
    return before, after, walks


def walks_from(trainer: PPOTrainer, starts: Sequence[str]) -> list[str]:
    """One sampled walk from each start."""
    return [start + output for start, output in zip(starts, trainer.generate(starts), strict=True)]


def composed(trainer: str, config: QuickstartConfig, run_dir: Path) -> dict[str, Any]:
    """`configs/randomwalks/<trainer>.yaml` with this run's seed and folder."""
    values = compose(f"randomwalks/{trainer}", [], ROOT / "configs")
    values.setdefault("train", {}).update(seed=config.seed, run_dir=str(run_dir))
    return values


def last_checkpoint(run_dir: Path) -> Path:
    """The checkpoint that the end of a run saved."""
    return next(iter(steps_of(run_dir).values()))


def summarise(
    config: QuickstartConfig,
    before: Metrics,
    after: Metrics,
    walks: dict[str, list[str]],
    phases: Phases,
    reward_model: Path,
) -> dict[str, Any]:
    """The figures of the run; seconds per phase, KL in nats per walk."""
    return {
        "seed": config.seed,
        "gold_optimality_before": before["eval/optimality"],
        "gold_optimality_after": after["eval/optimality"],
        "served_reward_before": before["eval/reward"],
        "served_reward_after": after["eval/reward"],
        "kl": after["eval/kl"],
        "num_eval_samples": config.num_eval_samples,
        "phase_seconds": {**phases.seconds, "total": round(sum(phases.seconds.values()), 2)},
        "walks_before": walks["before"],
        "walks_after": walks["after"],
        "reward_model": str(reward_model),
    }


def report(summary: dict[str, Any], run_dir: Path, plots: Sequence[Path]) -> None:
    """Print the summary for a person."""
    rows = [
        ("gold optimality (exact)", "gold_optimality_before", "gold_optimality_after"),
        ("served reward (proxy)", "served_reward_before", "served_reward_after"),
    ]
    print(f"\n{'':26}{'before':>8}{'after':>8}   means of {summary['num_eval_samples']} sampled walks")
    for title, *keys in rows:
        print(f"{title:26}" + "".join(f"{summary[key]:8.3f}" for key in keys))
    print(f"{'KL to the start':26}{0.0:8.3f}{summary['kl']:8.3f}   nats per walk")
    seconds = "  ".join(f"{name} {value:.0f}" for name, value in summary["phase_seconds"].items())
    print(f"\nseconds     {seconds}")
    print(f"run folder  {run_dir}")
    print(f"checkpoint  {last_checkpoint(run_dir)}")
    for plot in plots:
        print(f"plot        {plot}")
    pairs = zip(summary["walks_before"], summary["walks_after"], strict=True)
    print("\nsample walks, before -> after")
    for old, new in pairs:
        print(f"  {old:12} -> {new}")


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value` overrides of `QuickstartConfig`."""
    run(
        load_run_config(
            QuickstartConfig, argv, default_name="randomwalks/quickstart", config_dir=ROOT / "configs"
        )
    )


if __name__ == "__main__":
    run_main(main)

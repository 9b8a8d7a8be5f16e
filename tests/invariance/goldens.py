"""What short fixed runs of every trainer give: recorded once, compared ever after.

The runs are in float64 and start from weights that are the same on every processor, so that what is recorded
is a property of the formulas. Kernels of other processors (ATen's for AVX2 and for none, MKL's and oneDNN's
compatible ones, 1 to 4 threads) moved no number by more than 3e-14 of it in three updates with Adam.

Record anew, from a clean tree and with the reason in the commit:  python -m tests.invariance.goldens
"""

from __future__ import annotations

import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from tests.invariance.scenarios import (
    GROUP_REWARDS,
    GROUPS,
    PAIRS,
    REWARDS,
    ROLLOUTS,
    SAMPLES,
    SCORED,
    SMALL,
)
from tests.runs import (
    batch_and_metrics,
    grpo_trainer,
    ilql_trainer,
    policy,
    ppo_trainer,
    redraw,
    reward_trainer,
    rft_trainer,
    sft_trainer,
)

FILE = Path(__file__).with_name("goldens.json")
STEPS = 3
ADAM = {"learning_rate": 1e-2, "eps": 1e-5}
KL = {"coef": 0.2, "target": 0.01, "horizon": 100}
Run = list[dict[str, float]]


def versions() -> dict[str, str]:
    """What the runs were recorded with: where a number differs, look here first."""
    return {name: version(name) for name in ("torch", "transformers", "accelerate")}


def runs(folder: Path) -> dict[str, Run]:
    """Trainer -> the metrics of its steps."""
    sft = sft_trainer(folder / "sft", SAMPLES, lm=policy(**SMALL), optimizer=ADAM)
    regression = reward_trainer(folder / "regression", SCORED, optimizer=ADAM)
    pairs = reward_trainer(folder / "pairs", PAIRS, optimizer=ADAM)
    for trainer in (regression, pairs):
        redraw(trainer.model, 0.1)
    rewards = [float(len(sample)) for sample in SAMPLES]
    texts = [sample if isinstance(sample, str) else "".join(sample.values()) for sample in SAMPLES]
    ilql = ilql_trainer(folder / "ilql", texts, rewards, lm=policy(**SMALL), optimizer=ADAM)
    for head in (ilql.policy.q_heads, ilql.policy.value_head):
        redraw(head, 0.3)
    ilql.policy.sync_targets(1.0)
    found = {
        name: [numbers(trainer.step()) for _ in range(STEPS)]
        for name, trainer in (("sft", sft), ("regression", regression), ("pairs", pairs), ("ilql", ilql))
    }
    return {**found, "ppo": ppo(folder / "ppo"), "grpo": grpo(folder / "grpo"), "rft": rft(folder / "rft")}


# What is sampled would part ways at the first difference in rounding: online trainers are given rollouts.


def ppo(run_dir: Path) -> Run:
    """Steps with running moments, a failed reward and an adaptive KL weight."""
    trainer = ppo_trainer(
        run_dir,
        lm=policy(**SMALL),
        optimizer=ADAM,
        ppo={"kl": KL},
        shaping={"clip": 5.0, "scaling": "running", "missing_eos_penalty": 1.0},
    )
    redraw(trainer.policy.value_head.hidden, 0.3)
    found = []
    for _ in range(STEPS):
        batch, metrics = batch_and_metrics(trainer, ROLLOUTS, REWARDS)
        found.append(numbers({**metrics, **trainer.update(batch)}))
    return found


def grpo(run_dir: Path) -> Run:
    """Steps of two epochs on groups, one with a failed reward, with an adaptive KL weight in the loss."""
    trainer = grpo_trainer(
        run_dir,
        lm=policy(**SMALL),
        optimizer=ADAM,
        grpo={"kl": KL, "epochs": 2},
    )
    found = []
    for _ in range(STEPS):
        batch, metrics = batch_and_metrics(trainer, GROUPS, GROUP_REWARDS)
        found.append(numbers({**metrics, **trainer.update(batch)}))
    return found


def rft(run_dir: Path) -> Run:
    """Steps of one round on the completions of its first: the bar rises from step to step."""
    trainer = rft_trainer(
        run_dir, lm=policy(**SMALL), optimizer=ADAM, rft={"n_improve_steps": STEPS, "batch_size": 4}
    )
    pool, metrics = trainer.make_batch(GROUPS, GROUP_REWARDS)
    found = []
    for _ in range(STEPS):
        found.append(numbers({**metrics, **trainer.update(pool)}))
        trainer.steps_done += 1
    return found


def numbers(metrics: dict[str, float]) -> dict[str, float]:
    """What training computes, without clocks and traffic."""
    computed = ("train/", "policy/", "value/", "grpo/", "rft/")
    return {name: value for name, value in metrics.items() if name.startswith(computed)}


def read() -> dict[str, Any]:
    """The recorded runs, and the versions they were recorded with."""
    return json.loads(FILE.read_text())


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        FILE.write_text(json.dumps({"versions": versions(), "runs": runs(Path(scratch))}, indent=1) + "\n")

"""What short fixed runs of every trainer give: recorded once, compared ever after.

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

from tests.invariance.scenarios import PAIRS, REWARDS, ROLLOUTS, SAMPLES, SCORED, SMALL
from tests.runs import ilql_trainer, policy, ppo_trainer, reward_trainer, sft_trainer

FILE = Path(__file__).with_name("goldens.json")
STEPS = 3
ADAM = {"learning_rate": 1e-2}


def stamp() -> dict[str, str]:
    """What a comparison to the last digits depends on."""
    return {name: version(name) for name in ("torch", "transformers", "accelerate")}


def runs(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Trainer -> the metrics of its steps."""
    torch.set_num_threads(1)
    sft = sft_trainer(folder / "sft", SAMPLES, lm=policy(**SMALL), optimizer=ADAM)
    regression = reward_trainer(folder / "regression", SCORED, optimizer=ADAM)
    pairs = reward_trainer(folder / "pairs", PAIRS, optimizer=ADAM)
    rewards = [float(len(sample)) for sample in SAMPLES]
    texts = [sample if isinstance(sample, str) else "".join(sample.values()) for sample in SAMPLES]
    ilql = ilql_trainer(folder / "ilql", texts, rewards, lm=policy(**SMALL), optimizer=ADAM)
    found = {
        name: [numbers(trainer.step()) for _ in range(STEPS)]
        for name, trainer in (("sft", sft), ("regression", regression), ("pairs", pairs), ("ilql", ilql))
    }
    return {**found, "ppo": ppo(folder / "ppo")}


def ppo(run_dir: Path) -> list[dict[str, float]]:
    """Steps on given rollouts: what is sampled would part ways at the first difference in rounding."""
    trainer = ppo_trainer(
        run_dir,
        lm=policy(**SMALL),
        optimizer=ADAM,
        ppo={"kl": {"coef": 0.2, "target": 0.01, "horizon": 100}},
        shaping={"clip": 5.0, "scaling": "running", "missing_eos_penalty": 1.0},
    )
    found = []
    for _ in range(STEPS):
        batch = trainer.experience(ROLLOUTS, REWARDS)
        found.append(numbers({**trainer.experience_metrics, **trainer.update(batch)}))
    return found


def numbers(metrics: dict[str, float]) -> dict[str, float]:
    """What training computes, without clocks and traffic."""
    return {
        name: value for name, value in metrics.items() if name.startswith(("train/", "policy/", "value/"))
    }


def read() -> dict[str, Any]:
    """The recorded runs, with their stamp."""
    return json.loads(FILE.read_text())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        FILE.write_text(json.dumps({"stamp": stamp(), "runs": runs(Path(scratch))}, indent=1) + "\n")

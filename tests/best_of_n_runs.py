"""A tiny policy, prompts and reward functions that best-of-n is run with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from conch.evaluation.records import EvaluationRecord, read_record
from conch.evaluation.sampling.run import main
from tests.runs import TOKENIZER, policy

REWARDS = """
from pathlib import Path

LOG = Path({log!r})


def _told(name, outputs):
    with LOG.open("a") as file:
        file.write("".join(f"{{name}} {{output!r}}\\n" for output in outputs))


def vowels(outputs, **_):
    _told("vowels", outputs)
    return [float(sum(letter in "ae" for letter in output)) for output in outputs]


def length(outputs, **_):
    _told("length", outputs)
    return [float(len(output)) for output in outputs]


def late(outputs, **_):
    _told("late", outputs)
    return [float(sum(letter in "fgh" for letter in output)) - len(output) for output in outputs]


def not_for_a(outputs, **_):
    return [None if output.startswith("a") else float(len(output)) for output in outputs]
"""


class Bench:
    """A policy, prompts and rewards in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "calls.txt"
        self.log.touch()
        (folder / "rewards.py").write_text(REWARDS.format(log=str(self.log)))
        (folder / "prompts.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "c"}\n{"prompt": "def"}\n')
        self.save_policy("policy", 0)

    def save_policy(self, name: str, seed: int) -> None:
        policy(seed, dtype=torch.float32).save_pretrained(self.folder / name)
        TOKENIZER.save_pretrained(self.folder / name)

    def reward(self, name: str) -> str:
        return f"{self.folder / 'rewards.py'}:{name}"

    def run(self, *words: str, **settings: Any) -> dict[str, Any]:
        """Run the command; gives its results."""
        settings = {
            "model.path": self.folder / "policy",
            "data.eval": self.folder / "prompts.jsonl",
            "generation.max_new_tokens": 4,
            "generation.chunk_size": 8,
            "reward.function": self.reward("vowels"),
            "gold": self.reward("length"),
            "best_of_n.num_samples": 20,
            "best_of_n.save_every": 16,
            "best_of_n.output_dir": self.folder / "out",
            **settings,
        }
        main([*(f"{key}={value}" for key, value in settings.items() if value is not None), *words])
        name = settings.get("best_of_n.name", "")
        return json.loads((self.folder / "out" / name / "results.json").read_text())

    def records(self) -> dict[str, EvaluationRecord]:
        paths = sorted((self.folder / "out" / "samples").glob("*.jsonl"))
        return {path.name: read_record(path) for path in paths}

    def calls(self) -> list[str]:
        """Names of the rewards that were asked since the last call of this, once per text."""
        names = [line.split()[0] for line in self.log.read_text().splitlines()]
        self.log.write_text("")
        return names

"""What came of `smoke.sh`: `python smoke_table.py DATA FOLDER` prints a table of the runs below the folder.

Leaves with code 1, and a sentence for each, where figures fall short of what `smoke.sh` promises.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `examples` is not installed

from conch.config import DataConfig
from conch.runs.tracking import METRICS_FILE
from examples.hh.hh_data import comparisons

ERRORS = 3.0
"""Standard errors by which a figure must be better than chance, or than it was."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A line of the table. wanted: what it is judged by, "" where it is only shown."""

    name: str
    before: float
    after: float
    wanted: str = ""
    ok: bool = True

    def missed(self) -> str:
        """The sentence that says what was not reached."""
        reached = f"went from {self.before:.3f} to {self.after:.3f}"
        return f"{self.name}: {reached}, which is not what smoke.sh promises ({self.wanted})"


def figures(folder: Path, num_pairs: int) -> list[Figure]:
    """num_pairs: held-out pairs of the reward model."""
    loss = logged(folder / "sft", "eval/loss")
    accuracy = logged(folder / "reward_model", "eval/accuracy")
    chance = 0.5 + ERRORS * math.sqrt(0.25 / num_pairs)
    return [
        Figure("SFT: loss, nats a token", loss[0], loss[-1], "falls", loss[-1] < loss[0]),
        Figure(
            f"reward model: accuracy on {num_pairs} pairs",
            accuracy[0],
            accuracy[-1],
            f"above {chance:.3f}: chance and {ERRORS:g} standard errors",
            accuracy[-1] > chance,
        ),
        ppo_figure(folder / "ppo"),
        *(
            Figure(f"{name}: reward", *(logged(folder / run, "eval/reward")[place] for place in (0, -1)))
            for name, run in (("ILQL", "ilql"), ("SFT, further", "sft_more"))
        ),
    ]


def ppo_figure(run: Path) -> Figure:
    """The served reward of answers to held-out prompts, before and after, compared prompt by prompt."""
    tables = sorted((run / "samples").glob("eval_*.csv"))
    before, after = (rewards(tables[place]) for place in (0, -1))
    gains = [after[prompt] - before[prompt] for prompt in before]
    error = stdev(gains) / math.sqrt(len(gains))
    wanted = f"rises by {ERRORS:g} standard errors of {error:.3f}"
    name, ok = f"PPO: reward on {len(gains)} prompts", fmean(gains) > ERRORS * error
    return Figure(name, fmean(before.values()), fmean(after.values()), wanted, ok)


def rewards(table: Path) -> dict[str, float]:
    """Prompt -> reward of the answer to it."""
    with table.open(newline="", encoding="utf-8") as file:
        return {row["prompt"]: float(row["reward"]) for row in csv.DictReader(file)}


def logged(run: Path, metric: str) -> list[float]:
    """All values of a metric, in the order of steps."""
    lines = (run / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [row[metric] for line in lines if metric in (row := json.loads(line))]


def main(argv: Sequence[str]) -> int:
    """Print the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", help="comparisons that the runs learned from")
    parser.add_argument("folder", type=Path, help="folder of the runs")
    arguments = parser.parse_args(list(argv))
    _, held_out = comparisons(DataConfig(train=arguments.data))
    lines = figures(arguments.folder, len(held_out))
    print(f"{'':38}{'before':>9}{'after':>9}")
    for line in lines:
        verdict = f"  {'ok' if line.ok else 'NOT'}: {line.wanted}" if line.wanted else ""
        print(f"{line.name:38}{line.before:9.3f}{line.after:9.3f}{verdict}")
    missed = [line for line in lines if not line.ok]
    for line in missed:
        print(f"error: {line.missed()}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

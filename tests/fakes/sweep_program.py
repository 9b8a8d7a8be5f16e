"""A program that sweeps run, without torch, so that a test can afford many: `tests.fakes.sweep_program`.

It stands for a user's own: its configuration comes from `load_run_config`, it writes `metrics.jsonl`, saves
after each step, leaves on SIGTERM with 143, and goes on where it was.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from conch.cli import load_run_config, run_main
from conch.config import Section, TrainConfig

CONFIGS = Path(__file__).resolve().parent / "sweep_configs"


class ShapeConfig(Section):
    """Form of the curve, a group of files."""

    power: float = 1.0
    """Of the step."""


class ProgramConfig(Section):
    """A toy run: climbs towards a height that depends on the rate."""

    rate: float = 0.1
    """Best at 0.1."""

    name: str = "toy"
    """Text of no meaning."""

    width: int = 1
    """Divides the height."""

    fail_at: int | None = None
    """Step at which the run fails."""

    pause_s: float = 0.0
    """Seconds a step."""

    shape: ShapeConfig = ShapeConfig()
    """How it climbs."""

    train: TrainConfig = TrainConfig(total_steps=4)
    """How long."""


def value_at(config: ProgramConfig, step: int) -> float:
    """The metric after a step."""
    height = 1.0 / (1.0 + abs(math.log10(config.rate) + 1.0)) / config.width
    return height * (1.0 - 2.0 ** -(step**config.shape.power))


def run(config: ProgramConfig) -> None:
    """All steps that are left."""
    folder = config.train.run_dir
    assert folder is not None and config.train.resume == "auto"
    folder.mkdir(parents=True, exist_ok=True)
    state, metrics = folder / "state.json", folder / "metrics.jsonl"
    done = json.loads(state.read_text())["step"] if state.is_file() else 0
    rows = metrics.read_text().splitlines(keepends=True)[: done + 1] if done else []
    metrics.write_text("".join(rows) or '{"step": 0, "eval/height": 0.0}\n')
    (folder / "best_metric.txt").write_text("eval/height\n")
    seen = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TOY_WORD")}
    (folder / "seen.json").write_text(json.dumps({"argv": sys.argv, "orig": sys.orig_argv, **seen}))
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    print(f"begins after step {done}", flush=True)
    for step in range(done + 1, config.train.total_steps + 1):
        time.sleep(config.pause_s)
        if step == config.fail_at:
            raise ValueError(f"step {step} was not to be")
        with metrics.open("a") as file:
            file.write(json.dumps({"step": step, "eval/height": value_at(config, step)}) + "\n")
        state.with_suffix(".new").write_text(json.dumps({"step": step}))
        os.replace(state.with_suffix(".new"), state)
        if told and step < config.train.total_steps:
            print(f"saved step {step} and leaves", flush=True)
            raise SystemExit(143)


def main(argv: Sequence[str]) -> None:
    """Command line: `key=value` overrides of `sweep_configs/toy.yaml`."""
    run(load_run_config(ProgramConfig, argv, default_name="toy", config_dir=CONFIGS))


if __name__ == "__main__":
    # As a module of its own name, so that the configuration's class is the one that tests import.
    from tests.fakes.sweep_program import main as program

    run_main(program)

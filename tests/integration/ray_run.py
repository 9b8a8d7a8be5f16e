"""A run that samples in an actor of Ray: prints Ray's folder and the steps' rewards.

RUN_DIR STEPS [close|stay|train] [ADDRESS]

`train` trains asynchronously, `stay` does until it is ended from outside. ADDRESS: of a cluster to join.
"""

from __future__ import annotations

import signal
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

from conch.log import is_main_process, setup_logging
from conch.types import Metrics
from tests.runs import async_grpo_trainer, grpo_trainer


def main() -> None:
    run_dir, steps, end = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    setup_logging()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    settings = {"address": sys.argv[4]} if len(sys.argv) > 4 else {}
    rollout = {"engine": "ray", "ray": settings}
    if end == "stay":
        stay(async_grpo_trainer(run_dir, rollout=rollout, train={"total_steps": 10**6}))
    if end == "train":
        with closing(async_grpo_trainer(run_dir, rollout=rollout, train={"total_steps": steps})) as run:
            run.fit()
        return
    trainer = grpo_trainer(run_dir, rollout=rollout)
    tell_folder(trainer)
    for step in range(steps):
        metrics = trainer.step()
        if is_main_process():
            print("step", step, metrics["reward/mean"], flush=True)
    trainer.close()
    print("closed", flush=True)


def tell_folder(trainer: Any) -> None:
    if is_main_process():
        print("folder", trainer._make_sampler._samplers._cluster._folder, flush=True)


def stay(trainer: Any) -> NoReturn:
    tell_folder(trainer)
    step = trainer.step

    def told_step() -> Metrics:
        metrics = step()
        print("step", trainer.run.step, metrics["reward/mean"], flush=True)
        return metrics

    trainer.step = told_step
    with closing(trainer):
        trainer.fit()
    raise AssertionError("it ended by itself")


if __name__ == "__main__":
    main()

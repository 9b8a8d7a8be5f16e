"""A run that samples in an actor of Ray: prints Ray's folder and the steps' rewards.

RUN_DIR STEPS [close|stay]    `stay` samples until it is ended from outside
"""

from __future__ import annotations

import sys
from pathlib import Path

from conch.log import is_main_process, setup_logging
from tests.runs import grpo_trainer


def main() -> None:
    run_dir, steps, end = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    setup_logging()
    settings = {"address": sys.argv[4]} if len(sys.argv) > 4 else {}
    trainer = grpo_trainer(run_dir, rollout={"engine": "ray", "ray": settings})
    samplers = trainer._make_sampler._samplers
    if is_main_process():
        print("folder", samplers._cluster._folder, flush=True)
    for step in range(steps):
        metrics = trainer.step()
        if is_main_process():
            print("step", step, metrics["reward/mean"], flush=True)
    while end == "stay":
        trainer.rollout(trainer.next_prompts(2))
    trainer.close()
    print("closed", flush=True)


if __name__ == "__main__":
    main()

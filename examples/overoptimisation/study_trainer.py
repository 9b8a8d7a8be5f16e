"""PPO as `trainer_rl.py` runs it."""

from __future__ import annotations

from conch.runs.tracking import Tracker
from conch.trainers.ppo import PPOTrainer
from conch.types import Metrics
from examples.overoptimisation.gold import write_eval_files
from examples.overoptimisation.layout import EVAL


class StudyTrainer(PPOTrainer):
    """PPO that writes each evaluation to `eval/eval-<k>.json` as well."""

    def evaluate(
        self, tracker: Tracker | None = None, step: int = 0, *, repeats: int | None = None
    ) -> Metrics:
        """Evaluate; see `OnlineTrainer`."""
        metrics = super().evaluate(tracker, step, repeats=repeats)
        if tracker is not None and self.collectives.is_main:
            write_eval_files(self.run_dir, self.run_dir / EVAL)
        return metrics

"""A training service without a model, for `benchmarks/remote_step.py`, which starts it.

python -m tests.fakes.benchmark_service WHAT --port=PORT ...

WHAT: `learns`; `fails` in the first update; `drops` the first group of each step; `leaves` when it is asked
for completions; `refuses` to start.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

from conch.servers.restart import exit_with_parent
from tests.fakes.training_service import Answer, FakeTrainingService

RUN = "run-1"


class Run:
    """Takes all rewards of a batch for one update. version: updates so far."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.version = 0

    def start(self, _settings: Any) -> Answer:
        return 200, {"status": "started", "run_id": RUN, "model_version": [RUN, 0]}

    def complete(self, batch: dict[str, Any]) -> Answer:
        if self.what == "leaves":
            print("no memory is left", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        replies = [
            {
                "prompt": request["prompt"],
                "completions": ["aa", "b"],
                "completion_tokens": [[1], [2]],
                "model_version": [RUN, self.version],
            }
            for request in batch["requests"]
        ]
        return 200, {"replies": replies}

    def reward(self, batch: dict[str, Any]) -> Answer:
        self.version += self.what != "fails"
        whole = {"model_version": [RUN, self.version], "outcome": "whole"}
        replies = [whole for _ in batch["requests"]]
        if self.what == "drops":
            replies[0] = {**whole, "outcome": "dropped", "detail": "too old"}
        return 200, {"replies": replies}

    def status(self, _headers: Any) -> Answer:
        failed = {"state": "failed", "error": "the loss is NaN"} if self.what == "fails" else {}
        metrics = {"rollout/length_mean": 3.0}
        known = {"run_id": RUN, "state": "running", "model_version": [RUN, self.version], "metrics": metrics}
        return 200, {**known, **failed}


def main(what: str, *settings: str) -> None:
    """Serve until it is killed, or whoever started it is gone."""
    exit_with_parent(lambda: os._exit(1))
    if what == "refuses":
        print("error: there is no such folder", flush=True)
        sys.exit(3)
    run = Run(what)
    port = next(int(each.partition("=")[2]) for each in settings if each.startswith("--port="))
    answers = {
        "/start": [run.start],
        "/status": [run.status],
        "/completions/batch": [run.complete],
        "/rewards/batch": [run.reward],
    }
    FakeTrainingService({**answers}, port)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])

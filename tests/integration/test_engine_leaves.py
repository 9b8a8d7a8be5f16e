"""The end of a run on two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONGEST_S = 120


@pytest.mark.slow
def test_runs_that_end_right_after_their_last_collective_leave_with_0() -> None:
    """Where nothing was waited for, one in three such runs aborted."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    alone = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    for _ in range(4):
        run = subprocess.run(
            [*launcher, *alone, "-m", "tests.integration.leave_run"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            text=True,
            capture_output=True,
            timeout=LONGEST_S,
            check=False,
        )
        assert run.returncode == 0, run.stderr

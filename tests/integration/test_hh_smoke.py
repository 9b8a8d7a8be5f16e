"""The whole of Helpful & Harmless on two CPU processes, from the real file, as its README says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared/data/hh/harmless-base.jsonl.gz"
LONGEST_S = 3600


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_file(), reason=f"the comparisons are not there: {DATA}")
def test_every_program_of_hh_does_what_its_table_promises(tmp_path: Path) -> None:
    result = subprocess.run(
        ["./smoke.sh", str(DATA), str(tmp_path)],
        cwd=ROOT / "examples/hh",
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    *_, sft, accuracy, ppo, ilql, further = result.stdout.splitlines()
    assert all("ok:" in line for line in (sft, accuracy, ppo))
    assert ilql.startswith("ILQL: reward") and further.startswith("SFT, further: reward")

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_doctor_sees_torch_and_starts_the_bundled_server() -> None:
    command = [sys.executable, "-m", "conch", "doctor"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    lines = done.stdout.splitlines()
    levels = {line[6:].partition(":")[0]: line.split()[0] for line in lines if line[:5].strip()}
    assert (done.returncode, levels["python"], levels["libraries"], levels["devices"]) == (
        0,
        "ok",
        "ok",
        "ok",
    )
    assert levels["numpy"] == "ok" and "8900" in done.stdout, done.stdout
    assert levels["bundled server"] == "ok", done.stdout
    assert "started and answered at 127.0.0.1:" in done.stdout

"""`conch report --live` as a program: it says where it is, answers there, and ends with Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("plotly", reason="the page's charts come with plotly: pip install plotly")


def test_live_report_answers_until_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "train/loss": 1.0}\n')
    command = [sys.executable, "-m", "conch", "report", f"mine={tmp_path}", "--live", "--port", "0"]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert program.stdout is not None
        url = program.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert "Conch report: mine" in answer.read().decode()
        with urllib.request.urlopen(f"{url}data", timeout=60) as answer:
            assert b'"train/loss"' in answer.read()
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=60)
        assert program.returncode == 130 and "Traceback" not in errors
    finally:
        program.kill()
        program.wait()


def test_host_beyond_this_machine_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    command = [sys.executable, "-m", "conch", "report", str(tmp_path), "--live", "--host", "0.0.0.0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 1
    assert done.stderr.startswith("error: --host 0.0.0.0: a live report is served on loopback alone")

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conch.runs.state import STATE_FILE, RunStoppedError, noted_state, read_state

RUNS_FOREVER = """
import sys, time
from pathlib import Path
from conch.runs.state import noted_state

with noted_state(Path(sys.argv[1]), "sft", 9):
    print("begun", flush=True)
    time.sleep(600)
"""


def state_in(folder: Path) -> tuple[str, str]:
    state = read_state(folder)
    assert state is not None
    return state.state, state.reason


def test_run_is_on_record_while_it_runs_and_when_it_is_done(tmp_path: Path) -> None:
    with noted_state(tmp_path, "ppo", 7):
        state = read_state(tmp_path)
        assert state is not None
        assert (state.algorithm, state.state, state.total_steps) == ("ppo", "running", 7)
    assert state_in(tmp_path) == ("finished", "")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (SystemExit(143), ("stopped", "")),
        (KeyboardInterrupt(), ("stopped", "")),
        (RunStoppedError("a client stopped it"), ("stopped", "")),
        (ValueError("no luck\nat all"), ("failed", "no luck")),
    ],
)
def test_what_ended_a_run_is_on_record_and_goes_on(
    error: BaseException, expected: tuple[str, str], tmp_path: Path
) -> None:
    with pytest.raises(type(error)), noted_state(tmp_path, "ppo", 7):
        raise error
    assert state_in(tmp_path) == expected


def test_run_whose_process_was_killed_is_told_from_one_that_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUNS_FOREVER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "begun\n"
            assert state_in(tmp_path) == ("running", "")
        finally:
            process.send_signal(signal.SIGKILL)
    assert state_in(tmp_path) == ("killed", "")


def test_number_of_a_dead_process_that_another_one_has_is_no_run(tmp_path: Path) -> None:
    with noted_state(tmp_path, "ppo", 7):
        values = json.loads((tmp_path / STATE_FILE).read_text())
        assert values["pid"] == os.getpid()
        (tmp_path / STATE_FILE).write_text(json.dumps(values | {"born": "1"}))
        assert state_in(tmp_path) == ("killed", "")
        (tmp_path / STATE_FILE).write_text(json.dumps(values | {"born": "1", "host": "another"}))
        assert state_in(tmp_path) == ("running", "")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"state": "running"}'])
def test_unreadable_record_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_text(text)
    assert read_state(tmp_path) is None
    assert read_state(tmp_path / "nowhere") is None


def test_folder_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its own"), noted_state(tmp_path / "gone", "ppo", 7):
        raise ValueError("its own")

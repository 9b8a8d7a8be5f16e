"""The run's folder, and what is written to it of a run."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conch.config import TrackingConfig, TrainConfig
from conch.errors import ConfigError
from conch.runs.tracking import METRICS_FILE, Tracker, make_run_dir

ROOT = Path(__file__).parents[3]


def tracker(run_dir: Path, **config: Any) -> Tracker:
    return Tracker(run_dir, TrackingConfig(**config), total_steps=4, desc="test")


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]


# ----------------------------------------------------------------------------------------------- the folder


def test_run_dir_is_made_below_the_output_dir_by_date_and_time(tmp_path: Path) -> None:
    folder = make_run_dir(TrainConfig(output_dir=tmp_path / "new" / "outputs"))

    assert folder.is_dir() and folder.is_absolute()
    assert folder.relative_to(tmp_path / "new" / "outputs").as_posix().count("/") == 1


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    folders = [make_run_dir(TrainConfig(output_dir=tmp_path)) for _ in range(20)]

    assert len(set(folders)) == 20


def test_run_dir_may_exist_but_not_hold_another_run(tmp_path: Path) -> None:
    config = TrainConfig(run_dir=tmp_path / "run")
    assert make_run_dir(config) == make_run_dir(config) == (tmp_path / "run").resolve()
    (tmp_path / "run" / METRICS_FILE).touch()

    with pytest.raises(ConfigError, match=r"run holds another run: go on .*resume=auto`, choose another"):
        make_run_dir(config)


@pytest.mark.parametrize(("setting", "below"), [("run_dir", ""), ("run_dir", "run"), ("output_dir", "")])
def test_file_in_the_place_of_a_folder_is_refused(setting: str, below: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = TrainConfig.model_validate({setting: tmp_path / "file" / below})

    with pytest.raises(
        ConfigError, match=rf"file.* cannot be created \(.*\): choose another `train.{setting}`"
    ):
        make_run_dir(config)


# ---------------------------------------------------------------------------------------------------- JSONL


def test_jsonl_has_a_line_per_step_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    with tracker(tmp_path) as track:
        track.log(1, {"reward/mean": 0.5})
        assert rows(tmp_path) == [{"step": 1, "reward/mean": 0.5}], "a killed run loses nothing"
        track.log(2, {"reward/mean": 0.25, "eval/kl": 1e-9})

    assert rows(tmp_path) == [
        {"step": 1, "reward/mean": 0.5},
        {"step": 2, "reward/mean": 0.25, "eval/kl": 1e-9},
    ]


def test_what_is_no_number_becomes_null(tmp_path: Path) -> None:
    with tracker(tmp_path) as track:
        track.log(1, {"nan": math.nan, "inf": math.inf, "minus": -math.inf, "zero": 0.0})

    assert rows(tmp_path) == [{"step": 1, "nan": None, "inf": None, "minus": None, "zero": 0.0}]
    assert "NaN" not in (tmp_path / METRICS_FILE).read_text()


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with tracker(tmp_path, tensorboard=True, wandb=True) as track:
        track.log(1, {"reward/mean": 0.5})
        track.table("eval", 1, ["prompt"], [["a"]])

    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------- samples


def test_table_keeps_the_first_rows_and_any_text(tmp_path: Path) -> None:
    texts = [["a", 'quote " comma , line\nbreak é', 0.5], ["b", "", 1.0], ["c", "left out", 0.0]]
    with tracker(tmp_path, sample_rows=2) as track:
        track.table("eval", 7, ["prompt", "output", "reward"], texts)

    with (tmp_path / "samples" / "eval_000007.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["prompt", "output", "reward"],
            ["a", 'quote " comma , line\nbreak é', "0.5"],
            ["b", "", "1.0"],
        ]


def test_no_table_is_written_where_no_rows_are_wanted(tmp_path: Path) -> None:
    with tracker(tmp_path, sample_rows=0) as track:
        track.table("eval", 1, ["prompt"], [["a"]])

    assert not (tmp_path / "samples").exists()


# -------------------------------------------------------------------------------------------------- console


def test_without_a_terminal_a_line_tells_step_headline_and_pace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("conch"), "propagate", True)
    caplog.set_level(logging.INFO, "conch")
    with tracker(tmp_path) as track:
        track.log(0, {"eval/reward": 0.1, "eval/gold/reward": -2.0})
        track.log(1, {"reward/mean": 0.123456, "train/other": 9.0})

    first, second = (record.getMessage() for record in caplog.records)
    assert first.split() == ["test", "0/4", "evaluation", "reward", "0.1", "gold", "-2"]
    assert second.startswith("test 1/4 training  reward 0.1235  (") and second.endswith(" s left)")
    assert "other" not in second


# ------------------------------------------------------------------------------------------- other trackers


def test_tensorboard_files_hold_the_metrics(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tracker(tmp_path, tensorboard=True) as track:
        for step in (1, 2, 3):
            track.log(step, {"reward/mean": step / 4, "train/loss": math.nan})

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert all(math.isnan(event.value) for event in events.Scalars("train/loss"))


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard.writer"), ("wandb", "wandb")]
)
def test_missing_package_is_named(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(ConfigError, match=rf"`tracking.{name}` needs .* pip install -e '.*\[{name}\]'"):
        tracker(tmp_path, **{name: True})
    assert not (tmp_path / METRICS_FILE).exists(), "the folder must not look like that of a run"


WANDB_RUN = """
import sys
from pathlib import Path
from conch.config import TrackingConfig
from conch.runs.tracking import Tracker

with Tracker(Path(sys.argv[1]), TrackingConfig(wandb=True), total_steps=2, desc="test") as tracker:
    tracker.log(1, {"reward/mean": 0.5})
    tracker.log(2, {"reward/mean": float("nan")})
"""


def wandb_run(run_dir: Path, api_key: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: with nobody to answer questions, and no way to the network."""
    pytest.importorskip("wandb", reason="the package wandb is not installed")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    nobody = "http://127.0.0.1:9"
    away = {"HOME": str(run_dir), "HTTPS_PROXY": nobody, "HTTP_PROXY": nobody}
    return subprocess.run(
        [sys.executable, "-c", WANDB_RUN, str(run_dir)],
        env={**kept, **away, "WANDB_API_KEY": api_key, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_wandb_without_credentials_runs_offline_and_asks_nothing(tmp_path: Path) -> None:
    process = wandb_run(tmp_path, api_key="")

    assert process.returncode == 0, process.stderr
    [log] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"reward/mean" in log.read_bytes()
    assert len(rows(tmp_path)) == 2


def test_wandb_that_cannot_start_says_so_and_names_the_way_out(tmp_path: Path) -> None:
    last_line = wandb_run(tmp_path, api_key="too short").stderr.splitlines()[-1]

    assert last_line.startswith("conch.errors.ConfigError: `tracking.wandb` cannot start: ")
    assert last_line.endswith("WANDB_MODE=offline logs to the run folder alone")

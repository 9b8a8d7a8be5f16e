from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import create_trial

from conch.cli.sweeps.grammar import read_axes
from conch.cli.sweeps.pictures import draw_curves, draw_objective
from conch.cli.sweeps.record import Job, Record
from conch.cli.sweeps.report import best_job, failures, label_of, print_table, write_csv
from conch.cli.sweeps.results import (
    Curve,
    direction_of,
    falls_behind,
    last_error,
    objective,
    read_curve,
    read_rows,
)
from conch.cli.sweeps.settings import SweepConfig


def write_metrics(folder: Path, rows: list[dict[str, Any]], best: str | None = None, tail: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + tail)
    if best:
        (folder / "best_metric.txt").write_text(f"{best}\n")
    return folder


ROWS = [
    {"step": 0, "eval/gold": 9.0, "reward/mean": None},
    {"step": 1, "reward/mean": 0.5, "train/loss": 3.0},
    {"step": 2, "reward/mean": 0.75, "train/loss": 1, "eval/gold": 0.25},
    {"step": 3, "reward/mean": 0.625, "train/loss": 2.0, "eval/gold": None},
    {"step": 4, "reward/mean": 0.5, "eval/gold": 0.125},
]


def test_rows_of_a_run_that_is_writing_are_read_without_the_last(tmp_path: Path) -> None:
    folder = write_metrics(tmp_path, ROWS, tail='{"step": 5, "eval/go')
    assert read_rows(folder) == ROWS
    assert read_rows(tmp_path / "not begun") == []


@pytest.mark.parametrize(
    ("settings", "best", "metric", "points", "result"),
    [
        ({}, "eval/gold", "eval/gold", {2: 0.25, 4: 0.125}, (2, 0.25)),
        ({"metric_at": "last"}, "eval/gold", "eval/gold", {2: 0.25, 4: 0.125}, (4, 0.125)),
        ({"direction": "minimize"}, "eval/gold", "eval/gold", {2: 0.25, 4: 0.125}, (4, 0.125)),
        ({}, "eval/never", "reward/mean", {1: 0.5, 2: 0.75, 3: 0.625, 4: 0.5}, (4, 0.5)),
        ({}, None, "reward/mean", {1: 0.5, 2: 0.75, 3: 0.625, 4: 0.5}, (4, 0.5)),
        ({"metric": "train/loss"}, "eval/gold", "train/loss", {1: 3.0, 2: 1.0, 3: 2.0}, (3, 2.0)),
        (
            {"metric": "train/loss", "metric_at": "best"},
            None,
            "train/loss",
            {1: 3.0, 2: 1.0, 3: 2.0},
            (2, 1.0),
        ),
        ({"metric": "no/such"}, "eval/gold", "no/such", {}, None),
    ],
)
def test_objective_of_a_run(
    tmp_path: Path,
    settings: dict[str, Any],
    best: str | None,
    metric: str,
    points: dict[int, float],
    result: tuple[int, float] | None,
) -> None:
    config = SweepConfig.model_validate(settings)
    curve = read_curve(config, write_metrics(tmp_path, ROWS, best))
    assert curve == Curve(metric, points)
    assert objective(config, curve) == result


def test_of_equal_values_the_earlier_step_counts() -> None:
    assert objective(SweepConfig(), Curve("eval/x", {2: 0.5, 4: 0.5, 6: 0.25})) == (2, 0.5)


def test_direction_follows_the_name_unless_it_is_set() -> None:
    assert direction_of(SweepConfig(), "eval/loss") == "minimize"
    assert direction_of(SweepConfig(), "eval/reward") == "maximize"
    assert direction_of(SweepConfig(direction="maximize"), "eval/loss") == "maximize"


@pytest.mark.parametrize("metric", ["eval/reward", "eval/loss"])
def test_a_job_falls_behind_where_optunas_median_pruner_prunes(metric: str) -> None:
    chance = random.Random(metric)
    pruned = 0
    for _ in range(200):
        settings = SweepConfig(n_startup_trials=chance.randint(1, 4), n_warmup_steps=chance.choice([0, 0, 3]))
        finished = [_random_curve(chance, metric) for _ in range(chance.randint(0, 6))]
        curve = _random_curve(chance, metric)
        found = falls_behind(settings, curve, finished)
        assert found == _step_of_optuna(settings, curve, finished)
        pruned += found is not None
    assert 40 < pruned < 160


def _random_curve(chance: random.Random, metric: str) -> Curve:
    steps = sorted(chance.sample(range(1, 8), chance.randint(1, 7)))
    return Curve(metric, {step: chance.choice([chance.random(), 0.5]) for step in steps})


def _step_of_optuna(settings: SweepConfig, curve: Curve, finished: list[Curve]) -> int | None:
    pruner = optuna.pruners.MedianPruner(settings.n_startup_trials, settings.n_warmup_steps)
    study = optuna.create_study(direction=direction_of(settings, curve.metric), pruner=pruner)
    for other in finished:
        study.add_trial(create_trial(value=0.0, intermediate_values=dict(other.points)))
    trial = study.ask()
    for step, value in curve.points.items():
        trial.report(value, step)
        if trial.should_prune():
            return step
    return None


def test_last_words_of_a_failed_job_name_the_error(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("error: of the attempt before\n")
    start = log.stat().st_size
    assert last_error(log, 0) == "error: of the attempt before"
    with log.open("a") as file:
        file.write('step 1\nTraceback (most recent call last):\n  File "x"\nValueError: too far\nbye\n\n')
    assert last_error(log, start) == "ValueError: too far"
    log.write_text("error: of the attempt before\n$ program\nleft\n")
    assert last_error(log, start) == "left"
    log.write_text("torch.OutOfMemoryError: CUDA out of memory\nrank 0 left\n")
    assert last_error(log, 0) == "torch.OutOfMemoryError: CUDA out of memory"
    log.write_text("just words\n")
    assert last_error(log, 0) == "just words"
    assert last_error(tmp_path / "none", 0) == ""


def make_record(tmp_path: Path) -> Record:
    jobs = [
        Job(0, ("lr=0.1", "mode='a,b'", "fixed=1"), "x", "done", 61.25, 0, None, "eval/loss", 4, 0.5),
        Job(1, ("lr=0.01", "mode='a,b'", "fixed=1"), "y", "failed", 3.0, 1, error="error: no luck"),
        Job(2, ("lr=0.1", "mode=c", "fixed=1"), "z", "done", 3.0, 0, None, "eval/loss", 2, 0.25),
        Job(3, ("lr=0.01", "mode=c", "fixed=1"), "w", "pruned", 3.0, 143, 2, "eval/loss", 2, 0.125),
    ]
    return Record(tmp_path, "Toy", None, {job.number: job for job in jobs}, [0, 1, 2, 3])


def test_csv_has_a_row_for_each_job_and_a_column_for_each_swept_key(tmp_path: Path) -> None:
    axes = read_axes(["lr=0.1,0.01", "mode='a,b',c", "fixed=1"], [], seed=0)
    write_csv(make_record(tmp_path), axes)
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "job",
        "state",
        "lr",
        "mode",
        "metric",
        "value",
        "step",
        "seconds",
        "run_dir",
        "error",
    ]
    assert list(rows[0].values()) == ["0", "done", "0.1", "'a,b'", "eval/loss", "0.5", "4", "61.2", "0", ""]
    assert list(rows[1].values()) == [
        "1",
        "failed",
        "0.01",
        "'a,b'",
        "",
        "",
        "",
        "3.0",
        "1",
        "error: no luck",
    ]


def test_best_job_is_one_that_came_to_its_end(tmp_path: Path) -> None:
    jobs = make_record(tmp_path).current
    best, worst = best_job(jobs, minimize=True), best_job(jobs, minimize=False)
    assert best is jobs[2] and worst is jobs[0]
    assert best_job(jobs[1:2], minimize=True) is None


def test_table_and_failures_name_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    axes = read_axes(["lr=0.1,0.01", "mode='a,b',c", "fixed=1"], [], seed=0)
    record = make_record(tmp_path)
    print_table(record, axes, record.jobs[2])
    shown = capsys.readouterr().out
    assert "0.25 *" in shown and "eval/loss" in shown and "fixed" not in shown
    assert failures(record) == [f"job 1 failed (code 1): error: no luck; {tmp_path}/1/log.txt"]
    assert label_of(record.jobs[3], axes) == "lr=0.01 mode=c"


def test_pictures_are_drawn_of_numbers_and_of_names(tmp_path: Path) -> None:
    columns = {"lr": ["1e-4", "1e-2", "null"], "width": ["1", "100", "3"], "name": ["a", "b", "a"]}
    draw_objective(tmp_path / "objective.png", "eval/reward", columns, [1.0, 2.0, 3.0])
    draw_curves(tmp_path / "curves.png", "eval/reward", {"0: a": {1: 0.5, 2: 0.75}, "1: b": {}}, "0: a")
    for name in ("objective.png", "curves.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"

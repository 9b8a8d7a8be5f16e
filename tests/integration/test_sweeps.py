"""Sweeps of a program without torch, so that many can be afforded, and of a trainer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from conch.cli.sweeps.results import direction_of
from conch.cli.sweeps.settings import SweepConfig
from tests.fakes.sweep_program import ProgramConfig, value_at
from tests.integration.sweeps import (
    ROOT,
    TOY,
    assert_equal,
    finish,
    kill,
    metrics,
    processes_of,
    run,
    seen,
    start,
    states,
    steps,
    table,
    wait_for_end,
    wait_until,
)


def test_product_runs_each_job_once_in_its_own_process(tmp_path: Path) -> None:
    output = run(
        TOY,
        tmp_path / "s",
        "rate=0.1,0.01",
        "shape=glob([s*,f*])",
        "name='a,b'",
        "sweep.jobs=2",
        TOY_WORD="x",
    )
    rows = table(tmp_path / "s")
    assert [(row["rate"], row["shape"]) for row in rows] == [
        (rate, shape) for rate in ("0.1", "0.01") for shape in ("flat", "steep")
    ]
    for row in rows:
        powers = {"flat": 0.5, "steep": 2.0}
        config = ProgramConfig.model_validate({"rate": row["rate"], "shape": {"power": powers[row["shape"]]}})
        assert (
            float(row["value"]) == value_at(config, 4)
            and row["step"] == "4"
            and row["metric"] == "eval/height"
        )
        what = seen(tmp_path / "s" / row["job"])
        assert what["orig"][:3] == list(TOY) and "name='a,b'" in what["argv"] and what["TOY_WORD"] == "x"
        assert f"train.run_dir='{tmp_path}/s/{row['job']}'" in what["argv"]
    assert "job 2 done: eval/height" in output and "job 4" not in output
    assert {path.name for path in (tmp_path / "s").iterdir()} == {
        *(str(number) for number in range(4)),
        *("multirun.yaml", "sweep.json", "sweep.csv", "objective.png", "curves.png", ".lock"),
    }


def test_program_that_is_a_file_is_started_as_one_from_where_the_user_stands(tmp_path: Path) -> None:
    program = tmp_path / "my program.py"
    program.write_text("import sys\nfrom tests.fakes.sweep_program import main\nmain(sys.argv[1:])\n")
    run((sys.executable, "-u", str(program)), tmp_path / "s", "rate=1")
    what = seen(tmp_path / "s" / "0")
    assert what["orig"][:3] == [sys.executable, "-u", str(program)] and "rate=1" in what["argv"]


def test_sweep_of_nothing_is_one_job_in_a_folder_below_multirun(tmp_path: Path) -> None:
    finish(start(TOY, None, "sweep.threads=3", cwd=tmp_path))
    (folder,) = (tmp_path / "multirun").glob("*-*-*/*-*-*")
    assert states(folder) == ["done"] and seen(folder / "0")["OMP_NUM_THREADS"] == "3"


def test_every_job_is_validated_before_the_first_one_starts(tmp_path: Path) -> None:
    output = run(TOY, tmp_path / "s", "rate=0.1", "width=1,2,wide", code=1)
    assert "error: job 2 of the sweep (rate=0.1 width=wide)" in output and "`width`" in output
    assert not (tmp_path / "s" / "0").exists()


def test_a_failed_job_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    output = run(TOY, folder, "fail_at=2,null", "name=a", code=1)
    assert states(folder) == ["failed", "done"]
    assert f"job 0 failed (code 1): ValueError: step 2 was not to be; {folder}/0/log.txt" in output
    assert "go on with: " in output and f"sweep.dir={folder}" in output
    again = run(TOY, folder, "fail_at=2,null", "name=a", code=1)
    assert "1 jobs are finished and skipped, 1 go on" in again and "job 0 failed" in again
    assert "begins after step 1" in (folder / "0" / "log.txt").read_text()


def test_no_more_jobs_start_after_a_failure_where_that_is_asked_for(tmp_path: Path) -> None:
    run(TOY, tmp_path / "s", "fail_at=2,null,3", "sweep.stop_on_failure=true", code=1)
    assert states(tmp_path / "s") == ["failed", "waiting", "waiting"]


def test_finished_jobs_are_skipped_and_another_configuration_gets_another_number(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    run(TOY, folder, "rate=0.1,0.01")
    before = {number: (folder / number / "metrics.jsonl").stat().st_mtime_ns for number in "01"}
    output = run(TOY, folder, "rate=1,0.01,0.1")
    assert [(row["job"], row["rate"]) for row in table(folder)] == [("2", "1"), ("1", "0.01"), ("0", "0.1")]
    assert "2 jobs are finished and skipped" in output
    assert before == {number: (folder / number / "metrics.jsonl").stat().st_mtime_ns for number in "01"}
    other = run(TOY, folder, "rate=0.1", "train.total_steps=2")
    assert "3 jobs of other configurations stay" in other
    assert [row["job"] for row in table(folder)] == ["3"] and steps(folder / "0") == 5


def test_killed_parent_takes_its_jobs_along_and_goes_on_when_started_again(tmp_path: Path) -> None:
    words = ["rate=0.1,0.01", "train.total_steps=8", "pause_s=0.1", "sweep.jobs=2"]
    folder = tmp_path / "s"
    process = start(TOY, folder, *words)
    assert wait_until(lambda: steps(folder / "1") >= 4, process)
    kill(process)
    wait_for_end(folder)
    assert 4 <= steps(folder / "1") < 9
    assert "2 go on where they were" in run(TOY, folder, *words)
    for job, rate in enumerate((0.1, 0.01)):
        assert "begins after step 0" not in (folder / f"{job}/log.txt").read_text().partition("begins")[2]
        values = [row["eval/height"] for row in metrics(folder / str(job))]
        assert values == [value_at(ProgramConfig(rate=rate), step) for step in range(9)]
        assert float(table(folder)[job]["value"]) == values[-1]


@pytest.mark.slow
def test_jobs_that_outlive_their_guard_and_parent_are_waited_for(tmp_path: Path) -> None:
    words = ["rate=0.1,1", "train.total_steps=3", "pause_s=1.5"]
    process = start(TOY, tmp_path / "s", *words)
    assert wait_until(lambda: steps(tmp_path / "s" / "0") >= 1, process)
    children = psutil.Process(process.pid).children()
    (guard,) = [child for child in children if any("guard.py" in word for word in child.cmdline())]
    guard.kill()
    kill(process)
    assert processes_of(tmp_path / "s"), "the kernel's SIGTERM lets the job finish its step"
    output = run(TOY, tmp_path / "s", *words)
    assert "waiting for 1 processes of the sweep that was here before" in output
    assert states(tmp_path / "s") == ["done", "done"] and steps(tmp_path / "s" / "0") == 4


def test_killed_job_is_started_again(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    process = start(TOY, folder, "rate=0.1,1", "train.total_steps=6", "pause_s=0.2", "sweep.retries=1")
    for step in (3, 5):
        assert wait_until(lambda step=step: steps(folder / "0") >= step, process)
        (job,) = processes_of(folder)
        job.kill()
    output = finish(process)
    assert output.count("job 0 was killed (code -9)") == 2 and states(folder) == ["done", "done"]


@pytest.mark.slow
def test_job_that_is_killed_without_getting_any_further_fails(tmp_path: Path) -> None:
    process = start(TOY, tmp_path / "t", "rate=0.1,1", "train.total_steps=2", "pause_s=5", "sweep.retries=1")
    for _ in range(2):
        assert wait_until(lambda: bool(processes_of(tmp_path / "t")), process)
        (job,) = processes_of(tmp_path / "t")
        job.kill()
        psutil.wait_procs([job], timeout=30)
        assert wait_until(lambda job=job: job not in processes_of(tmp_path / "t"), process)
    assert wait_until(lambda: steps(tmp_path / "t" / "1") > 0, process)
    process.send_signal(signal.SIGTERM)
    assert "job 0 failed (code -9)" in finish(process, 143)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_sweep_that_is_told_to_leave_lets_jobs_save_and_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    folder = tmp_path / "s"
    words = ["rate=0.1,1", "train.total_steps=8", "pause_s=0.2"]
    process = start(TOY, folder, *words)
    assert wait_until(lambda: steps(folder / "0") >= 3, process)
    process.send_signal(number)
    output = finish(process, code)
    assert states(folder) == ["stopped", "waiting"] and "Traceback" not in output
    line = next(line for line in output.splitlines() if line.startswith("go on with: "))
    assert line.endswith(f"-m tests.fakes.sweep_program --multirun {' '.join(words)} sweep.dir={folder}")
    state = json.loads((folder / "0" / "state.json").read_text())["step"]
    assert state == steps(folder / "0") - 1
    assert not processes_of(folder)
    run(TOY, folder, *words)
    assert states(folder) == ["done", "done"]
    assert f"begins after step {state}" in (folder / "0" / "log.txt").read_text()


@pytest.mark.slow
def test_second_sweep_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    process = start(TOY, tmp_path / "s", "rate=0.1,1", "pause_s=0.5")
    assert wait_until(lambda: steps(tmp_path / "s" / "0") >= 1, process)
    output = run(TOY, tmp_path / "s", "rate=0.1,1", code=1)
    assert f"error: another sweep is at work in {tmp_path}/s (process {process.pid} on " in output
    finish(process)


def test_jobs_at_once_have_gpus_of_their_own(tmp_path: Path) -> None:
    words = ["rate=0.1,0.2,0.3", "pause_s=0.1", "sweep.jobs=2"]
    output = run(TOY, tmp_path / "s", *words, CUDA_VISIBLE_DEVICES="4,5,6,7")
    assert "job 0 started (rate=0.1) on GPU 4,5" in output
    assert {seen(tmp_path / "s" / str(job))["CUDA_VISIBLE_DEVICES"] for job in range(3)} == {"4,5", "6,7"}
    refused = run(TOY, tmp_path / "t", "rate=1,2", "sweep.jobs=2", CUDA_VISIBLE_DEVICES="0", code=1)
    assert "error: sweep.jobs=2 jobs at once need 2 GPUs, there is 1" in refused


def test_launcher_starts_each_job(tmp_path: Path) -> None:
    run(TOY, tmp_path / "s", "sweep.launcher=env TOY_WORD=launched python")
    assert seen(tmp_path / "s" / "0")["TOY_WORD"] == "launched"


@pytest.mark.slow
def test_job_saves_though_its_launcher_dies_of_the_signal(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    launcher = "sweep.launcher=sh -c 'python \"$@\"; exit $?' sh"
    process = start(TOY, folder, "rate=0.1,1", "train.total_steps=30", "pause_s=0.3", launcher)
    assert wait_until(lambda: steps(folder / "0") >= 3, process)
    process.send_signal(signal.SIGTERM)
    finish(process, 143)
    assert states(folder) == ["stopped", "waiting"] and not processes_of(folder)
    assert "and leaves" in (folder / "0" / "log.txt").read_text()


def test_sweep_inside_of_a_launcher_is_refused(tmp_path: Path) -> None:
    output = run(TOY, tmp_path / "s", "rate=0.1,1", WORLD_SIZE="2", RANK="0", code=1)
    assert "error: --multirun stands outside of torchrun" in output and "sweep.launcher=" in output


SEARCH = ["rate=tag(log,interval(1e-4,10))", "width=range(1,4)", "sweep.trials=7", "train.total_steps=4"]


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_search_goes_on_as_if_nothing_had_been(tmp_path: Path, jobs: int) -> None:
    calm, storm = tmp_path / "calm", tmp_path / "storm"
    words = [*SEARCH, f"sweep.jobs={jobs}", "sweep.prune=median", "sweep.n_startup_trials=2"]
    run(TOY, calm, *words)
    process = start(TOY, storm, *words)
    assert wait_until(lambda: steps(storm / "4") >= 1, process)
    kill(process)
    run(TOY, storm, *words)
    assert_equal(storm, calm)
    assert set(states(calm)) == {"done", "pruned"}
    values = [float(row["value"]) for row in table(calm)]
    assert direction_of(SweepConfig(), "eval/height") == "maximize" and max(values) > 0.5


def test_pruned_job_is_stopped_where_it_falls_behind(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    words = ["rate=0.1,1e-4,0.15", "train.total_steps=24", "pause_s=0.1", "sweep.prune=median"]
    words += ["sweep.n_startup_trials=1", "sweep.n_warmup_steps=3"]
    output = run(TOY, folder, *words)
    assert states(folder) == ["done", "pruned", "pruned"], output
    assert [row["step"] for row in table(folder)] == ["24", "3", "3"]
    assert steps(folder / "1") < 25 and steps(folder / "2") < 25


def test_search_of_another_space_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    words = ["width=1,2,3", "sweep.trials=2", "train.total_steps=1"]
    run(TOY, tmp_path / "s", *words)
    more = run(TOY, tmp_path / "s", *words[:1], "sweep.trials=9", words[2])
    assert "2 jobs are finished and skipped" in more and states(tmp_path / "s") == ["done"] * 3
    output = run(TOY, tmp_path / "s", *words, "sweep.seed=5", code=1)
    assert "is another one (seed changed)" in output


@pytest.mark.parametrize("file", [".lock", "sweep.csv"])
def test_a_file_that_cannot_be_written_ends_the_sweep_with_a_sentence(tmp_path: Path, file: str) -> None:
    """At its start, and once a job has ended; a folder in the file's place stands for a disk that refuses."""
    (tmp_path / "s" / file).mkdir(parents=True)
    (tmp_path / "s" / "sweep.json").write_text(
        '{"format": 1, "program": "ProgramConfig", "search": null, "chosen": [], "jobs": []}'
    )
    output = run(TOY, tmp_path / "s", "rate=0.1,1", "train.total_steps=1", code=1)
    assert "error: the sweep cannot go on: " in output and "Is a directory" in output
    assert f"sweep.dir={tmp_path / 's'} goes on with it" in output and "Traceback" not in output


def test_plan_is_printed_and_nothing_done(tmp_path: Path) -> None:
    output = run(TOY, tmp_path / "s", "rate=0.1,1", "width=range(1,3)", "--print-config")
    assert output == "0: rate=0.1 width=1\n1: rate=0.1 width=2\n2: rate=1 width=1\n3: rate=1 width=2\n"
    assert not (tmp_path / "s").exists()


def test_help_says_what_a_sweep_takes(tmp_path: Path) -> None:
    output = run(TOY, tmp_path / "s", "--help")
    assert "-m, --multirun" in output and "sweep.devices_per_job: int | None" in output
    alone = subprocess.run([*TOY, "sweep.jobs=2"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert alone.returncode == 1 and "error: keys sweep.* say how a sweep runs: add -" in alone.stderr

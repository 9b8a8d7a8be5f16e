"""`conch.runs.load`: what a run left on disk, as plain Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import conch
import conch.runs
from conch.errors import DataError
from conch.evaluation.records import EvaluatedSample, EvaluationRecord, record_path, write_record
from conch.runs.reading import as_text
from conch.runs.state import METRICS_FILE
from tests.runs import PROMPTS, ppo_trainer


def write_metrics(folder: Path, *rows: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of PPO with gold, evaluations and rollouts kept."""
    folder = tmp_path_factory.mktemp("runs") / "ppo"
    trainer = ppo_trainer(
        folder,
        gold=lambda outputs, **_: [float(len(output)) for output in outputs],
        train={"eval_every": 2, "eval_repeats": 2},
        tracking={"rollouts": True},
    )
    trainer.fit()
    return folder


def test_a_real_run_gives_settings_state_and_metrics(real_run: Path) -> None:
    run = conch.runs.load(str(real_run))

    assert run.algorithm == "ppo"
    assert run.settings["train"]["total_steps"] == 4 and run.settings["ppo"]["minibatches"] == 1
    rows = run.metrics()
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[0].keys() >= {"eval/reward", "eval/gold/reward"} and "reward/mean" not in rows[0]
    summary = run.summary
    assert (run.state, summary.step, summary.total_steps) == ("finished", 4, 4)
    assert summary.metric == "eval/gold/reward"
    golds = {row["step"]: row["eval/gold/reward"] for row in rows if "eval/gold/reward" in row}
    assert summary.best == max(golds.values()) and golds[summary.best_step or 0] == summary.best
    assert 4 in run.checkpoints and run.checkpoints[4].name == "step_4"


def test_a_real_run_gives_samples_of_evaluations_and_rollouts(real_run: Path) -> None:
    run = conch.runs.load(real_run)
    evaluated, rollouts = run.samples(source="evaluation"), run.samples(source="rollout", step=1)

    assert len(evaluated) == 3 * len(PROMPTS) * 2 and len(rollouts) == 8
    assert {row["step"] for row in evaluated} == {0, 2, 4}
    assert all(row["gold"] == len(row["output"]) and row["prompt"] in PROMPTS for row in evaluated)
    first = rollouts[0]
    assert first["reward"] == sum(letter in "ae" for letter in first["output"])
    assert (first["status"], first["finish_reason"]) == ("ok", rollouts[0]["finish_reason"])
    assert run.samples() == [*run.samples(source="evaluation"), *run.samples(source="rollout")]


def test_frames_have_the_same_numbers(real_run: Path) -> None:
    run = conch.runs.load(real_run)
    metrics, samples = run.metrics_frame(), run.samples_frame(source="evaluation")

    assert list(metrics.index) == [0, 1, 2, 3, 4] and metrics.index.name == "step"
    assert metrics.loc[4, "reward/mean"] == run.metrics()[4]["reward/mean"]
    assert len(samples) == 48 and samples["gold"].mean() == samples["output"].str.len().mean()


def test_frame_of_a_run_without_samples_is_empty(tmp_path: Path) -> None:
    frame = conch.runs.load(write_metrics(tmp_path, {"step": 1})).samples_frame()

    assert len(frame) == 0 and {"prompt", "output"} <= {*frame.columns}


def test_reading_loads_no_torch(real_run: Path) -> None:
    program = (
        f"import sys, conch; run = conch.runs.load({str(real_run)!r}); run.samples(); run.state; "
        "print([name for name in ('torch', 'transformers', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_a_folder_that_is_no_run_is_named_with_the_one_that_is_meant(tmp_path: Path) -> None:
    run = write_metrics(tmp_path / "outputs/a", {"step": 1})
    (run / "checkpoints/step_1").mkdir(parents=True)

    with pytest.raises(DataError, match=f"there is no folder .*output; did you mean {tmp_path}/outputs"):
        conch.runs.load(tmp_path / "output")
    with pytest.raises(DataError, match=f"it has no {METRICS_FILE}; the newest run below it is {run}$"):
        conch.runs.load(tmp_path)
    with pytest.raises(DataError, match=f"lies in one: give {run}$"):
        conch.runs.load(run / "checkpoints/step_1")


def test_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    path = write_metrics(tmp_path, {"step": 1, "a": 1.0}) / METRICS_FILE
    for half in (b'{"step": 2, "a"', b'{"step": 2, "text": "\xc3'):
        path.write_bytes(b'{"step": 1, "a": 1.0}\n' + half)
        assert conch.runs.load(tmp_path).metrics() == [{"step": 1, "a": 1.0}]


@pytest.mark.parametrize("line", [b'{"step": 11, "rew', b"7", b'{"reward/mean": 1}', b"\xff\xfe"])
def test_damaged_line_within_a_file_is_named(line: bytes, tmp_path: Path) -> None:
    path = write_metrics(tmp_path, {"step": 1}) / METRICS_FILE
    path.write_bytes(path.read_bytes() + line + b'\n{"step": 3}\n')

    with pytest.raises(DataError, match=f"line 2 of {path} is damaged: .*; delete that line"):
        conch.runs.load(tmp_path).metrics()


def test_half_written_rollouts_and_tables_lose_their_last_row(tmp_path: Path) -> None:
    run = write_metrics(tmp_path, {"step": 1})
    for folder in ("rollouts", "samples"):
        (run / folder).mkdir()
    rows = [{"prompt": "p", "output": str(k), "reward_status": "ok", "scores": {"reward": k}} for k in (1, 2)]
    (run / "rollouts/step_1.jsonl").write_text("\n".join(json.dumps(row) for row in rows)[:-5])
    (run / "samples/eval_000000.csv").write_text('prompt,output,reward,gold/reward\np,"two\nlines",1.5,\np,o')

    assert [row["output"] for row in conch.runs.load(run).samples(source="rollout")] == ["1"]
    [row] = conch.runs.load(run).samples(source="table")
    assert (row["output"], row["reward"], row["gold"], row["step"]) == ("two\nlines", 1.5, None, 0)


def test_table_of_a_kept_evaluation_does_not_come_twice(tmp_path: Path) -> None:
    run = write_metrics(tmp_path, {"step": 1})
    (run / "samples").mkdir()
    for step in (0, 10):
        (run / f"samples/eval_{step:06d}.csv").write_text("prompt,output,reward\np,o,1\n")
    sample = EvaluatedSample(0, [{"role": "user", "content": "hi"}], "yo", 2, {"reward": 1.0, "gold": 2.0})
    write_record(record_path(run, 10), EvaluationRecord(10, (sample,)))

    rows = conch.runs.load(run).samples()
    assert [(row["source"], row["step"]) for row in rows] == [("evaluation", 10), ("table", 0)]
    assert (rows[0]["prompt"], rows[0]["gold"]) == ("user: hi", 2.0)


def test_reward_of_a_rollout_is_weighed_as_the_run_weighs_it(tmp_path: Path) -> None:
    run = write_metrics(tmp_path, {"step": 1})
    (run / "config.yaml").write_text("reward: {weights: {a: 2.0, m: 3.0}}\n")
    (run / "rollouts").mkdir()
    lines = [
        {"output": "x", "reward_status": "ok", "scores": {"a": 1.0, "m/b": 1.0, "c": 0.5}},
        {"output": "y", "reward_status": "timeout", "scores": {}},
        {"output": "z", "reward_status": "ok", "scores": {}, "token_scores": [0.5, 1.0]},
    ]
    (run / "rollouts/step_1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    rows = conch.runs.load(run).samples()
    assert [row["reward"] for row in rows] == [5.5, None, 1.5]
    assert rows[0]["objective/m/b"] == 1.0 and rows[1]["status"] == "timeout"


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    (write_metrics(tmp_path) / "config.yaml").write_text("train: [")

    with pytest.raises(DataError, match=f"{tmp_path}/config.yaml is damaged"):
        _ = conch.runs.load(tmp_path).settings


def test_messages_are_shown_as_text() -> None:
    parts = [{"type": "text", "text": "é"}]
    text = as_text([{"role": "system", "content": "Be kind."}, {"role": "user", "content": parts}])

    assert text == 'system: Be kind.\n\nuser: [{"type": "text", "text": "é"}]'

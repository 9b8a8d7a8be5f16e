"""Sweeps of trainers: `conch train`, launchers inside a sweep, one reward function for all jobs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.integration.sweeps import (
    LETTERS,
    assert_equal,
    kill,
    metrics,
    run,
    start,
    states,
    steps,
    table,
    wait_for_end,
    wait_until,
)
from tests.launches import CONFIGS
from tests.tiny import char_tokenizer, tiny_gpt2_config

SHORT = ["optimizer.learning_rate=1e-3,1e-2", "train.total_steps=4"]


def test_conch_train_is_swept_and_each_job_is_a_run_of_its_own(tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    tokenizer = char_tokenizer("abcd")
    GPT2LMHeadModel(tiny_gpt2_config(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ("abcd", "bcda", "cdab", "dabc"))
    (tmp_path / "rows.jsonl").write_text(rows)
    data = [f"data.train={tmp_path}/rows.jsonl", f"data.eval={tmp_path}/rows.jsonl", "sft.batch_size=4"]
    model = [f"model.path={tmp_path}/model", "tokenizer.pad_token='<pad>'", "train.total_steps=3"]
    program = (sys.executable, "-m", "conch", "train", "sft")
    run(program, tmp_path / "s", *data, *model, "scheduler=constant,linear", "sweep.jobs=2")
    found = table(tmp_path / "s")
    assert [(row["scheduler"], row["state"], row["metric"]) for row in found] == [
        ("constant", "done", "eval/loss"),
        ("linear", "done", "eval/loss"),
    ]
    for row in found:
        losses = [
            line["eval/loss"] for line in metrics(tmp_path / "s" / row["job"])[1:] if "eval/loss" in line
        ]
        assert float(row["value"]) == min(losses)
        assert (tmp_path / "s" / row["job"] / "checkpoints" / "step_3").is_dir()


@pytest.mark.slow
def test_trainer_that_is_swept_and_killed_equals_one_that_was_not(tmp_path: Path) -> None:
    calm, storm = tmp_path / "calm", tmp_path / "storm"
    run(LETTERS, calm, *SHORT)
    assert {row["metric"] for row in table(calm)} == {"eval/reward"}
    process = start(LETTERS, storm, *SHORT)
    assert wait_until(lambda: steps(storm / "0") >= 3, process)
    kill(process)
    run(LETTERS, storm, *SHORT)
    assert_equal(storm, calm)


@pytest.mark.slow
def test_ranks_of_a_launcher_end_with_the_sweep_that_started_them(tmp_path: Path) -> None:
    calm, storm = tmp_path / "calm", tmp_path / "storm"
    words = [*SHORT, "sweep.jobs=2", "train.num_processes=2", "sweep.launcher='torchrun --nproc_per_node 2'"]
    run(LETTERS, calm, *words, ACCELERATE_USE_CPU="true")
    assert states(calm) == ["done", "done"]
    process = start(LETTERS, storm, *words, ACCELERATE_USE_CPU="true")
    assert wait_until(lambda: steps(storm / "0") >= 2, process)
    kill(process)
    wait_for_end(storm)
    assert steps(storm / "0") < 5 or steps(storm / "1") < 5
    run(LETTERS, storm, *words, ACCELERATE_USE_CPU="true")
    assert_equal(storm, calm)


@pytest.mark.slow
def test_accelerate_launches_jobs_side_by_side(tmp_path: Path) -> None:
    launcher = f"sweep.launcher='accelerate launch --config_file {CONFIGS}/cpu.yaml'"
    run(LETTERS, tmp_path / "s", *SHORT, "sweep.jobs=2", launcher)
    assert states(tmp_path / "s") == ["done", "done"]

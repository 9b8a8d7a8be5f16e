"""Sweeps of trainers: `conch train`, launchers inside a sweep, one reward function or served model for all
jobs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from conch.rewards.replay import REWARDS_FILE, sha256_of_sample
from conch.triton.contract import RewardModelSpec
from tests.fakes.triton_server import FakeTriton
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


def test_jobs_share_a_served_reward_model_which_outlives_those_that_end(tmp_path: Path) -> None:
    """A job of one step and one of three, at once: each has the scores of its own samples."""
    lengths, completions = (1, 3), 4 * 4
    words = ["train.total_steps=1,3", "sweep.jobs=2", "train.eval_every=0", "reward.record=true"]
    with FakeTriton(RewardModelSpec("rm"), lambda text: [float(text.count("a"))]) as served:
        run(LETTERS, tmp_path / "s", *words, f"reward.url={served.url}")
    assert states(tmp_path / "s") == ["done", "done"]
    # Each job asks for a probe before it begins, and for equal samples once.
    sent = [text for rows in served.requests for text in rows]
    assert max(lengths) * completions / 2 < len(sent) <= sum(lengths) * completions + len(lengths)
    expected = {sha256_of_sample(text): float(text.count("a")) for text in sent}
    for job, steps_of_job in enumerate(lengths):
        file = tmp_path / "s" / str(job) / REWARDS_FILE
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [line["status"] for line in lines] == ["ok"] * completions * steps_of_job
        assert [line["scores"]["reward"] for line in lines] == [
            expected[line["sample_sha256"]] for line in lines
        ]
        for step, logged in enumerate(metrics(tmp_path / "s" / str(job)), start=1):
            scores = [line["scores"]["reward"] for line in lines if line["step"] == step]
            assert logged["reward/failed_fraction"] == 0
            assert logged["reward/mean"] == pytest.approx(sum(scores) / completions)


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

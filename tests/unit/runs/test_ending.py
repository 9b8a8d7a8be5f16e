"""What is said at the end of a run."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from conch.cli.run_config import parse_override
from conch.runs.ending import Ending, ending_text


def ending(folder: Path, **changed: Any) -> Ending:
    """Of a PPO run of 4 steps, saved in `checkpoints/best`."""
    checkpoint = folder / "checkpoints" / "best"
    checkpoint.mkdir(parents=True, exist_ok=True)
    whole = Ending(
        folder=folder,
        algorithm="ppo",
        step=4,
        total_steps=4,
        best=("eval/reward", 0.5, 2),
        checkpoint=checkpoint,
        from_files=True,
        has_evaluations=True,
    )
    return dataclasses.replace(whole, **changed)


def lines(end: Ending) -> dict[str, str]:
    head, *rows = ending_text(end).splitlines()
    assert head == f"{end.algorithm}: {end.step} of {end.total_steps} steps are done"
    return {row[:14].strip(): row[14:] for row in rows}


def test_finished_run_names_best_checkpoint_report_and_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    resume = "train.resume=runs/a train.total_steps=8"
    assert lines(ending(tmp_path / "runs" / "a")) == {
        "best": "eval/reward 0.5 at step 2",
        "checkpoint": "runs/a/checkpoints/best",
        "report": "conch report runs/a",
        "train on": f"conch ppo --config-dir runs/a --config-name config {resume}",
        "evaluate": "conch gold-eval runs/a GOLD",
        "load": "AutoModelForCausalLM.from_pretrained('runs/a/checkpoints/best')",
    }


def test_stopped_run_is_resumed_to_the_end_it_was_to_have(tmp_path: Path) -> None:
    said = lines(ending(tmp_path, step=3, algorithm="async_grpo"))
    command = f"conch async-grpo --config-dir {tmp_path} --config-name config train.resume={tmp_path}"
    assert said["resume"] == command and "train on" not in said


def test_run_that_its_own_rule_ended_is_not_sent_on(tmp_path: Path) -> None:
    said = lines(ending(tmp_path, step=3, stopped_early=True))
    assert not {"resume", "train on"} & said.keys() and "load" in said


def test_run_without_a_checkpoint_offers_nothing_that_needs_one(tmp_path: Path) -> None:
    said = lines(ending(tmp_path, step=1, checkpoint=None, best=None))
    assert said == {"checkpoint": "none was saved", "report": f"conch report {tmp_path}"}


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"from_files": False}, "the same call with train.resume={} and train.total_steps=8 in its config"),
        ({"num_processes": 2}, "the same command with train.resume={} train.total_steps=8"),
    ],
    ids=["Python", "launched"],
)
def test_run_that_no_plain_command_started_is_resumed_as_it_was_started(
    changed: dict[str, Any], text: str, tmp_path: Path
) -> None:
    assert lines(ending(tmp_path, **changed))["train on"] == text.format(tmp_path)


def test_reward_model_is_converted_and_start_that_was_best_is_said(tmp_path: Path) -> None:
    said = lines(ending(tmp_path, algorithm="reward_model", best=("eval/loss", 0.25, 0)))
    assert said["serve"] == f"conch convert --checkpoint {tmp_path} --name NAME" and "evaluate" not in said
    assert said["best"] == "eval/loss 0.25 at step 0, before training"


@pytest.mark.parametrize(
    ("file", "content", "loader"),
    [
        ("config.json", {"architectures": ["GPT2LMHeadModel"]}, "AutoModelForCausalLM"),
        ("config.json", {"is_encoder_decoder": True}, "AutoModelForSeq2SeqLM"),
        (
            "config.json",
            {"architectures": ["GPT2ForSequenceClassification"]},
            "AutoModelForSequenceClassification",
        ),
        ("adapter_config.json", {"task_type": "SEQ_2_SEQ_LM"}, "AutoModelForSeq2SeqLM"),
    ],
)
def test_checkpoint_is_loaded_by_the_class_that_it_is_of(
    file: str, content: dict[str, Any], loader: str, tmp_path: Path
) -> None:
    end = ending(tmp_path)
    assert end.checkpoint is not None
    (end.checkpoint / file).write_text(json.dumps(content))
    assert lines(end)["load"].startswith(f"{loader}.from_pretrained(")


@pytest.mark.parametrize("name", ["my run", "it's, here", "a=b"])
def test_folder_with_an_odd_name_reaches_hydra_through_a_shell(name: str, tmp_path: Path) -> None:
    words = shlex.split(lines(ending(tmp_path / name))["train on"])
    assert words[3] == str(tmp_path / name)
    assert parse_override(words[-2]).value() == str(tmp_path / name)

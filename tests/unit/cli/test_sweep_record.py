from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from conch.cli.sweeps import record as records
from conch.cli.sweeps.processes import FolderLock
from conch.cli.sweeps.record import (
    Record,
    choose,
    digest_of,
    make_folder,
    read_record,
    reset_unfinished,
    write_hydra_files,
)
from conch.errors import ConfigError
from conch.training import resume
from examples.grpo.settings import ExampleConfig


def wanted(*names: str) -> list[tuple[tuple[str, ...], str]]:
    return [((f"lr={name}",), f"digest of {name}") for name in names]


def test_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = Record(tmp_path, "Toy")
    choose(record, wanted("1", "2"))
    record.jobs[0].state, record.jobs[0].value = "done", 0.1
    record.save()
    assert read_record(tmp_path, "Toy") == record


def test_jobs_of_another_command_keep_their_numbers_by_their_configuration(tmp_path: Path) -> None:
    record = Record(tmp_path, "Toy")
    choose(record, wanted("1", "2", "3"))
    assert record.chosen == [0, 1, 2]
    choose(record, wanted("3", "4", "1", "5"))
    assert record.chosen == [2, 3, 0, 4]
    assert [job.overrides for job in record.current] == [("lr=3",), ("lr=4",), ("lr=1",), ("lr=5",)]
    assert record.jobs[1].overrides == ("lr=2",)


def test_the_same_configuration_twice_is_two_jobs(tmp_path: Path) -> None:
    record = Record(tmp_path, "Toy")
    choose(record, wanted("1", "1", "2"))
    assert record.chosen == [0, 1, 2]
    choose(record, wanted("1", "1", "1"))
    assert record.chosen == [0, 1, 3]


def test_new_job_takes_no_folder_that_is_somebody_elses(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    record = Record(tmp_path, "Toy")
    choose(record, wanted("1", "2"))
    assert record.chosen == [0, 2]


def test_only_jobs_with_a_result_are_skipped_when_a_sweep_goes_on(tmp_path: Path) -> None:
    record = Record(tmp_path, "Toy")
    choose(record, wanted(*"123456"))
    states = ["done", "pruned", "failed", "running", "stopped", "waiting"]
    for job, state in zip(record.current, states, strict=True):
        job.state = state  # pyright: ignore[reportAttributeAccessIssue]
    reset_unfinished(record)
    assert [job.state for job in record.current] == ["done", "pruned", *["waiting"] * 4]


def test_digest_differs_where_something_else_is_learned_and_nowhere_else() -> None:
    config = {
        "train": {"seed": 1, "run_dir": "a", "output_dir": "b"},
        "reward": {"url": "x:1/m", "scale": 2.0},
    }
    moved = {
        "train": {"seed": 1, "run_dir": "c", "output_dir": "d"},
        "reward": {"url": "y:1/m", "scale": 2.0},
    }
    other = {**config, "train": {**config["train"], "seed": 2}}
    assert digest_of(config) == digest_of(moved) != digest_of(other)


def test_what_a_resumed_run_may_change_is_no_other_job_unless_results_depend_on_it() -> None:
    decide = {"train.total_steps", "train.eval_every", "train.eval_repeats", "train.best_metric"}
    decide |= {"train.early_stopping", "train.stop_when", "reward.members.", "reward.replay", "evaluation."}
    decide |= {"reward.judge.budget"}  # what is above it has no reward
    assert set(resume._FREE_KEYS) - set(records._FREE_KEYS) == decide


def test_jobs_of_the_grpo_example_are_known_however_often_they_save() -> None:
    moved = {"train.checkpoint_frequency": 5, "train.keep_checkpoints": 2, "logging.wandb": True}
    before, after = ExampleConfig().model_dump(mode="json"), ExampleConfig().model_dump(mode="json")
    for name, value in moved.items():
        section, key = name.split(".")
        after[section][key] = value
    assert digest_of(before) == digest_of(after)


def test_folder_is_made_new_twice_in_one_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = {make_folder(None) for _ in range(3)}
    assert len(folders) == 3
    assert {len(folder.relative_to(tmp_path / "multirun").parts) for folder in folders} == {2}


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"holds no sweep \(no sweep\.json\)"):
        make_folder(tmp_path)


def test_folder_of_a_sweep_that_was_killed_at_its_start_is_taken(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("")
    assert make_folder(tmp_path) == tmp_path.resolve()
    assert read_record(tmp_path, "Toy") == Record(tmp_path, "Toy")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ("is damaged",)),
        ('{"format": 1, "program": "Toy"}', ("is damaged",)),
        ('{"format": 9}', ("has format 9",)),
        ('{"format": 1, "program": "PPORunConfig", "jobs": []}', ("PPORunConfig", "Toy")),
    ],
)
def test_record_that_is_none_of_ours_is_refused(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_record(tmp_path, "Toy")
    assert [word for word in (*words, "sweep.dir") if word not in str(caught.value)] in ([], ["sweep.dir"])


def test_two_sweeps_in_one_folder_are_refused_and_a_closed_one_lets_the_next_in(tmp_path: Path) -> None:
    refused = pytest.raises(ConfigError, match=r"another sweep is at work.*process \d+")
    with FolderLock(tmp_path), refused, FolderLock(tmp_path):
        pass
    with FolderLock(tmp_path):
        pass


def test_files_of_hydra_are_those_that_its_users_look_for(tmp_path: Path) -> None:
    record = Record(tmp_path, "Toy")
    choose(record, wanted("1"))
    write_hydra_files(record, record.jobs[0], {"train": {"seed": 1}}, "toy")
    folder = tmp_path / "0" / ".hydra"
    content = {file.stem: yaml.safe_load(file.read_text()) for file in folder.iterdir()}
    assert content["config"] == {"train": {"seed": 1}} and content["overrides"] == ["lr=1"]
    assert content["hydra"]["hydra"]["job"]["num"] == 0
    assert json.dumps(content)

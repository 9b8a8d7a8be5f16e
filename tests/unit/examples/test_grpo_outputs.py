"""Files and prompts of the GRPO example."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel

from conch.config import RewardConfig, load
from conch.data.files import place_of
from conch.errors import CheckpointError, DataError
from conch.runs.checkpoint import steps_of
from examples.grpo.outputs import complete_torch_checkpoints, write_hydra_files, write_torch_checkpoint
from examples.grpo.prompts import TAGS, form_asked_for, read_prompts
from examples.grpo.settings import EnvSettings, ExampleConfig
from tests.runs import grpo_trainer, policy

DATA = Path(__file__).resolve().parents[4] / "shared/data"
ASKED = "Think."
PROBLEM = {"question": "What is 1 + 2?", "answer": "1 + 2 = 3\n#### 3"}
TASK = {
    "key": 7,
    "prompt": "Write in lower case.",
    "instruction_id_list": ["change_case:english_lowercase"],
    "kwargs": [{}],
}


def run_with_checkpoints(folder: Path, **settings: Any) -> Path:
    """A run of four steps that writes both forms of checkpoints."""
    trainer = grpo_trainer(folder, train={"save_every": 1, **settings})
    trainer.run.on_saved = write_torch_checkpoint
    trainer.fit()
    trainer.close()
    return trainer.run_dir


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a run, which nobody changes."""
    return run_with_checkpoints(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run", symlinks=True)


def test_files_that_a_killed_run_has_not_come_to_write_are_written_when_it_goes_on(run: Path) -> None:
    folder = run / "checkpoints"
    content = torch.load(folder / "checkpoint_3.pt", weights_only=True)
    kept = (folder / "checkpoint_4.pt").stat().st_mtime_ns
    (folder / "checkpoint_3.pt").unlink()
    (folder / ".checkpoint_3.pt.partial").touch()
    complete_torch_checkpoints(folder.parent)
    written = torch.load(folder / "checkpoint_3.pt", weights_only=True)
    assert written.keys() == content.keys() and written["step"] == 3
    assert (folder / "checkpoint_4.pt").stat().st_mtime_ns == kept
    assert not (folder / ".checkpoint_3.pt.partial").exists()


def test_a_checkpoint_holds_all_and_loads_as_weights_alone(run: Path) -> None:
    content = torch.load(run / "checkpoints/checkpoint_4.pt", weights_only=True)
    assert content["step"] == 4
    assert content["config"]["train"]["save_every"] == 1
    assert content["scaler"] is None  # nothing computes in fp16 on a CPU
    assert len(content["optimizer"]["state"]) == len(content["model"])
    # the model's own names and values
    saved: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        run / "checkpoints/step_4", dtype=torch.float64
    )
    fresh = policy(seed=9)
    missing, unexpected = fresh.load_state_dict(content["model"], strict=False)
    fresh.tie_weights()
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    ids = torch.tensor([[0, 3, 2]])
    assert torch.equal(fresh.eval()(ids).logits, saved.eval()(ids).logits)


def test_old_files_go_with_their_checkpoints(tmp_path: Path) -> None:
    leftover = tmp_path / "run/checkpoints/.checkpoint_1.pt.partial"  # of a run that was killed
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    run = run_with_checkpoints(tmp_path / "run", keep_last=2)
    files = {int(path.stem.removeprefix("checkpoint_")) for path in (run / "checkpoints").glob("*.pt")}
    assert files == set(steps_of(run)) == {3, 4}
    assert not leftover.exists()


def test_a_file_that_cannot_be_written_is_an_error_and_leaves_nothing(run: Path) -> None:
    step = run / "checkpoints/step_4"
    (run / "checkpoints/checkpoint_4.pt").unlink()
    (run / "checkpoints/checkpoint_4.pt").mkdir()
    with pytest.raises(CheckpointError, match=r"checkpoint_4.pt cannot be written"):
        write_torch_checkpoint(step)
    assert not list((run / "checkpoints").glob(".*.partial"))
    (step / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged"):
        write_torch_checkpoint(step)


def test_a_fault_of_the_callback_ends_the_run(tmp_path: Path) -> None:
    def refuse(folder: Path) -> None:
        raise CheckpointError(f"nothing fits beside {folder.name}")

    trainer = grpo_trainer(tmp_path / "run", train={"save_every": 1})
    trainer.run.on_saved = refuse
    with pytest.raises(CheckpointError, match="nothing fits beside step_1"):
        trainer.fit()
    assert set(steps_of(trainer.run_dir)) == {1}  # whole by then


def test_hydra_files_hold_settings_and_words(tmp_path: Path) -> None:
    config = load(ExampleConfig, {"optimizer": {"lr": 3e-5}})
    write_hydra_files(tmp_path, config, ["optimizer.lr=3e-5", "--config-name", "grpo_gsm8k"], "grpo_gsm8k")
    content = {path.stem: yaml.safe_load(path.read_text()) for path in (tmp_path / ".hydra").glob("*.yaml")}
    assert content.keys() == {"config", "overrides", "hydra"}
    assert load(ExampleConfig, content["config"]) == config
    assert content["overrides"] == ["optimizer.lr=3e-5"]
    assert content["hydra"]["hydra"]["job"]["config_name"] == "grpo_gsm8k"
    assert content["hydra"]["hydra"]["run"]["dir"] == str(tmp_path)


# --------------------------------------------------------------------------------------------------- prompts


def rows_in(path: Path, *rows: Any) -> str:
    """A file of these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("has_template", [True, False])
@pytest.mark.parametrize(
    ("dataset", "row", "version", "tags", "kept"),
    [
        ("gsm8k", PROBLEM, "share", TAGS, {"answer"}),
        ("ifeval", TASK, "torchrl", TAGS, {"key", "instruction_id_list", "kwargs"}),
        ("ifeval", TASK, "share", TAGS[:2], {"key", "instruction_id_list", "kwargs"}),
    ],
)
def test_prompts_ask_for_tags_and_keep_what_is_checked(
    tmp_path: Path,
    dataset: str,
    row: dict[str, Any],
    version: str,
    tags: tuple[str, ...],
    kept: set[str],
    has_template: bool,
) -> None:
    env = load(EnvSettings, {"dataset": dataset, "data": rows_in(tmp_path / "rows.jsonl", row)})
    asked = form_asked_for(dataset, load(RewardConfig, {"ifeval": {"version": version}}))
    (made,), held_out = read_prompts(env, asked, has_template=has_template, evaluates=False)
    text = made["prompt"][0]["content"] if has_template else made["prompt"]
    assert held_out is None
    assert (row.get("question") or row["prompt"]) in text
    assert [tag for tag in TAGS if tag in text] == list(tags)
    assert ("number" in text) == (dataset == "gsm8k")
    assert made.keys() == {"prompt"} | kept
    assert all(made[name] == row[name] for name in kept)


def test_the_last_tenth_is_held_out_where_nothing_else_is_named(tmp_path: Path) -> None:
    rows = [{**PROBLEM, "question": f"What is {number} + 2?"} for number in range(30)]
    env = load(EnvSettings, {"data": rows_in(tmp_path / "rows.jsonl", *rows)})
    trained, held_out = read_prompts(env, ASKED, has_template=False, evaluates=True)
    assert held_out is not None and (len(trained), len(held_out)) == (27, 3)
    assert not {row["prompt"] for row in trained} & {row["prompt"] for row in held_out}
    assert place_of(trained, 2, "prompt").endswith("rows.jsonl line 3"), "messages name the file's line"
    assert place_of(held_out, 0, "prompt").endswith("rows.jsonl line 28")
    other = env.model_copy(update={"eval_data": rows_in(tmp_path / "other.jsonl", PROBLEM)})
    trained, held_out = read_prompts(other, ASKED, has_template=False, evaluates=True)
    assert held_out is not None and (len(trained), len(held_out)) == (30, 1)
    with pytest.raises(DataError, match="9 prompts are too few to keep a tenth"):
        read_prompts(env.model_copy(update={"max_rows": 9}), ASKED, has_template=False, evaluates=True)


@pytest.mark.parametrize(
    ("dataset", "row", "message"),
    [
        ("gsm8k", {"answer": "#### 3"}, "has no text `question`"),
        ("gsm8k", {"question": "What?"}, "has no `answer`"),
        ("ifeval", {**TASK, "kwargs": None}, "has no `kwargs`"),
    ],
)
def test_rows_of_something_else_are_refused(
    tmp_path: Path, dataset: str, row: dict[str, Any], message: str
) -> None:
    env = load(EnvSettings, {"dataset": dataset, "data": rows_in(tmp_path / "rows.jsonl", row)})
    with pytest.raises(DataError, match=message):
        read_prompts(env, ASKED, has_template=False, evaluates=False)


@pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data here")
@pytest.mark.parametrize(("dataset", "file"), [("gsm8k", "gsm8k/train"), ("ifeval", "ifeval/prompts")])
def test_all_published_rows_are_prompts(dataset: str, file: str) -> None:
    path = DATA / f"{file}.jsonl.gz"
    with gzip.open(path) as lines:
        number = sum(1 for _ in lines)
    env = load(EnvSettings, {"dataset": dataset, "data": str(path)})
    prompts, _ = read_prompts(env, ASKED, has_template=True, evaluates=False)
    assert len(prompts) == number

from __future__ import annotations

from pathlib import Path

import pytest

from conch.errors import ModelError
from conch.models.folders import model_folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with checkpoints after steps 9 and 10."""
    for step in (9, 10):
        (tmp_path / f"runs/sft/checkpoints/step_{step}").mkdir(parents=True)
    return tmp_path / "runs/sft"


def test_a_run_stands_for_its_best_checkpoint_and_else_for_its_last(run: Path) -> None:
    assert model_folder(str(run), "model.path") == str(run / "checkpoints/step_10")
    (run / "checkpoints/best").symlink_to("step_9")
    assert model_folder(str(run), "model.path") == str(run / "checkpoints/best")


def test_a_folder_of_a_model_and_a_run_without_checkpoints_stay_what_they_are(run: Path) -> None:
    last = run / "checkpoints/step_10"
    (last / "config.json").write_text("{}")
    assert model_folder(str(last), "model.path") == str(last)
    (run / "config.json").write_text("{}")
    assert model_folder(str(run), "model.path") == str(run)
    assert model_folder(str(run.parent), "model.path") == str(run.parent)


@pytest.mark.parametrize("name", ["gpt2", "EleutherAI/pythia-1.4b-deduped"])
def test_names_of_the_hub_are_left_to_it(name: str) -> None:
    assert model_folder(name, "model.path") == name


def test_a_missing_best_checkpoint_says_why_and_what_to_take(run: Path) -> None:
    with pytest.raises(ModelError, match=f"no evaluation was better.*start; {run} takes its last one"):
        model_folder(str(run / "checkpoints/best"), "model.path")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("runs/stf", r"`model\.path` = runs/stf: there is no such folder; did you mean runs/sft\?"),
        ("runs/stf/checkpoints/step_9", r"did you mean runs/sft/checkpoints/step_9\?"),
        ("runs/ppo/checkpoints/best", r"\(runs/ppo does not exist in /"),
        ("./gpt2", r"there is no such folder \(gpt2 does not exist in /"),
        ("../elsewhere/model", r"\(\.\./elsewhere does not exist in"),
        ("file/model", r"file is a file"),
    ],
)
def test_a_path_that_can_be_no_hub_name_is_refused_at_once(
    path: str, message: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parents[1])
    Path("file").write_text("")
    with pytest.raises(ModelError, match=message):
        model_folder(path, "model.path")


def test_a_home_is_found(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(run.parent))
    assert model_folder("~/sft", "model.path") == str(run / "checkpoints/step_10")

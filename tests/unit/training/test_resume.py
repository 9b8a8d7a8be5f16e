"""What is refused of a run's folder before anything is started."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from conch.errors import CheckpointError, ConfigError
from conch.training.checkpointing import save_checkpoint
from tests.launches import free_port
from tests.runs import async_grpo_trainer, grpo_trainer


def nobody() -> dict[str, Any]:
    """A sampler that is away: whoever asks it gets another error than that of the folder."""
    return {"urls": f"127.0.0.1:{free_port()}"}


def test_folder_that_cannot_be_gone_on_with_is_told_before_samplers_are_asked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"`train.resume` = .*nowhere: there is no such folder"):
        grpo_trainer(tmp_path / "run", rollout=nobody(), train={"resume": str(tmp_path / "nowhere")})


def test_run_of_another_algorithm_or_configuration_is_told_before_samplers_are_asked(tmp_path: Path) -> None:
    with closing(grpo_trainer(tmp_path / "run")) as trainer:
        trainer.run.step = 1
        save_checkpoint(trainer)
        folder = trainer.run_dir
    for resume in ("auto", str(folder), str(folder / "checkpoints" / "step_1")):
        go_on = {"rollout": nobody(), "train": {"resume": resume}}
        with pytest.raises(CheckpointError, match="is of a GRPORunConfig"):
            async_grpo_trainer(folder, **go_on)
        with pytest.raises(CheckpointError, match=r"another configuration: grpo\.clip_low was 0\.2, is 0\.1"):
            grpo_trainer(folder, grpo={"clip_low": 0.1}, **go_on)


def test_folder_of_another_run_is_told_before_samplers_are_asked(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"holds another run: go on with it by `train.resume=auto`"):
        grpo_trainer(tmp_path, rollout=nobody())

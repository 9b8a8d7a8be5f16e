"""What is refused of a run's folder before anything is started."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from conch.errors import CheckpointError, ConfigError, RewardInvalidError
from conch.training.checkpointing import save_checkpoint
from tests.fakes.judge_server import judge_server
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


@pytest.mark.parametrize("in_members", [False, True])
def test_file_of_a_judge_must_say_the_same_when_a_run_is_resumed(tmp_path: Path, in_members: bool) -> None:
    file = tmp_path / "judge.yaml"
    with judge_server() as server:

        def write(**keys: Any) -> None:
            file.write_text(json.dumps({"url": server.url, "model": "judge", **keys}))

        write()
        named = {"members": {"a": f"judge:{file}"}} if in_members else {"judge": {"file": str(file)}}
        of_judge: dict[str, Any] = {"reward_fn": None, "reward": named}
        with closing(grpo_trainer(tmp_path / "run", **of_judge)) as trainer:
            trainer.run.step = 1
            save_checkpoint(trainer)
        write(number_range=[0, 100])
        with pytest.raises(CheckpointError, match=r"content has changed \(of `reward.judge.file`"):
            grpo_trainer(tmp_path / "run", **of_judge, train={"resume": "auto"})
        write(request_timeout_s=50.0)
        grpo_trainer(tmp_path / "run", **of_judge, train={"resume": "auto"}).close()


def test_resumed_run_goes_on_from_what_its_judge_has_cost(tmp_path: Path) -> None:
    with judge_server(usage=(1_000_000, 1)) as server:
        judge = {"url": server.url, "model": "judge", "price_in": 1.0, "cache_size": 0}
        of_judge = {"reward_fn": None, "reward": {"judge": judge}}
        with closing(grpo_trainer(tmp_path / "run", **of_judge)) as trainer:
            trainer.step()
            trainer.run.step = 1
            save_checkpoint(trainer)
            spent = len(server.bodies)
            assert trainer.source.costs() == (spent,) and spent > 1
        judge["budget"] = spent + 0.5
        with closing(grpo_trainer(tmp_path / "run", **of_judge, train={"resume": "auto"})) as trainer:
            assert trainer.source.costs() == (spent + 1,), "and the trial"
            with pytest.raises(RewardInvalidError, match="the budget of"):
                trainer.step()
            assert len(server.bodies) == spent + 1
            assert trainer.scorer.metrics()["judge/cost_total"] == spent + 1

"""Runs that stop and go on: exact, from whole checkpoints only, and never from another run's."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch

from conch.config import load
from conch.errors import CheckpointError, ConfigError, DataError
from conch.runs.checkpoint import Checkpoint, checkpoint_bytes, newest_checkpoint, read_checkpoint, steps_of
from conch.trainers.reward_model import RewardModelRunConfig, RewardModelTrainer
from conch.training.checkpointing import save_checkpoint
from conch.training.loop import Run
from conch.training.resume import _check_same
from tests.clock import CLOCK
from tests.runs import PROMPTS, TOKENIZER, parameters, policy, ppo_trainer, sft_trainer, vowels
from tests.tiny import tiny_gpt2_config

SAMPLES = ["abcd", "bc", "hgf", "aab", "cde", "fgh", "ab", "ed", "ccc", "dh"]
SCORED = [{"text": text, "score": float(len(text))} for text in SAMPLES]
TRAIN = {"total_steps": 6, "eval_every": 2, "save_every": 2, "max_grad_norm": 1.0}


def ppo(run_dir: Path, forward_batch_size: int = 3, **train: Any) -> Any:
    return ppo_trainer(
        run_dir,
        train={**TRAIN, **train},
        optimizer={"learning_rate": 5e-3},
        scheduler={"name": "cosine", "warmup_updates": 3},
        ppo={
            "epochs": 2,
            "minibatches": 2,
            "kl": {"target": 0.1, "horizon": 100},
            "forward_batch_size": forward_batch_size,
        },
        shaping={"scaling": "running"},
        # More than one pass over the data does not divide into steps: the position matters.
        prompts=PROMPTS[:7],
    )


def sft(run_dir: Path, **train: Any) -> Any:
    settings: dict[str, Any] = {"optimizer": {"learning_rate": 5e-3}, "scheduler": {"name": "linear"}}
    return sft_trainer(run_dir, SAMPLES, eval_samples=SAMPLES[:4], train={**TRAIN, **train}, **settings)


def reward_model(run_dir: Path, **train: Any) -> Any:
    values = {
        "model": {"architecture": {**tiny_gpt2_config(TOKENIZER).to_diff_dict(), "model_type": "gpt2"}},
        "optimizer": {"learning_rate": 5e-3},
        "reward_model": {"batch_size": 8},
        "train": {**TRAIN, "run_dir": run_dir, **train},
    }
    return RewardModelTrainer(
        load(RewardModelRunConfig, values), samples=SCORED, eval_samples=SCORED[:5], tokenizer=TOKENIZER
    )


KINDS = pytest.mark.parametrize("make", [ppo, sft, reward_model])


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """Rows without what the clock measures."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(CLOCK)} for row in rows]


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def interrupt_after(run_dir: Path, step: int) -> None:
    """Leave a finished run as a kill just before its next save would have left it."""
    for saved, folder in steps_of(run_dir).items():
        if saved > step:
            shutil.rmtree(folder)


@KINDS
def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path: Path, make: Callable[..., Any]) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    make(whole).fit()
    make(cut).fit()
    interrupt_after(cut, 2)
    resumed = make(cut, resume="auto")
    assert resumed.run.step == 2 and resumed.run_dir == cut
    resumed.fit()
    assert metrics_of(cut) == metrics_of(whole)
    assert [row["step"] for row in metrics_of(cut)] == list(range(7))
    assert weights(cut / "checkpoints/step_6") == weights(whole / "checkpoints/step_6") != {}


@KINDS
def test_a_resumed_trainer_is_not_a_new_one(tmp_path: Path, make: Callable[..., Any]) -> None:
    trained = make(tmp_path / "run")
    trained.fit()
    resumed, new = make(tmp_path / "run", resume="auto"), make(tmp_path / "new")
    found, fresh = (parameters(trainer.engine.unwrapped) for trainer in (resumed, new))
    assert torch.equal(found, parameters(trained.engine.unwrapped)) and not torch.equal(found, fresh)


def test_the_reference_of_a_resumed_run_is_the_start_of_the_first(tmp_path: Path) -> None:
    trained = ppo(tmp_path / "run", forward_batch_size=350)
    trained.fit()
    expected = trained.evaluate(repeats=50)["eval/kl"]
    resumed = ppo(tmp_path / "run", forward_batch_size=350, resume="auto").evaluate(repeats=50)["eval/kl"]
    assert expected > 0.05
    assert resumed == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "state"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    sft(tmp_path / "run").fit()
    file = tmp_path / "run/checkpoints/step_6/state/model.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    else:
        (tmp_path / "run/checkpoints/step_6/trainer_state.json").write_text("{")
    found = newest_checkpoint(tmp_path / "run")
    assert found is not None and found.step == 4
    assert "going back to the one before" in caplog.text and "step_6" in caplog.text
    assert sft(tmp_path / "run", resume="auto").run.step == 4
    with pytest.raises(CheckpointError, match=r"step_6"):
        sft(tmp_path / "run", resume=str(tmp_path / "run/checkpoints/step_6"))


def test_leftovers_of_a_kill_are_no_checkpoints_and_are_removed(tmp_path: Path) -> None:
    sft(tmp_path / "run").fit()
    checkpoints = tmp_path / "run/checkpoints"
    (checkpoints / "step_6").rename(checkpoints / ".step_6.partial")
    trainer = sft(tmp_path / "run", resume="auto")
    assert trainer.run.step == 4
    assert not (checkpoints / ".step_6.partial").exists()


def test_auto_starts_anew_where_there_is_nothing(tmp_path: Path) -> None:
    trainer = sft(tmp_path / "run", resume="auto")
    assert trainer.run.step == 0 and not trainer.run.continued
    trainer.fit()
    # Killed before its first save: its metrics are made again.
    shutil.rmtree(tmp_path / "run/checkpoints")
    sft(tmp_path / "run", resume="auto").fit()
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == list(range(7))


def test_auto_takes_the_newest_run_below_the_output_folder(tmp_path: Path) -> None:
    for time in ("2026-01-02/10-00-00", "2026-01-03/09-00-00"):
        sft(tmp_path / time).fit()
    trainer = sft_trainer(
        Path("unused"),
        SAMPLES,
        train={**TRAIN, "run_dir": None, "output_dir": tmp_path, "resume": "auto"},
        optimizer={"learning_rate": 5e-3},
        scheduler={"name": "linear"},
    )
    assert trainer.run_dir == tmp_path / "2026-01-03/09-00-00"


def test_a_chosen_checkpoint_is_gone_on_with(tmp_path: Path) -> None:
    sft(tmp_path / "run").fit()
    trainer = sft(tmp_path / "elsewhere", resume=str(tmp_path / "run/checkpoints/step_2"))
    assert trainer.run.step == 2 and trainer.run_dir == tmp_path / "run"
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": {"seed": 1}}, r"train\.seed was 0, is 1"),
        ({"sft": {"batch_size": 4}}, r"sft\.batch_size was 8, is 4"),
        ({"reward": {"client": {"batch_rows": 1}}}, r"reward\.client\.batch_rows was 64, is 1"),
        ({"reward": {"auth": {"secret_env": "S"}}}, r"reward\.auth\.secret_env was None, is 'S'"),
        ({"reward": {"failure": {"max_fraction": 1}}}, r"reward\.failure\.max_fraction was 0\.1, is 1"),
        ({"optimizer": {"betas": [0.5, 0.6]}}, r"optimizer\.betas was \[0\.9, 0\.95\], is \[0\.5, 0\.6\]"),
    ],
)
def test_another_configuration_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    sft_trainer(tmp_path / "run", SAMPLES, train={"total_steps": 1}).fit()
    train = {"total_steps": 1, "resume": "auto", **settings.pop("train", {})}
    with pytest.raises(CheckpointError, match=message):
        sft_trainer(tmp_path / "run", SAMPLES, train=train, **settings)
    assert len(metrics_of(tmp_path / "run")) == 1


def test_another_algorithm_data_or_model_is_refused(tmp_path: Path) -> None:
    sft_trainer(tmp_path / "run", SAMPLES, train={"total_steps": 1}).fit()
    again = {"total_steps": 1, "resume": "auto"}
    with pytest.raises(CheckpointError, match=r"of a SFTRunConfig, this run is a PPORunConfig"):
        ppo_trainer(tmp_path / "run", train=again)
    with pytest.raises(DataError, match=r"had 10 rows of data, here are 3"):
        sft_trainer(tmp_path / "run", SAMPLES[:3], train=again)
    with pytest.raises(DataError, match=r"had other rows of data than these 10"):
        sft_trainer(tmp_path / "run", [*SAMPLES[:9], "hhh"], train=again)
    with pytest.raises(CheckpointError, match=r"does not fit this model.*size mismatch"):
        sft_trainer(tmp_path / "run", SAMPLES, lm=policy(n_embd=16), train=again)


@pytest.mark.parametrize("resume", ["nowhere", "empty"])
def test_nothing_to_go_on_with_is_an_error(tmp_path: Path, resume: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=resume):
        sft(tmp_path / "run", resume=str(tmp_path / resume))


def test_a_run_to_go_on_with_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints/step_6").mkdir(parents=True)
    for slip, meant in (("rnu", "run"), ("run/checkpoints/step_7", "run/checkpoints/step_6")):
        with pytest.raises(CheckpointError, match=rf"no such folder; did you mean {tmp_path}/{meant}\?"):
            sft(tmp_path / "run", resume=str(tmp_path / slip))


@pytest.mark.parametrize("total_steps", [6, 4])
def test_a_run_that_is_done_says_that_there_is_nothing_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, total_steps: int
) -> None:
    sft(tmp_path / "run").fit()
    assert "nothing to do" not in caplog.text
    sft(tmp_path / "run", resume="auto", total_steps=total_steps).fit()
    assert f"run has done 6 steps, and train.total_steps={total_steps}: raise that" in caplog.text
    caplog.clear()
    sft(tmp_path / "run", resume="auto", total_steps=8)
    assert "nothing to do" not in caplog.text


def test_how_rewards_are_asked_for_may_change_on_resume(tmp_path: Path) -> None:
    sft_trainer(tmp_path / "run", SAMPLES, train={"total_steps": 1}).fit()
    client = {"connect_timeout_s": 1, "request_timeout_s": 1, "deadline_s": 1, "max_in_flight": 1}
    reward = {
        "client": {**client, "timeout_per_1k_tokens_s": 1},
        "auth": {"headers_env": {"a": "B"}},
        "failure": {
            "policy": "wait",
            "wait_budget_s": 1,
            "checkpoint_after_s": 1,
            "on_model_change": "warn",
        },
    }
    again = {"total_steps": 1, "resume": "auto"}
    assert sft_trainer(tmp_path / "run", SAMPLES, train=again, reward=reward).run.step == 1


def test_settings_that_change_nothing_learned_may_change(tmp_path: Path) -> None:
    sft(tmp_path / "run").fit()
    trainer = sft(tmp_path / "run", resume="auto", save_every=5, total_steps=8)
    trainer.fit()
    assert set(steps_of(tmp_path / "run")) >= {8}
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == list(range(9))


def test_a_full_disk_is_told_before_a_checkpoint_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = sft(tmp_path / "run", eval_every=0, save_every=1)
    trainer.fit()
    usage = shutil.disk_usage(tmp_path)
    needed = checkpoint_bytes(trainer.engine.unwrapped)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    before = sorted((tmp_path / "run/checkpoints").iterdir())
    with pytest.raises(CheckpointError, match=r"not enough disk space for a checkpoint"):
        save_checkpoint(trainer)
    assert sorted((tmp_path / "run/checkpoints").iterdir()) == before


# -------------------------------------------------------------------------------- best, last, and the end


class Scripted:
    """A metric that goes through given values, one per evaluation."""

    def __init__(self, values: Sequence[float]) -> None:
        self._values = iter(values)

    def __call__(self, samples: Sequence[str], **_: Any) -> dict[str, float]:
        return {"gold": next(self._values)}


def scripted(run_dir: Path, values: Sequence[float], **train: Any) -> Any:
    trainer = ppo_trainer(
        run_dir, metric_fn=Scripted(values), train={"total_steps": 5, "eval_every": 1, **train}
    )
    trainer.fit()
    return trainer


def test_the_best_checkpoint_is_kept_and_linked(tmp_path: Path) -> None:
    run = tmp_path / "run"
    scripted(run, [0.1, 0.3, 0.9, 0.2, 0.4, 0.5], keep_last=1, save_every=1)
    assert set(steps_of(run)) == {2, 5}
    assert (run / "checkpoints/best").resolve() == run / "checkpoints/step_2"
    assert read_checkpoint((run / "checkpoints/best").resolve()).state["run"]["best"] == pytest.approx(0.9)


def test_a_former_best_that_was_not_due_goes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    scripted(run, [0.1, 0.2, 0.3, 0.4, 0.1, 0.1])
    assert set(steps_of(run)) == {3, 5}


def test_keep_last_keeps_so_many(tmp_path: Path) -> None:
    scripted(tmp_path / "run", [0.5, 0.4, 0.3, 0.2, 0.1, 0.0], keep_last=2, save_every=1)
    assert set(steps_of(tmp_path / "run")) == {4, 5}
    assert not (tmp_path / "run/checkpoints/best").exists()


def test_early_stopping_waits_in_vain_as_long_as_told(tmp_path: Path) -> None:
    trainer = scripted(tmp_path / "run", [0.1, 0.5, 0.4, 0.3, 0.9, 0.9], early_stopping=2)
    assert trainer.run.step == 3
    assert set(steps_of(tmp_path / "run")) == {1, 3}


def test_a_loss_is_better_when_lower_and_nan_never() -> None:
    run = Run(Path("x"))
    assert [
        run.note(step, "eval/loss", value) for step, value in enumerate([2.0, float("nan"), 1.0, 1.5])
    ] == [
        True,
        False,
        True,
        False,
    ]
    assert (run.best, run.best_step, run.worse) == (1.0, 2, 1)


def test_an_unknown_best_metric_is_refused(tmp_path: Path) -> None:
    trainer = ppo_trainer(tmp_path / "run", train={"eval_every": 1, "best_metric": "eval/glod"})
    with pytest.raises(
        ConfigError,
        match=r"eval/glod is no evaluation metric; there are: eval/kl, eval/length_mean, eval/reward",
    ):
        trainer.fit()


def test_sigterm_saves_the_step_and_leaves_with_its_code(tmp_path: Path) -> None:
    calls: list[int] = []

    def reward(outputs: list[str], **_: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return vowels(outputs)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        ppo_trainer(tmp_path / "run", reward_fn=reward).fit()
    assert left.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert set(steps_of(tmp_path / "run")) == {2}
    ppo_trainer(tmp_path / "run", train={"resume": "auto"}).fit()
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2, 3, 4]


def test_ctrl_c_saves_the_step_and_goes_on_as_after_sigterm(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def reward(outputs: list[str], **_: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return vowels(outputs)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        ppo_trainer(tmp_path / "run", reward_fn=reward).fit()
    assert "Ctrl-C: finishing the step, to save it" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) == before
    assert set(steps_of(tmp_path / "run")) == {2}
    ppo_trainer(tmp_path / "run", train={"resume": "auto"}).fit()
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    def reward(outputs: list[str], **_: Any) -> list[float]:
        for _again in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            sleep(1.0)  # two that come at once are one
        return vowels(outputs)

    with pytest.raises(KeyboardInterrupt):
        ppo_trainer(tmp_path / "run", reward_fn=reward).fit()
    assert not steps_of(tmp_path / "run")


def test_a_setting_that_an_older_checkpoint_does_not_know_was_as_runs_were_then(tmp_path: Path) -> None:
    config = ppo_trainer(tmp_path).config
    saved = config.model_dump(mode="json")
    for section, key in (
        ("generation", "stop_token_ids"),
        ("model", "trial"),
        ("tokenizer", "add_special_tokens"),
    ):
        del saved[section][key]
    checkpoint = Checkpoint(tmp_path, {"algorithm": type(config).__name__, "config": saved})
    with pytest.raises(CheckpointError, match=r"tokenizer\.add_special_tokens was False, is True\."):
        _check_same(checkpoint, config)
    plain = config.model_copy(
        update={"tokenizer": config.tokenizer.model_copy(update={"add_special_tokens": False})}
    )
    _check_same(checkpoint, plain)
    _check_same(
        checkpoint, plain.model_copy(update={"model": plain.model.model_copy(update={"trial": False})})
    )

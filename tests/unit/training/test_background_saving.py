"""Checkpoints that are written beside training: the same bytes, whole or not there, and never forgotten."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from conch.errors import CheckpointError
from conch.runs.checkpoint import FILES_FILE, newest_checkpoint, read_checkpoint, state_text, steps_of
from conch.training import checkpointing
from conch.training.overlap.saving import BackgroundWrite, Target
from conch.training.overlap.snapshots import Snapshot
from tests.clock import CLOCK
from tests.runs import ppo_trainer, vowels
from tests.unit.training.test_run import KINDS, Scripted

LONGEST_S = 30.0
RANDOM = Path("state/random_states_0.pkl")


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_clock(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if not name.startswith(CLOCK)} for row in rows]


@KINDS
def test_they_are_the_bytes_that_training_would_have_waited_for(
    tmp_path: Path, make: Callable[..., Any]
) -> None:
    beside, waiting = tmp_path / "beside", tmp_path / "waiting"
    make(beside).fit()
    make(waiting, save_in_background=False).fit()
    assert without_clock(rows_of(beside)) == without_clock(rows_of(waiting))
    for step in (2, 4, 6):
        one, other = (folder / f"checkpoints/step_{step}" for folder in (beside, waiting))
        assert read_checkpoint(one).state["run"] == read_checkpoint(other).state["run"]
        names = {path.relative_to(other) for path in other.rglob("*") if path.is_file()}
        assert {path.relative_to(one) for path in one.rglob("*") if path.is_file()} == names
        assert Path("state/optimizer.bin") in names and RANDOM in names
        # The state has the run's folder in it; of the random states see below.
        for name in names - {Path("trainer_state.json"), Path(FILES_FILE), RANDOM}:
            assert content(one / name) == content(other / name), (step, name)
        # Not Python's: beartype, in tests alone, draws from it to check elements of lists.
        drawn, expected = (torch.load(folder / RANDOM, weights_only=False) for folder in (one, other))
        assert torch.equal(drawn["torch_manual_seed"], expected["torch_manual_seed"])
        assert str(drawn["numpy_random_seed"]) == str(expected["numpy_random_seed"])


def content(file: Path) -> bytes | dict[str, bytes]:
    """Bytes; of torch's archives those of each member. Their inner folder has the name of the file, which a
    snapshot does not tell torch; it goes into their id, too."""
    if not zipfile.is_zipfile(file):
        return file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    return {name: data for name, data in members.items() if name != ".data/serialization_id"}


class Disk:
    """Stands in for a slow disk: `os.fsync` waits until `let_go` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.let_go = threading.Event()
        self.was_let_go: list[bool] = []
        sync = os.fsync

        def slow(descriptor: int) -> None:
            self.was_let_go.append(self.let_go.wait(LONGEST_S))
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", slow)


def calling_in_step(number: int, call: Callable[[], object]) -> Callable[..., list[float]]:
    """A reward that calls something in the step of this number."""
    steps: list[int] = []

    def reward(outputs: list[str], **_: Any) -> list[float]:
        steps.append(1)
        if len(steps) == number:
            call()
        return vowels(outputs)

    return reward


def test_training_goes_on_meanwhile_and_the_time_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    reward = calling_in_step(3, disk.let_go.set)
    trainer = ppo_trainer(tmp_path / "run", reward_fn=reward, train={"save_every": 2, "total_steps": 5})
    trainer.fit()
    assert disk.was_let_go and all(disk.was_let_go)
    assert read_checkpoint(tmp_path / "run/checkpoints/step_2").step == 2
    assert set(steps_of(tmp_path / "run")) == {2, 4, 5}
    rows = {row["step"]: row for row in rows_of(tmp_path / "run")}
    assert rows[3]["time/checkpoint_s"] > 0 and "time/checkpoint_s" not in rows[2]
    written = {
        step: row["time/checkpoint_write_s"] for step, row in rows.items() if "time/checkpoint_write_s" in row
    }
    assert set(written) <= {3, 4, 5} and min(written.values()) > 0


def test_the_next_checkpoint_waits_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    trainer = ppo_trainer(tmp_path / "run", train={"save_every": 1, "total_steps": 3})
    told: list[str] = []
    trainer.run.on_saved = lambda folder: told.append(folder.name)
    threading.Timer(0.5, disk.let_go.set).start()
    trainer.fit()
    assert told == ["step_1", "step_2", "step_3"]
    assert trainer.run.saved == 3 and trainer.run.pending is None


def test_the_best_link_is_that_of_each_checkpoint(tmp_path: Path) -> None:
    metric = Scripted([0.1, 0.2, 0.3, 0.25])
    trainer = ppo_trainer(
        tmp_path / "run", metric_fn=metric, train={"total_steps": 3, "eval_every": 1, "save_every": 1}
    )
    link, seen = tmp_path / "run/checkpoints/best", list[tuple[str, str]]()
    trainer.run.on_saved = lambda folder: seen.append((folder.name, link.resolve().name))
    trainer.fit()
    assert seen == [("step_1", "step_1"), ("step_2", "step_2"), ("step_3", "step_2")]


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Writes beyond that fail as on a full disk, for root too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_ends_the_run_in_words(tmp_path: Path) -> None:
    trainer = ppo_trainer(tmp_path / "run", train={"save_every": 2, "total_steps": 1000})
    message = r"the checkpoint .*step_2 cannot be written: .*File too large"
    with pytest.raises(CheckpointError, match=message), no_file_above(30_000):
        trainer.fit()
    assert list((tmp_path / "run/checkpoints").iterdir()) == []
    assert trainer.run.pending is None and trainer.run.saved is None and trainer.run.step < 1000


def test_a_run_that_fails_lets_a_checkpoint_become_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)

    def fail() -> None:
        threading.Timer(0.3, disk.let_go.set).start()
        raise ZeroDivisionError

    trainer = ppo_trainer(tmp_path / "run", reward_fn=calling_in_step(3, fail), train={"save_every": 2})
    told: list[Path] = []
    trainer.run.on_saved = told.append
    with pytest.raises(Exception, match="ZeroDivisionError"):
        trainer.fit()
    found = newest_checkpoint(tmp_path / "run")
    assert found is not None and found.step == 2 and told == [found.folder]


def test_a_second_ctrl_c_leaves_no_half_of_it(tmp_path: Path) -> None:
    def twice() -> None:
        for _again in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # two that come at once are one

    trainer = ppo_trainer(tmp_path / "run", reward_fn=calling_in_step(3, twice), train={"save_every": 2})
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.run.pending is None
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} <= {"step_2"}
    assert all(thread.name != "checkpoint of step 2" for thread in threading.enumerate())


def test_training_waits_where_memory_is_short_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpointing, "available_memory", lambda: 1_000_000)
    trainer = ppo_trainer(tmp_path / "run", train={"save_every": 1, "total_steps": 2})
    pending: list[object] = []
    trainer.run.on_saved = lambda _: pending.append(trainer.run.pending)
    monkeypatch.setattr(logging.getLogger("conch"), "propagate", True)
    trainer.fit()
    assert set(steps_of(tmp_path / "run")) == {1, 2} and pending == [None, None]
    assert (
        "training waits for the checkpoint of step 1: to write it beside training takes a copy of"
        in caplog.text
    )
    assert "more than half of the 1 MB" in caplog.text and "of step 2" not in caplog.text  # told once


# -------------------------------------------------------------------------------------------- several ranks


def target(folder: Path) -> Target:
    partial = folder / ".step_7.partial"
    partial.mkdir(exist_ok=True)
    return Target(partial, folder / "step_7", step=7, best_step=0)


def share(place: Target, rank: int, *, is_good: bool = True) -> BackgroundWrite:
    """A rank's share of a checkpoint of two ranks."""
    snapshot = Snapshot()
    with snapshot.take():
        torch.save(torch.full((3,), rank), place.partial / f"rank_{rank}.pt")
    if not is_good:
        snapshot.cancel()
    return BackgroundWrite(place, snapshot, state_text({"step": 7}), rank=rank, num_ranks=2)


def test_it_is_whole_once_all_ranks_have_written_their_share(tmp_path: Path) -> None:
    place = target(tmp_path)
    first = share(place, 0)
    first.wait_for_share()
    time.sleep(0.3)
    assert not first.is_done and not place.folder.exists()
    share(place, 1).wait()
    first.wait()
    assert first.is_done and first.seconds > 0.3
    listing = json.loads((place.folder / FILES_FILE).read_text())
    assert set(listing) == {"rank_0.pt", "rank_1.pt", "trainer_state.json"}
    assert read_checkpoint(place.folder).step == 7
    assert int(torch.load(place.folder / "rank_1.pt")[0]) == 1


def test_a_share_that_fails_fails_the_checkpoint(tmp_path: Path) -> None:
    place = target(tmp_path)
    first, second = share(place, 0), share(place, 1, is_good=False)
    with pytest.raises(CheckpointError, match="cannot be written"):
        second.wait()
    with pytest.raises(CheckpointError, match="another process has not written its part"):
        first.wait()
    assert not place.folder.exists()


def test_a_rank_that_is_gone_is_not_waited_for_when_a_run_fails(tmp_path: Path) -> None:
    first = share(target(tmp_path), 0)
    with pytest.raises(CheckpointError, match="another process has not written its part"):
        first.wait_alone(grace_s=0.2)


def test_a_cancelled_write_ends_and_can_be_discarded(tmp_path: Path) -> None:
    place = target(tmp_path)
    first = share(place, 0)
    first.cancel()
    assert first.is_done
    first.discard()
    assert list(tmp_path.iterdir()) == []

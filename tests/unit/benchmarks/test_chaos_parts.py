"""What benchmarks of disturbed runs find wrong: in the ledger of a remote run, and among processes."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos_parts import Watch, distance, remote_ledger_faults, running
from tests.footprint import wait_until
from tests.unit.service.test_exchange_chaos import PER_STEP, STEPS, World, run_in_order

Ledger = dict[str, Any]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has learned what it should, as a service leaves it on disk."""
    world = World(tmp_path / "journal", 0)
    run_in_order(world, lambda held: None)
    train = tmp_path / "run" / "train"
    state = train / "checkpoints" / f"step_{STEPS}" / "state"
    state.mkdir(parents=True)
    (state / "rank_0.json").write_text(json.dumps(world.exchange.capture()))
    means = {
        version: [reward for _, samples in groups for _, reward in samples if reward is not None]
        for version, groups in world.learned.items()
    }
    rows = [{"step": step, "reward/mean": sum(means[step]) / len(means[step])} for step in sorted(means)]
    (train / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "run"


def ledger_file(run: Path) -> Path:
    return run / "train" / "checkpoints" / f"step_{STEPS}" / "state" / "rank_0.json"


def faults(run: Path, *told: dict[str, Any]) -> list[str]:
    return remote_ledger_faults(run, STEPS, PER_STEP, told)


def changed(run: Path, change: Callable[[Ledger], object]) -> list[str]:
    """Faults of a run whose ledger is another."""
    file = ledger_file(run)
    ledger = json.loads(file.read_text())
    change(ledger)
    file.write_text(json.dumps(ledger))
    return faults(run)


def first_samples(ledger: Ledger) -> list[Any]:
    return ledger["ended"][0][3]


def test_run_that_learned_each_group_once_has_no_fault(run: Path) -> None:
    assert faults(run) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ledger: ledger["ended"].append([99, *ledger["ended"][0][1:]]), "from .* groups instead of 2"),
        (lambda ledger: ledger["ended"].pop(), "from .* groups instead of 2 each"),
        (lambda ledger: first_samples(ledger)[0][-1].__setitem__(1, 5), "group 0 was promised to updates"),
        (lambda ledger: ledger["ended"][0].__setitem__(1, "too old"), "dropped .too old."),
        (
            lambda ledger: first_samples(ledger)[0].__setitem__(-2, 77.0),
            "update 1 learned from a mean",
        ),
        (lambda ledger: ledger["counts"].__setitem__("groups_learned", 1), "1 groups are counted"),
        (
            lambda ledger: ledger["groups"].append({"number": 9, "place": 3}),
            "are whole and not learned",
        ),
    ],
)
def test_ledger_that_is_not_right_is_told(run: Path, change: Callable[[Ledger], object], words: str) -> None:
    assert any(re.search(words, each) for each in changed(run, change))


def test_step_that_was_made_twice_or_not_is_told(run: Path) -> None:
    file = run / "train" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines, lines[-1]]))
    assert any("metrics are of steps" in each for each in faults(run))
    assert faults(run.with_name("other"))[0].startswith("there is no ledger of step 6")


def test_promise_that_was_not_kept_is_told(run: Path) -> None:
    ledger = json.loads(
        (run / "train" / "checkpoints" / f"step_{STEPS}" / "state" / "rank_0.json").read_text()
    )
    reward = first_samples(ledger)[0][-2]
    told = {"samples": ["run.0.0"], "rewards": [reward], "version": 1}
    assert faults(run, told) == []
    for other in ({"rewards": [reward + 1]}, {"version": 2}, {"samples": ["run.99.0"]}):
        [fault] = faults(run, {**told, **other})
        assert "a client was told that version" in fault


def test_watch_knows_children_whose_parent_is_gone() -> None:
    child = "import time; time.sleep(60)"
    parent = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    watch = Watch()
    process = subprocess.Popen([sys.executable, "-c", parent])
    try:
        watch.add(process.pid)
        wait_until(lambda: len(watch.living()) == 2, lambda: f"{watch.living()}", 20)
        process.kill()
        process.wait(20)
        [left] = watch.living()
        assert left.is_alive and left.pid != process.pid
    finally:
        watch.stop()
        for each in watch.living():
            subprocess.run(["kill", "-KILL", str(each.pid)], check=True)
    wait_until(lambda: not running({left.pid}), lambda: "it lives", 20)
    assert watch.left(lambda each: "child") == []


def test_process_that_is_left_is_told_behind_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.chaos_parts.LEFT_S", 0.2)
    watch = Watch()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        watch.add(process.pid)
        watch.look()
        started = time.monotonic()
        [told] = watch.left(lambda each: "sleeper")
        assert told.startswith("sleeper ") and told.endswith("is left") and time.monotonic() - started < 10
    finally:
        watch.stop()
        process.kill()
        process.wait(20)


def test_distance_is_in_standard_errors() -> None:
    assert distance([1.0, 3.0], [2.0, 4.0]) == pytest.approx(1 / math.sqrt(2))
    assert distance([1.0, None], [2.0, 4.0]) == math.inf

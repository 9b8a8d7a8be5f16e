"""Sweeps of the GRPO example: what is known before a job starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from conch.errors import ConfigError
from examples.grpo import grpo
from examples.grpo.async_settings import AsyncExampleConfig
from examples.grpo.settings import ExampleConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a sweep would be."""
    return tmp_path / "sweep"


def typed(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    *words: str,
    section: type[ExampleConfig] = ExampleConfig,
) -> None:
    """A command, as if it had started this process.

    section: of the program, `grpo.py` or `grpo-async.py`.
    """
    words = (*words, f"sweep.dir={folder}")
    monkeypatch.setattr(sys, "orig_argv", ["python", "missing/grpo.py", *words])
    grpo.main(words, section)


@pytest.mark.parametrize("section", [ExampleConfig, AsyncExampleConfig])
def test_plan_is_printed_and_nothing_done(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    section: type[ExampleConfig],
) -> None:
    with pytest.raises(SystemExit) as left:
        typed(monkeypatch, folder, "-m", "optimizer.lr=1e-4,1e-5", "--print-config", section=section)
    assert left.value.code == 0
    assert capsys.readouterr().out == "0: optimizer.lr=0.0001\n1: optimizer.lr=1e-05\n"
    assert not folder.exists()


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("train.optim_batch_size=32,33", r"job 1 of the sweep \(train.optim_batch_size=33\): .*: take 32 or"),
        ("train_model.devices=[0],[0,0]", r"job 1 of the sweep .*device 0 is taken twice"),
    ],
)
def test_numbers_of_every_job_are_checked_before_the_first_one_starts(
    monkeypatch: pytest.MonkeyPatch, folder: Path, word: str, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        typed(monkeypatch, folder, "--multirun", word)
    assert not (folder / "0").exists()

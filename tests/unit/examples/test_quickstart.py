"""Parts of the quickstart that need no server."""

from __future__ import annotations

from pathlib import Path

from examples.randomwalks.quickstart import last_checkpoint
from tests.runs import sft_trainer


def test_last_checkpoint_is_the_newest_step_beside_the_link_to_the_best(tmp_path: Path) -> None:
    samples = ["abcd", "bc"] * 4
    train = {"total_steps": 10, "save_every": 1, "eval_every": 1}
    sft_trainer(tmp_path / "run", samples, eval_samples=samples, train=train).fit()
    assert (tmp_path / "run/checkpoints/best").is_symlink()
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run/checkpoints/step_10"

"""The randomwalks example learns to walk as its samples do, good and bad, no better and no worse."""

from __future__ import annotations

from pathlib import Path

from tests.integration.example_runs import run_example

# A larger rate than the example's own gets there in fewer updates.
QUICK = ("train.total_steps=50", "train.eval_every=0", "train.seed=0", "optimizer.learning_rate=2e-3")


def test_the_example_imitates_its_walks(tmp_path: Path) -> None:
    found = run_example("sft_randomwalks", f"train.run_dir={tmp_path / 'run'}", *QUICK)
    # The walks' own optimality is 0.35; 3.2 and 0.00 is where the model starts.
    assert found["eval/loss"] < 0.9
    assert 0.2 < found["eval/optimality"] < 0.45
    assert (tmp_path / "run/checkpoints/step_50/model.safetensors").exists()

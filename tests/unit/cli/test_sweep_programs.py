"""`--multirun` of the programs that are documented to take it: jobs are composed, and nothing is done.

tests/unit/examples/test_grpo_sweeps.py has those of the GRPO example.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

from conch import trainers

ALGORITHMS = sorted(file.stem for file in Path(trainers.__path__[0]).glob("[!_]*.py"))
EXAMPLES = (
    *(f"randomwalks.{name}_randomwalks" for name in ("ppo", "grpo", "rft", "ilql")),
    *(f"sentiments.{name}_sentiments" for name in ("sft", "ppo", "dense_ppo", "rft", "ilql", "train_reward")),
    *(f"hh.{name}_hh" for name in ("sft", "ppo", "ilql", "train_reward")),
)


@pytest.mark.parametrize(
    "name", [*(f"conch.trainers.{name}" for name in ALGORITHMS), *(f"examples.{name}" for name in EXAMPLES)]
)
def test_a_sweep_is_planned_and_nothing_done(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rate = "optimizer.learning_rate"
    given = ["model.path=model", "data.train=rows.jsonl"] if name.startswith("conch.") else []
    words = [*given, "--multirun", f"{rate}=1e-4,1e-5", f"sweep.dir={tmp_path}/sweep", "--print-config"]
    monkeypatch.setattr(sys, "orig_argv", ["python", "program.py", *words])
    main = import_module(name).main
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 0
    first, second = (" ".join([*given, f"{rate}={value}"]) for value in ("0.0001", "1e-05"))
    assert capsys.readouterr().out == f"0: {first}\n1: {second}\n"
    assert not list(tmp_path.iterdir())

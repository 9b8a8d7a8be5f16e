"""What users import and start by name stays where it is."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest

COMMANDS = [
    "conch.trainers.ppo",
    "conch.trainers.grpo",
    "conch.trainers.rft",
    "conch.trainers.ilql",
    "conch.trainers.sft",
    "conch.trainers.reward_model",
    "conch.converters.to_triton",
    "conch.converters.ensemble",
    "conch.serving.__main__",
    "conch.rollouts.serve",
    "conch.sizing",
    "conch.plots",
]
NAMES = {
    "conch": ["train", "__version__"],
    "conch.rewards": ["RewardSource"],
    "conch.converters.to_triton": ["to_triton"],
    "conch.trainers.ppo": ["PPOTrainer", "PPORunConfig"],
    "conch.trainers.grpo": ["GRPOTrainer", "GRPORunConfig"],
    "conch.trainers.rft": ["RFTTrainer", "RFTRunConfig"],
    "conch.trainers.ilql": ["ILQLTrainer", "ILQLRunConfig"],
    "conch.trainers.sft": ["SFTTrainer", "SFTRunConfig"],
    "conch.trainers.reward_model": ["RewardModelTrainer", "RewardModelRunConfig"],
}


@pytest.mark.parametrize("module", COMMANDS)
def test_module_can_be_started_with_python_m(module: str) -> None:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    last = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body[-1]

    assert isinstance(last, ast.If) and "__name__" in ast.unparse(last.test), "nothing stands behind the call"
    assert "main" in ast.unparse(last.body[-1])


@pytest.mark.parametrize(("module", "names"), NAMES.items())
def test_module_has_the_names_that_users_import(module: str, names: list[str]) -> None:
    loaded: Any = importlib.import_module(module)

    assert [name for name in names if not hasattr(loaded, name)] == []

"""Example programs show their help, and refuse a mistyped key, before they load torch, which takes long."""

from __future__ import annotations

from typing import Any

import pytest

from tests.starts import ROOT, started

HEAVY = ("torch", "transformers")
KNOWN = ("conch.cli", "conch.cli.sweeps", "conch.converters.to_triton", "conch.serving.server.server")
PROGRAMS = [
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / "examples").rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
]
WITHOUT_HELP = {
    "examples/grpo/training.py": "reads a file that grpo.py writes for it",
    "examples/steerability/prepare.py": "reads JSON that rl.py gives it",
}
WITHOUT_KEYS = {
    "examples/hh/smoke_table.py": "takes two paths",
    "examples/hh/to_triton.py": "has options",
    "examples/overoptimisation/run_bon_ensembles.py": "has the paper's options",
    "examples/overoptimisation/run_bon_pipeline.py": "has the paper's options",
    "examples/overoptimisation/run_ppo_gold_eval.py": "has the paper's options",
    "examples/randomwalks/sft_start.py": "takes a folder",
    "examples/remote/alphabetical.py": "has options",
    "examples/remote/examples/alphabetical.py": "has options",
    "examples/remote/grpo_server/uvicorn_main.py": "has options",
    "examples/remote/task/task.py": "takes variables",
    "examples/sentiments/to_triton.py": "has options",
    "examples/trl/grpo_with_served_reward.py": "has options",
    "examples/trl/reward_model.py": "has options",
}
NEEDED = {
    "examples/grpo/learning_gate.py": ("gsm8k",),
    "examples/overoptimisation/trainer_rl.py": ("--configs", "defaults"),
    "examples/steerability/rl.py": ("--config", "tiny"),
}
"""Words that a program wants before any others."""


def command(program: str, *words: str) -> str:
    return " ".join([program, *NEEDED.get(program, ()), *words])


HELP = {program: command(program, "--help") for program in PROGRAMS if program not in WITHOUT_HELP}
MISTYPED = {program: command(program, "trian=1") for program in HELP if program not in WITHOUT_KEYS}


@pytest.fixture(scope="module")
def starts() -> dict[str, dict[str, Any]]:
    """Command -> exit code, what of `HEAVY` it loaded, and what it wrote."""
    return started([*HELP.values(), *MISTYPED.values()], HEAVY, KNOWN)


def test_lists_name_programs_that_are_there() -> None:
    assert {*WITHOUT_HELP, *WITHOUT_KEYS, *NEEDED} <= set(PROGRAMS)


@pytest.mark.parametrize("program", HELP)
def test_help_loads_no_torch(program: str, starts: dict[str, dict[str, Any]]) -> None:
    result = starts[HELP[program]]
    assert (result["code"], result["heavy"]) == (0, []), result["text"][-300:]
    assert result["text"]


@pytest.mark.parametrize("program", MISTYPED)
def test_mistyped_key_is_refused_before_torch_is_loaded(
    program: str, starts: dict[str, dict[str, Any]]
) -> None:
    result = starts[MISTYPED[program]]
    assert (result["code"], result["heavy"]) == (1, []), result["text"][-300:]
    assert result["text"].startswith("error: ") and "trian" in result["text"]

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conch.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


def completed(line: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["completion", "--line", line]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("conch pp", ["ppo"]),
        ("conch train async", ["async-grpo"]),
        ("conch serve s", ["status", "swap"]),
        ("conch runs d", ["diff"]),
        ("conch ensemble --pub", []),
        ("conch completion z", ["zsh"]),
        ("conch ppo ppo.kl.pl", ["ppo.kl.placement="]),
        ("conch train ppo model.path=m generation.temp", ["generation.temperature="]),
        ("conch sft optim", ["optimizer."]),
        ("conch reward-model reward_model.norm", ["reward_model.normalise="]),
        ("conch train reward_model reward_model.norm", ["reward_model.normalise="]),
        ("conch ppo ppo.kl.placement=", ["ppo.kl.placement=reward", "ppo.kl.placement=loss"]),
        ("conch grpo tracking.wandb=t", ["tracking.wandb=true"]),
        ("conch grpo grpo.correction.kind=m", ["grpo.correction.kind=mask"]),
        ("conch ppo --rew", ["--reward"]),
        ("conch reward-model --rew", []),
        ("conch rollout-server eng", ["engine="]),
        ("conch service max_w", ["max_waiting="]),
        ("conch serve up --grpc", ["--grpc-port"]),
        ("conch gold outputs/run --write", ["--write-seed-files"]),
        ("conch zzz ", []),
        ("conch train zzz a", []),
        ("conch ppo zzz.", []),
    ],
)
def test_line_is_completed(line: str, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert completed(line, capsys) == expected


def test_line_without_a_verb_has_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    verbs = completed("conch ", capsys)
    assert {"train", "ppo", "doctor", "runs", "gold"} <= set(verbs) and len(verbs) == len(set(verbs))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_script_of_a_shell_asks_conch(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "conch completion --line" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["tcsh"], ["--line"]])
def test_unknown_shell_is_refused_with_the_usage(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", *words]) == 2
    assert "usage: conch completion {bash,zsh,fish}" in capsys.readouterr().err


# What readline does on Tab: the line so far, and the words that bash cuts it into.
TAB = """
conch() { "$PYTHON" -m conch "$@"; }
source <(conch completion bash)
compopt() { :; }
COMP_LINE="$1" COMP_POINT=${#1} COMP_WORDBREAKS=$' \\t\\n"\\'><=;|&(:'
_conch
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("conch doc", ["doctor"]),
        ("conch ppo ppo.kl.", ["coef=", "estimator=", "horizon=", "placement=", "target="]),
        ("conch ppo ppo.kl.placement=l", ["loss"]),
        ("conch nothing here", [""]),
    ],
)
def test_bash_offers_what_fits_behind_its_own_breaks(line: str, offered: list[str]) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "--norc", "-c", TAB, "bash", line],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    shown = sorted(word.removeprefix("ppo.kl.") for word in done.stdout.splitlines())
    assert (shown, done.stderr) == (offered, "")

"""A run at a terminal: what is seen of it, Ctrl-C, and the command that its end names."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forks import quick_python
from tests.terminal import LONGEST_S, ROOT, AtTerminal
from tests.tiny import char_tokenizer, tiny_gpt2_config


@pytest.fixture
def model(tmp_path: Path) -> list[str]:
    """Settings of a small model of a few letters."""
    from transformers import GPT2LMHeadModel

    tokenizer = char_tokenizer("abcd")
    GPT2LMHeadModel(tiny_gpt2_config(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return [f"model.path={tmp_path}/model", "tokenizer.pad_token='<pad>'", f"train.run_dir={tmp_path}/run"]


def rows(folder: Path, key: str) -> Path:
    """A data set of four texts."""
    lines = [json.dumps({key: text}) + "\n" for text in ("abcd", "bcda", "cdab", "dabc")]
    (folder / "rows.jsonl").write_text("".join(lines))
    return folder / "rows.jsonl"


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_run_at_a_terminal_shows_its_evaluations_and_ends_with_a_command_that_goes_on(
    model: list[str], tmp_path: Path
) -> None:
    data = [f"data.{part}={rows(tmp_path, 'text')}" for part in ("train", "eval")]
    train = ["sft.batch_size=4", "optimizer.learning_rate=0.1", "train.total_steps=4", "train.eval_every=2"]
    with AtTerminal([quick_python(), "-m", "conch", "sft", *model, *data, *train]) as terminal:
        text = terminal.finish().text
    lines = text.splitlines()
    shown = [line for line in lines if " evaluation  loss " in line]
    assert [line.split()[1] for line in shown] == ["0/4", "2/4", "4/4"], text
    assert any(line.split() == ["training", "evaluation"] for line in lines)
    start = next(place for place, line in enumerate(lines) if "run folder: " in line)
    noise = [line for line in lines[:start] if " conch." not in line]
    assert not "".join(noise).strip(), "libraries are quiet"

    ending = {
        line[2:14].strip(): line[14:] for line in lines[lines.index("sft: 4 of 4 steps are done") + 1 :]
    }
    assert Path(ending["checkpoint"]).is_dir() and ending["report"] == f"conch report {tmp_path}/run"
    program, *command = shlex.split(ending["train on"])
    assert program == "conch"
    done = subprocess.run(
        [quick_python(), "-m", "conch", *command], cwd=ROOT, capture_output=True, text=True, timeout=LONGEST_S
    )
    assert done.returncode == 0, done.stderr
    assert steps(tmp_path / "run") == list(range(9))
    assert "sft 6/8 evaluation  loss " in done.stderr and "sft: 8 of 8 steps are done" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_ctrl_c_is_answered_at_once_and_leaves_the_terminal_in_order(
    model: list[str], tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\n"
        "def reward(outputs, **_):\n"
        f"    pathlib.Path('{tmp_path}/asked').touch()\n"
        f"    while pathlib.Path('{tmp_path}/wait').exists():\n"
        "        time.sleep(0.1)\n"
        "    return [1.0] * len(outputs)\n"
    )
    (tmp_path / "wait").touch()
    data = [f"data.train={rows(tmp_path, 'prompt')}", "--reward", f"{tmp_path}/slow.py:reward"]
    train = [
        "ppo.rollouts_per_step=4",
        "ppo.minibatches=1",
        "generation.max_new_tokens=2",
        "train.eval_every=0",
    ]
    with AtTerminal([sys.executable, "-m", "conch", "ppo", *model, *data, *train]) as terminal:
        terminal.read_until(lambda _: (tmp_path / "asked").exists())
        terminal.press(b"\x03")
        # Of two lines where the terminal is narrow, as it is to a program that is told so by COLUMNS.
        terminal.read_until(lambda screen: "Ctrl-C: finishing the step" in "".join(screen.lines[-2:]))
        (tmp_path / "wait").unlink()
        lines = terminal.finish().text.splitlines()
    assert terminal.process.returncode == 130, lines
    assert lines[-1] == "interrupted" and "Traceback" not in "".join(lines)
    resume = next(line for line in lines if line.startswith("  resume "))
    assert resume.endswith(f"--config-name config train.resume={tmp_path}/run")

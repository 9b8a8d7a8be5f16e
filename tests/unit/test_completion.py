from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
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
        ("conch serve in", ["install"]),
        ("conch serve ", ["install", "up", "down", "status", "logs", "swap"]),
        ("conch serve up --allow-", ["--allow-anyone"]),
        ("conch serve up --runtime ", ["bundled", "apptainer", "docker"]),
        ("conch serve up --name x --runtime b", ["bundled"]),
        ("conch serve up --runtime=a", ["--runtime=apptainer"]),
        ("conch ensemble --objective ", ["mean", "wco", "uwo"]),
        ("conch convert ensemble --obj", ["--objective"]),
        ("conch size --precision b", ["bf16"]),
        ("conch best-of-n --config-name ", ["best_of_n"]),
        ("conch ppo --config-name randomwalks/p", ["randomwalks/ppo", "randomwalks/ppo_exact"]),
        ("conch reward-model --config-name=lab", ["--config-name=laboratory/reward_model"]),
        ("conch ppo --print-config generation.temp", ["generation.temperature="]),
        ("conch completion ", ["bash", "zsh", "fish"]),
        ("conch completion --", []),
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


@pytest.mark.parametrize(
    "line",
    [
        "conch ppo data.train=",
        "conch ppo --config-dir ",
        "conch serve up --log-file ",
        "conch report ",
        "conch plot runs/",
        "conch runs diff ",
        "conch gold --output ",
    ],
)
def test_files_are_left_to_the_shell(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert completed(line, capsys) == []


def test_configurations_are_those_of_a_folder_that_the_line_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/walks.yaml").write_text("defaults:\n  - /ppo\nppo:\n  kl:\n    coef: 0.1\n")
    (tmp_path / "sft.yaml").write_text("train:\n  seed: 1\n")
    assert completed(f"conch ppo --config-dir {tmp_path} --config-name ", capsys) == ["mine/walks"]


@pytest.mark.parametrize(
    "verb", ["serve up", "score", "ensemble", "gold", "size", "runs diff", "report", "ppo"]
)
def test_options_of_a_program_are_whole_words_of_its_help(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        raise SystemExit(main([*verb.split(), "--help"]))
    shown = capsys.readouterr().out

    options = completed(f"conch {verb} --", capsys)

    assert len(options) >= 3 and "--help" in options
    assert [option for option in options if not re.search(rf"{option}(?![\w-])", shown)] == []


def test_completion_loads_neither_torch_nor_hydra() -> None:
    lines = ["conch ppo --config-name ", "conch serve up --", "conch ensemble --objective ", "conch gold --"]
    program = (
        "import sys\nfrom conch.__main__ import main\n"
        f"for line in {lines}: main(['completion', '--line', line])\n"
        "print([name for name in ('torch', 'hydra', 'tritonclient', 'grpc') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


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


def shell_or_skip(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed: apt-get install {name}")
    return path


def shell_environment() -> dict[str, str]:
    return {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "TERM": "dumb"}


# Ctrl-X prints what the line has become.
ZSH = """
PS1= PS2= RPS1=; unsetopt zle_bracketed_paste prompt_sp 2>/dev/null; zstyle ':completion:*' menu no
conch() { "$PYTHON" -m conch "$@" }
autoload -U compinit; compinit -u -D
source <(conch completion zsh)
tell() { print -r -- "<<$BUFFER>>" >> told }; zle -N tell; bindkey '^X' tell; bindkey '^I' complete-word
print ready > told
"""


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("conch doc", "conch doctor "),
        ("conch ppo ppo.kl.pl", "conch ppo ppo.kl.placement="),
        ("conch ppo ppo.kl.placement=l", "conch ppo ppo.kl.placement=loss "),
        ("conch serve in", "conch serve install "),
        ("conch serve up --runtime bun", "conch serve up --runtime bundled "),
        ("conch ppo data.train=prom", "conch ppo data.train=prompts.jsonl "),
        ("conch plot fol", "conch plot folder/"),
    ],
)
def test_zsh_completes_with_a_blank_behind_what_is_finished(typed: str, line: str, tmp_path: Path) -> None:
    zsh = shell_or_skip("zsh")
    (tmp_path / "prompts.jsonl").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "script").write_text(ZSH)
    told = tmp_path / "told"
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(zsh, ["zsh", "-f", "-i"], shell_environment())
    drain = threading.Thread(target=read_all, args=(terminal,))
    drain.start()
    try:
        os.write(terminal, b"source ./script\n")
        wait_until(lambda: told.is_file() and told.read_text() == "ready\n")
        os.write(terminal, f"{typed}\t\x18".encode())
        wait_until(lambda: ">>" in told.read_text())
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        drain.join()
        os.close(terminal)
    assert told.read_text().splitlines()[1:] == [f"<<{line}>>"]


def read_all(terminal: int) -> None:
    """Take what a shell prints until it has ended: a full terminal would stop it."""
    with contextlib.suppress(OSError):
        while os.read(terminal, 4096):
            pass


def wait_until(condition: Callable[[], bool], deadline_s: float = 120.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "the shell did not answer"
        time.sleep(0.02)


FISH = """
function conch; $PYTHON -m conch $argv; end
conch completion fish | source
complete -C "$LINE_SO_FAR"
"""


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("conch doc", ["doctor"]),
        ("conch ppo ppo.kl.placement=l", ["ppo.kl.placement=loss"]),
        ("conch serve in", ["install"]),
        ("conch ensemble --objective u", ["uwo"]),
        ("conch ppo data.train=prom", ["data.train=prompts.jsonl"]),
    ],
)
def test_fish_offers_words_and_files(typed: str, offered: list[str], tmp_path: Path) -> None:
    fish = shell_or_skip("fish")
    (tmp_path / "prompts.jsonl").touch()
    done = subprocess.run(
        [fish, "--no-config", "-c", FISH],
        env={**shell_environment(), "LINE_SO_FAR": typed, "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert (done.stdout.splitlines(), done.stderr) == (offered, "")

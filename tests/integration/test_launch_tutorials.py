"""The tutorials for eight GPUs and several machines run on the CPU: fewer processes, tiny random models."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chats import chat_reward_model, qwen_policy
from tests.forks import quick_python
from tests.integration.test_tutorials import LONGEST_S, rows
from tests.launches import ROOT, SLURM_FAKES, free_port, kill_all, slurm_job, start
from tests.pages import DOCS, Block, blocks_of

CONCH = """#!/usr/bin/env bash
if [ "$1" = serve ]; then exec "{python}" -m conch "$@"; else exec "{quick}" -m conch "$@"; fi
"""
"""Servers outlive their commands, so they are started by a Python of their own."""

SBATCH = """#!/usr/bin/env bash
shift 2  # --nodes 2
exec "$@"
"""
"""Runs the script at once; the test sets what Slurm would, and srun and scontrol are stood in for, too."""

SMALL = {
    "model.dtype=bfloat16 ": "",
    r"ppo\.rollouts_per_step=\d+": "ppo.rollouts_per_step=16",
    r"ppo\.minibatches=\d+": "ppo.minibatches=2",
    r"gradient_accumulation_steps=\d+": "gradient_accumulation_steps=2",
    r"max_new_tokens=\d+": "max_new_tokens=8",
    r"train\.total_steps=200": "train.total_steps=6",
    r"train\.eval_every=20": "train.eval_every=3",
    r"train\.save_every=20": "train.save_every=2",
    "step_200": "step_6",
}
"""What a page says, as a pattern -> what a test runs."""

NOT_HERE = (r"train\.eval_every=20", "step_200")

CPU = {
    "accelerate launch --num_processes 7 --config_file configs/accelerate/zero2-bf16.yaml": (
        "ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2"
    ),
    r"train\.num_processes=7": "train.num_processes=2",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the models that the pages name, and with what they take from the checkout."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    chat_reward_model(tmp_path / "Skywork/Skywork-Reward-V2-Llama-3.1-8B", "llama", window=8192)
    qwen_policy(tmp_path / "Qwen/Qwen2.5-7B-Instruct", window=1024)
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    for name, text in {"conch": CONCH, "sbatch": SBATCH}.items():
        program = tmp_path / "bin" / name
        program.write_text(text.format(python=sys.executable, quick=quick_python()))
        program.chmod(0o755)
    yield tmp_path
    subprocess.run([sys.executable, "-m", "conch", "serve", "down"], cwd=tmp_path, check=False)


def blocks(name: str, changes: dict[str, str]) -> list[Block]:
    """The page's blocks, changed; each change must apply somewhere."""
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    for pattern, instead in changes.items():
        text, times = re.subn(pattern, instead, text)
        assert times, f"{name}.md has nothing like {pattern}"
    return [block for block in blocks_of(text) if block.language in ("bash", "python")]


def begin(block: Block, folder: Path, **environment: str) -> subprocess.Popen[str]:
    programs = folder / "bin"
    path = os.pathsep.join(
        [str(programs), str(SLURM_FAKES), str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    (folder / "block.py").write_text(block.text)
    bash = ["bash", "-c", f"set -eu\n{block.text}"]
    command = [quick_python(), "block.py"] if block.language == "python" else bash
    return start(command, fresh=False, folder=folder, PATH=path, **environment)


def finish(process: subprocess.Popen[str], block: Block) -> None:
    """Wait for a block that must end well."""
    try:
        output, _ = process.communicate(timeout=LONGEST_S)
    finally:
        kill_all(process)
    assert process.returncode == 0, f"{block.text}\n{output[-5000:]}"


def run(block: Block, folder: Path, **environment: str) -> None:
    finish(begin(block, folder, **environment), block)


def interrupt(block: Block, folder: Path, metrics: Path) -> None:
    """Start a block, and send its launcher SIGTERM once a step is done."""
    text = block.text.replace("torchrun ", "exec torchrun ")  # the shell would keep the signal for itself
    process = begin(Block(block.needs, block.language, text), folder)
    deadline = time.monotonic() + LONGEST_S
    while not metrics.exists() or not any("reward/mean" in row for row in rows(metrics)):
        if process.poll() is not None or time.monotonic() > deadline:
            finish(process, block)
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=LONGEST_S)
    assert process.returncode != 0


@pytest.mark.slow
def test_ppo_on_eight_gpus_is_interrupted_goes_on_and_is_loaded(folder: Path) -> None:
    page = blocks("eight_gpus", {**SMALL, **CPU, "8001": str(free_port())})
    metrics = folder / "runs/judge/metrics.jsonl"
    for block in page:
        if block.needs & {"docker", "singularity"}:
            continue
        if "train ppo" in block.text:
            interrupt(block, folder, metrics)
            assert max(row["step"] for row in rows(metrics)) < 6
        run(block, folder)
    assert [row["step"] for row in rows(metrics) if "reward/mean" in row] == [1, 2, 3, 4, 5, 6]
    assert (folder / "judge.html").stat().st_size > 100_000
    assert (folder / "runs/judge/checkpoints/step_6/config.json").is_file()


@pytest.mark.slow
def test_ppo_on_two_machines_by_slurm_goes_on_in_two_shells(folder: Path) -> None:
    prepare, *_ = blocks("eight_gpus", {})
    run(prepare, folder)
    convert = next(block for block in blocks("eight_gpus", {}) if "conch convert" in block.text)
    run(convert, folder)
    changes = {
        **{pattern: instead for pattern, instead in SMALL.items() if pattern not in NOT_HERE},
        "/shared/": f"{folder}/",
        " --gpu 0": "",
        "--host 0.0.0.0": "--host 127.0.0.4",
        "--runtime apptainer --image tritonserver-pyt.sif": "--detach",
        "node-7:8001": "127.0.0.4:8001",
        "node-0": "127.0.0.2",
        "29500": str(free_port()),
        "8001": str(free_port()),
        "(num_processes[= ])16": r"\g<1>4",
    }
    _, serve, ask, slurm, shell, look = blocks("several_machines", changes)
    job = slurm_job(folder)
    run(serve, folder)
    secret = (folder / "secret.txt").read_text(encoding="utf-8").strip()
    run(ask, folder)
    half = Block(slurm.needs, slurm.language, slurm.text.replace("total_steps=6", "total_steps=2"))
    run(half, folder, REWARD_SECRET=secret, **job)
    metrics = folder / "runs/judge/metrics.jsonl"
    assert [row["step"] for row in rows(metrics) if "reward/mean" in row] == [1, 2]
    other = Block(shell.needs, shell.language, shell.text.replace("MACHINE=0", "MACHINE=1"))
    machines = [(each, begin(each, folder, REWARD_SECRET=secret)) for each in (shell, other)]
    for each, process in machines:
        finish(process, each)
    assert [row["step"] for row in rows(metrics) if "reward/mean" in row] == [1, 2, 3, 4, 5, 6]
    run(look, folder)

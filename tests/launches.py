"""Runs of several processes, started as users start them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

from tests.forks import quick_python, started_by

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "accelerate"
SLURM_FAKES = ROOT / "tests" / "fakes" / "slurm"
"""A folder for PATH: srun and scontrol as they answer for two machines, which are addresses of this one."""

LONGEST_S = 300.0
"""Of a run of seconds; the rest is for a machine that has much else to do."""


def accelerate(config: str, num_processes: int, *options: str) -> list[str]:
    """The command line up to the program, on a machine without a GPU; a free port is found.

    config: stem of a file in `configs/accelerate`.
    """
    file = CONFIGS / f"{config}.yaml"
    count = ["--num_processes", str(num_processes), "--main_process_port", str(free_port())]
    return [*_module("accelerate.commands.launch"), "--config_file", str(file), *count, *options]


def torchrun(num_processes: int, *options: str) -> list[str]:
    """The same with torch's launcher, which knows no configuration."""
    alone = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    return [*_module("torch.distributed.run"), "--nproc_per_node", str(num_processes), *(options or alone)]


def start(
    command: Sequence[str], *, fresh: bool = False, folder: Path = ROOT, **environment: str
) -> subprocess.Popen[str]:
    """Start a command in a folder with the environment of CPU ranks; output and errors come on `stdout`.

    fresh: each Python imports its libraries itself and is a child of who started it, as tests of who outlives
        whom need it; otherwise forks of `tests.forks` stand in for it, torchrun's ranks included.
    """
    if not fresh:
        environment = {"PYTHON_EXEC": quick_python(), **environment}
        command = [quick_python() if word == sys.executable else word for word in command]
    # Only torchrun asks for the CPU this way; with DeepSpeed it would turn DeepSpeed off.
    cpu = {"ACCELERATE_USE_CPU": "true"} if "torch.distributed.run" in command else {}
    cpu["TORCH_EXTENSIONS_DIR"] = str(_built_operators())
    return subprocess.Popen(
        list(command),
        cwd=folder,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **cpu, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def _built_operators() -> Path:
    """Where DeepSpeed builds its operators: one folder for each environment, since builds of two in one wait
    for each other. Where the environment is somebody else's they are built anew, in the tests' own cache."""
    folder = sys.prefix if os.access(sys.prefix, os.W_OK) else os.environ["HF_HOME"]
    return Path(folder) / "torch_extensions"


def finish(process: subprocess.Popen[str]) -> str:
    """All output of a run that must end well."""
    try:
        output, _ = process.communicate(timeout=LONGEST_S)
    finally:
        kill_all(process)
    assert process.returncode == 0, output[-6000:]
    return output


def ranks_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that the launcher has started so far and that run Python, oldest first."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child for child in psutil.Process(launcher.pid).children() if child.is_running()]
    return []


def kill_all(launcher: subprocess.Popen[str]) -> None:
    """SIGKILL to whatever still runs, until it is gone. Launchers give ranks sessions of their own."""
    for one in started_by(launcher.pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(launcher.pid).send_signal(signal.SIGKILL)
    launcher.wait(LONGEST_S)
    if launcher.stdout is not None:
        launcher.stdout.close()


def free_port(among: Iterable[int] = (0,)) -> int:
    """A port that nobody listens on just now: the first that is free `among` these, 0 for any."""
    for port in among:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise AssertionError("no port is free")


def slurm_job(folder: Path) -> dict[str, str]:
    """What Slurm sets for a job of two machines with two GPUs each, which was sent off in `folder`."""
    return {
        "SLURM_JOB_NODELIST": "127.0.0.2,127.0.0.3",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_ID": str(free_port(range(21000, 40000)) - 20000),  # the script's port follows from it
        "SLURM_SUBMIT_DIR": str(folder),
    }


def _module(name: str) -> list[str]:
    return [sys.executable, "-m", name]

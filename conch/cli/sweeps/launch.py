"""The program that a sweep runs: how this process was started, and the command of a job.

python examples/grpo.py -m lr=1,2            -> python examples/grpo.py lr=1 ...
conch train ppo -m lr=1,2                    -> python /.../bin/conch train ppo lr=1 ...
python -m examples.ppo -m lr=1,2 sweep.launcher='accelerate launch --num_processes 2'
                                             -> accelerate launch --num_processes 2 -m examples.ppo lr=1 ...
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from conch.cli.sweeps.settings import SweepConfig
from conch.errors import ConfigError
from conch.machine.processors import granted_processors

_QUERY_TIMEOUT_S = 30.0
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID")


@dataclass(frozen=True)
class Program:
    """How the program of this process is started.

    interpreter: Python and its options.
    target: the file or `-m module`.
    words: what stands on its command line beside the words of the sweep: `train ppo`.
    """

    interpreter: tuple[str, ...]
    target: tuple[str, ...]
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the file or the module."""
        return self.target[-1].rpartition(".")[2] if self.target[0] == "-m" else Path(self.target[-1]).stem

    def command(self, launcher: str | None, words: Sequence[str]) -> list[str]:
        """Return the command of a job.

        launcher: words in place of the interpreter and its options; None keeps these.
        words: of the job.

        Raises:
            ConfigError: the launcher is not installed.
        """
        started_by = list(self.interpreter) if launcher is None else _launcher_words(launcher)
        return [*started_by, *self.target, *self.words, *words]


def refuse_launched(environment: Mapping[str, str]) -> None:
    """Refuse a sweep that a launcher started on several ranks: each of them would run the whole sweep.

    Raises:
        ConfigError: names `sweep.launcher`.
    """
    variable = next((name for name in _LAUNCHED if name in environment), None)
    if variable is not None:
        raise ConfigError(
            f"--multirun stands outside of torchrun and `accelerate launch` ({variable} is set here): start "
            "the program with python, and name what launches each job with "
            "sweep.launcher='accelerate launch --num_processes 2'"
        )


def find_program(words: Sequence[str], original: Sequence[str] | None = None) -> Program:
    """Find out how this process was started.

    words: those of the command line that the program's configuration is made of.
    original: command line of the process, interpreter and all; None takes `sys.orig_argv`.

    Raises:
        ConfigError: the words are not those of the command line, or the program has no file and no module.
    """
    command = list(sys.orig_argv if original is None else original)
    options, target, rest = _split_interpreter(command[1:])
    kept, unmatched = [], list(words)
    for word in reversed(rest):
        if unmatched and word == unmatched[-1]:
            unmatched.pop()
        else:
            kept.append(word)
    if not target or unmatched:
        raise ConfigError(
            "--multirun starts the program anew for each job, so it must stand on the command line of a file "
            f"or a module; this process was started by: {shlex.join(command)}"
        )
    return Program((sys.executable or command[0], *options), tuple(target), tuple(reversed(kept)))


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launcher_environment(launcher: str | None, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of a job with a launcher: a port of its own for torchrun, and this Python as `python`."""
    if launcher is None:
        return {}
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    return {"PET_MASTER_PORT": str(free_port()), "PATH": path}


def visible_devices(environment: Mapping[str, str]) -> list[str]:
    """Return the GPUs that this process may use: CUDA_VISIBLE_DEVICES, else all that the driver names.

    Asked of `nvidia-smi`, so that the sweep itself holds no memory on any of them.
    """
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip() and name.strip() != "-1"]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        reply = subprocess.run(
            [tool, "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_QUERY_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in reply.stdout.splitlines() if line.strip().isdigit()]


def slots_of(settings: SweepConfig, devices: Sequence[str]) -> list[tuple[str, ...] | None]:
    """Return the GPUs of each job that runs at once, disjoint; None where a job is told nothing about them.

    devices: GPUs of this process, where `sweep.devices` names none.

    Raises:
        ConfigError: there are too few, with the arithmetic.
    """
    jobs, share = settings.jobs, settings.devices_per_job
    wanted = devices if settings.devices is None else [str(device) for device in settings.devices]
    if len(set(wanted)) < len(wanted):
        raise ConfigError(f"`sweep.devices` names a GPU twice: {', '.join(wanted)}")
    if not wanted and not share:
        return [None] * jobs
    if share == 0:
        return [tuple(wanted) if settings.devices is not None else None] * jobs
    if share is None:
        share = len(wanted) // jobs
        if share == 0:
            raise ConfigError(
                f"sweep.jobs={jobs} jobs at once need {jobs} GPUs, there {_are(len(wanted))}: set "
                f"sweep.jobs={len(wanted)}, or sweep.devices_per_job=0 to let jobs share them"
            )
    needed = jobs * share
    if needed > len(wanted):
        raise ConfigError(
            f"sweep.jobs={jobs} jobs of sweep.devices_per_job={share} need {jobs} x {share} = {needed} GPUs, "
            f"there {_are(len(wanted))}"
        )
    return [tuple(wanted[slot * share : (slot + 1) * share]) for slot in range(jobs)]


def slot_environment(devices: tuple[str, ...] | None) -> dict[str, str]:
    """Variables that tell a job which GPUs are its own."""
    return {} if devices is None else {"CUDA_VISIBLE_DEVICES": ",".join(devices)}


def thread_environment(settings: SweepConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that keep jobs from each taking all processors."""
    if settings.threads is not None:
        return {"OMP_NUM_THREADS": str(settings.threads)}
    if settings.jobs == 1 or "OMP_NUM_THREADS" in environment:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, granted_processors() // settings.jobs))}


def _launcher_words(launcher: str) -> list[str]:
    words = shlex.split(launcher)
    if not words:
        raise ConfigError("`sweep.launcher` is empty: leave it out, or name a program")
    # A virtual environment that is not activated has its launchers beside its Python.
    beside = str(Path(sys.executable).parent)
    found = shutil.which(words[0], path=f"{beside}{os.pathsep}{os.environ.get('PATH', os.defpath)}")
    if found is None:
        raise ConfigError(f"`sweep.launcher`: there is no program {words[0]} on the PATH or in {beside}")
    words[0] = found
    named_port = any(word.split("=")[0].replace("-", "_") == "__main_process_port" for word in words)
    if "launch" in words[1:] and not named_port and "accelerate" in launcher:
        # All of accelerate's launchers take the same port, and the second one finds it in use.
        after = words.index("launch", 1) + 1
        words[after:after] = ["--main_process_port", str(free_port())]
    return words


def _split_interpreter(words: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Split the words behind `python` into its options, the file or module, and the program's own words."""
    options: list[str] = []
    index = 0
    while index < len(words):
        word = words[index]
        if not word.startswith("-"):
            return options, [word], list(words[index + 1 :])
        if word in ("-", "--"):
            break
        index += 1
        options.append(word)
        if word.startswith("--"):
            if word == "--check-hash-based-pycs":
                options.append(words[index])
                index += 1
            continue
        for place, letter in enumerate(word[1:], start=1):
            if letter in "mcXW":
                glued = word[place + 1 :]
                argument = glued or words[index]
                index += not glued
                if letter in "mc":
                    flags = word[:place]
                    return (
                        [*options[:-1], *([flags] if len(flags) > 1 else [])],
                        [f"-{letter}", argument],
                        list(words[index:]),
                    )
                options += [] if glued else [argument]
                break
    return options, [], []


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count or 'none'}"

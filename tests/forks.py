"""A Python that starts at once: one process has imported torch and the like, and forks for each program.

    subprocess.run([quick_python(), "-m", "conch.trainers.sft", ...])

A program gets arguments, environment, folder and streams of its own, and its exit code comes back, as with
`python`. Libraries alone are there when it starts: nothing of ours, and nothing that another program did.
A program's parent is not who started it, and its hash seed is that of the others: a test of who outlives
whom, of memory, of threads or of the interpreter itself takes `sys.executable`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

LIBRARIES = (
    "torch",
    "torch.distributed.run",
    "transformers:AutoModelForCausalLM",
    "transformers:AutoModelForSequenceClassification",
    "transformers:AutoTokenizer",
    "transformers:PreTrainedModel",
    "transformers.models.gpt2.modeling_gpt2",
    "safetensors.torch",
    "accelerate",
    "peft",
    "pydantic",
)
"""What most programs of ours import, and what takes its time."""
_SOCKET = "/forks.socket"
_HERE = Path(__file__).parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
"""As it was before any test changed it."""


@dataclass(frozen=True)
class Done:
    """How a program ended, and what it wrote."""

    code: int
    out: str
    err: str


class Forks:
    """Runs programs, each in a process of its own. The context manager ends the one that forks.

    python: a program that is started as `python` is.
    """

    def __init__(self, *libraries: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="forks-"))  # short: a socket's path has 107 bytes
        path = Path(f"{self._folder}{_SOCKET}")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(64)
        Path(f"{path}.json").write_text(json.dumps(ENVIRONMENT), encoding="utf-8")
        alive, self._alive = os.pipe()
        handed = listener.fileno(), alive
        self._process = subprocess.Popen(
            [sys.executable, str(_HERE / "forking_server.py"), *map(str, handed), json.dumps(libraries)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=handed,
            env=ENVIRONMENT,
            cwd="/",
            start_new_session=True,
        )
        listener.close()
        os.close(alive)
        self.python = self._folder / "python"
        client = shlex.join([sys.executable, "-I", "-S", str(_HERE / "forking_client.py"), str(path)])
        self.python.write_text(f'#!/bin/sh\nexec {client} "$@"\n', encoding="utf-8")
        self.python.chmod(0o700)

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process that forks; programs that still run go on."""
        os.close(self._alive)
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, program: Path, *arguments: str, given: str = "") -> Done:
        """Run a Python file, as `python -I program arguments` would. given: what it reads from stdin."""
        command = [self.python, "-I", program, *arguments]
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=300, check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    def score(self, folder: Path, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Replies of the `model.py` of a version folder, as `SubprocessModel.score` gives them on a CPU."""
        given = json.dumps({"device": "cpu", "requests": [*requests]})
        done = self.run(folder / "model.py", given=given)
        assert done.code == 0, done.err
        return json.loads(done.out)


def started_by(pid: int) -> list[psutil.Process]:
    """Processes that a process has started and that run, with those that they started; a program in a fork is
    found where the one is found that stands in for it."""
    found: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        notes = [Path(f"{word}.{pid}") for word in process.cmdline() if word.endswith(_SOCKET)]
        programs = [psutil.Process(int(note.read_text())) for note in notes if note.exists()]
        for each in (*programs, *process.children()):
            found += [each, *started_by(each.pid)]
    return found


@contextlib.contextmanager
def conversions_fork() -> Iterator[None]:
    """Inside, the processes in which conversions are proved are forks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("conch.converters.parity.subprocess_model.PYTHON", quick_python())
        yield


@functools.cache
def quick_python(*libraries: str) -> str:
    """A Python that all tests of this process share; it imports its libraries with the first program.

    libraries: other ones than `LIBRARIES`.
    """
    if Path("/dev/nvidiactl").exists():
        return sys.executable  # CUDA does not live through a fork, and libraries ask for it when imported
    forks = Forks(*libraries or LIBRARIES)
    atexit.register(forks.close)
    return str(forks.python)

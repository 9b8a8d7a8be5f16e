"""Fresh processes that do not each import torch and transformers: one process imports them, and forks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PROGRAM = """
import importlib, json, os, runpy, signal, sys, traceback

DEADLINE_S = 300
signal.alarm(DEADLINE_S)
for library in json.loads(sys.argv[1]):
    module, _, name = library.partition(":")
    getattr(importlib.import_module(module), name or "__name__")
signal.alarm(0)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(DEADLINE_S)
        for number, name in enumerate(("in", "out", "err")):
            os.dup2(os.open(job["prefix"] + name, os.O_RDWR | os.O_CREAT), number)
        sys.stdin = open(0, encoding="utf-8", closefd=False)
        sys.argv = job["command"]
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@dataclass(frozen=True)
class Done:
    """How a program ended, and what it wrote."""

    code: int
    out: str
    err: str


class Forks:
    """Runs programs one after another, each in a process of its own. The context manager ends all.

    libraries: that are imported before, `module` or `module:name`. Nothing else of a program's is there when
        it starts, and nothing that it does is seen by the next.
    """

    def __init__(self, *libraries: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _PROGRAM, json.dumps(libraries)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def run(self, program: Path, *arguments: str, given: str = "") -> Done:
        """Run a Python file, as `python -I program arguments` would. given: what it reads from stdin.

        Three files with its input and output are left beside it.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        files = [program.with_name(f"{program.name}.{name}") for name in ("in", "out", "err")]
        for file, content in zip(files, (given, "", ""), strict=True):
            file.write_text(content, encoding="utf-8")
        job = {"prefix": f"{program}.", "command": [str(program), *arguments]}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        code = self._process.stdout.readline()
        assert code, "the process that forks has ended"
        return Done(int(code), *(file.read_text(encoding="utf-8") for file in files[1:]))

    def score(self, folder: Path, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Replies of the `model.py` of a version folder, as `SubprocessModel.score` gives them on a CPU."""
        given = json.dumps({"device": "cpu", "requests": [*requests]})
        done = self.run(folder / "model.py", given=given)
        assert done.code == 0, done.err
        return json.loads(done.out)

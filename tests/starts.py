"""What programs load when they only start: for `--help`, or to refuse a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# Starts commands in children of a process that knows nothing heavy; a line of JSON for each.
_STARTER = """
import contextlib, io, json, os, runpy, sys
from importlib import import_module
from conch.__main__ import main

watched, known = sys.argv[1].split(), sys.argv[2].split()
for name in known:
    import_module(name)
assert not [name for name in watched if name in sys.modules]

def run_module(name, *words):
    sys.argv = [name, *words]
    runpy.run_module(name, run_name="__main__", alter_sys=True)

def run_file(path, *words):
    sys.argv = [path, *words]
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    runpy.run_path(path, run_name="__main__")

def run(words):
    if words[0] == "-m":
        return run_module(*words[1:])
    return run_file(*words) if words[0].endswith(".py") else main(words)

def start(words):
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
        try:
            code = run(words)
        except SystemExit as leaving:
            code = leaving.code
    heavy = [name for name in watched if name in sys.modules]
    return json.dumps({"code": code, "heavy": heavy, "text": written.getvalue()})

for command in sys.argv[3:]:
    if (child := os.fork()) == 0:
        print(start(command.split()), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def started(
    commands: Sequence[str], watched: Sequence[str], known: Sequence[str] = ("conch.cli",)
) -> dict[str, dict[str, Any]]:
    """Command -> its exit `code`, the `text` that it wrote, and `heavy`: which of `watched` it loaded.

    commands: words behind `conch`, or those of `python -m module ...` from `-m` on, or of
        `python path/of/a/program.py ...` from the path on, which is one from the checkout.
    watched: names of modules.
    known: modules that most commands load, and that load none of `watched`: loaded once, for all.
    """
    program = [sys.executable, "-c", _STARTER, " ".join(watched), " ".join(known), *commands]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(commands, map(json.loads, done.stdout.splitlines()), strict=True))

"""A fork that runs a written model behaves as a new `python -I`, and there is none where it could not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.footprint import wait_until

ROOT = Path(__file__).resolve().parents[3]
READ_AT_START = ("PYTHON", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
PREPARE = """
import gc, io, json, logging, os, signal, sys
from pathlib import Path
from conch.converters.parity import forked_python as forks
from conch.converters.parity.subprocess_model import SubprocessModel
from conch.errors import ConversionError
forks.LIBRARIES, forks.GPUS = ("numpy",), ()
"""
BOTH = """
def reply(fork):
    with SubprocessModel(Path(sys.argv[1]), fork) as model:
        try:
            return model.score([{"texts": ["a"]}], "cpu")
        except ConversionError as error:
            return str(error)
with forks.forked_python() as fork:
    print(json.dumps([fork is not None, reply(fork), reply(None)]))
"""
STATE = """
import gc, json, logging, os, signal, sys
import huggingface_hub
state = {
    "conch": [name for name in sys.modules if name.startswith("conch")],
    "path": sys.path, "words": sys.argv, "file": __file__, "name": __name__, "folder": os.getcwd(),
    "is_main": vars(sys.modules["__main__"]) is globals(),
    "environment": [os.environ.get(name) for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "SET")],
    "offline": huggingface_hub.is_offline_mode(),
    "bytecode": not sys.dont_write_bytecode,
    "collected": gc.isenabled(),
    "handlers": [number for number in signal.valid_signals() if callable(signal.getsignal(number))],
    "filters": len(logging.getLogger("transformers.modeling_utils").filters),
    "stdin": sys.stdin.read(),
}
print(json.dumps(state))
"""


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(READ_AT_START)}


def run(folder: Path, code: str, *options: str, **variables: str) -> Any:
    """What a program prints, which has a `model.py` run in `folder`."""
    command = [sys.executable, *options, "-c", PREPARE + code, str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env={**environment(), **variables}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_fork_is_as_a_new_python_would_be(tmp_path: Path) -> None:
    """Whatever the process was told that forks."""
    (tmp_path / "model.py").write_text(STATE)
    before = (
        "from conch.log import setup_logging; setup_logging(); gc.disable(); os.environ['SET'] = 'yes'\n"
        "signal.signal(signal.SIGTERM, print); sys.dont_write_bytecode = True; sys.path.insert(0, '/')\n"
    )
    is_fork, forked, fresh = run(tmp_path, before + BOTH)

    assert is_fork
    assert forked == fresh
    assert forked["conch"] == [] and forked["offline"] and forked["environment"] == ["1", "false", "yes"]


def test_module_that_a_library_made_in_memory_is_no_reason_against_a_fork(tmp_path: Path) -> None:
    """torch.distributed.nn has one, which claims a file; transformers imports it on Python 3.10."""
    (tmp_path / "model.py").write_text("print('[1]')")
    before = (
        "from importlib.machinery import ModuleSpec\nfrom types import ModuleType\n"
        "made = ModuleType('made')\nmade.__spec__ = ModuleSpec('made', None, origin='<made>.py')\n"
        "made.__spec__.has_location = True\nsys.modules['made'] = made\n"
    )
    assert run(tmp_path, before + BOTH) == [True, [1], [1]]


def test_fork_has_the_libraries_and_nothing_else(tmp_path: Path) -> None:
    """Neither a module of Conch nor what the process does with a library afterwards."""
    (tmp_path / "model.py").write_text(
        "import sys\nloaded = sorted(sys.modules)\nimport json\n"
        "numpy = sys.modules.get('numpy')\nprint(json.dumps([loaded, hasattr(numpy, 'changed')]))"
    )
    code = BOTH.replace("    print(", "    import numpy; numpy.changed = True\n    print(")
    is_fork, (loaded, is_changed), (fresh, _) = run(tmp_path, code)

    assert is_fork and "numpy" in loaded and "numpy" not in fresh
    assert not [name for name in loaded if name.startswith("conch")]
    assert not is_changed


@pytest.mark.parametrize(
    "program",
    [
        "import sys\ndef f():\n    raise ValueError('what')\nf()",
        "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise RuntimeError('then') from error",
        "import sys; sys.exit(3)",
        "import sys; sys.exit('a sentence')",
        "import sys; print('é', '\\udc80', file=sys.stderr); sys.exit(1)",
        "1 +",
        "import os, sys; os.write(2, b'one\\n'); print('two', file=sys.stderr); os.kill(os.getpid(), 9)",
        "raise KeyboardInterrupt",
    ],
)
def test_failure_is_reported_as_that_of_a_new_python(tmp_path: Path, program: str) -> None:
    (tmp_path / "model.py").write_text(program)
    is_fork, forked, fresh = run(tmp_path, BOTH)

    assert is_fork and forked == fresh
    assert forked.startswith("the converted model does not run outside this process:")


@pytest.mark.parametrize(
    "program",
    [
        "print('[1]', end='')",
        "import sys; print('[1]'); sys.stdout.close()",
        "import sys; print('[1]'); sys.__stdout__.flush()",
    ],
)
def test_output_comes_whole_and_once(tmp_path: Path, program: str) -> None:
    """Whatever the process that forks had still to write."""
    (tmp_path / "model.py").write_text(program)
    assert run(tmp_path, f"print('[', end='')\n{BOTH}print(']')") == [[True, [1], [1]]]


@pytest.mark.parametrize(
    ("before", "options", "variables"),
    [
        ("import types; sys.modules['torch'] = types.ModuleType('torch')", (), {}),
        (
            "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
            (),
            {},
        ),
        ("import _thread, time; _thread.start_new_thread(time.sleep, (60,))", (), {}),
        ("forks.GPUS = ('/dev/null',)", (), {}),
        ("import antigravity_", (), {"PYTHONPATH": "{}"}),
        ("", ("-O",), {}),
        ("", ("-W", "error"), {}),
        ("", (), {"PYTHONUTF8": "0", "LC_ALL": "C"}),
    ],
    ids=["used", "thread", "unknown thread", "gpu", "other path", "optimised", "warnings", "variable"],
)
def test_no_fork_where_a_new_python_would_be_another(
    tmp_path: Path, before: str, options: tuple[str, ...], variables: dict[str, str]
) -> None:
    (tmp_path / "antigravity_.py").touch()
    (tmp_path / "model.py").write_text("print('[1]')")
    variables = {name: value.format(tmp_path) for name, value in variables.items()}
    assert run(tmp_path, f"{before}\n{BOTH}", *options, **variables) == [False, [1], [1]]


def test_deadline_ends_the_wait_and_the_program(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("import time; time.sleep(600)")
    code = (
        "from conch.converters.parity import subprocess_model; subprocess_model._DEADLINE_S = 0.1\n"
        + BOTH
        + "print(json.dumps(fork.returncode), file=sys.stderr)"
    ).replace("[fork is not None,", "[fork and fork._pid,")
    pid, forked, fresh = run(tmp_path, code)

    assert forked == fresh == "the converted model did not score within 0 s"
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize(
    ("number", "place"), [(signal.SIGINT, "waits"), (signal.SIGINT, "runs"), (signal.SIGKILL, "waits")]
)
def test_fork_ends_with_the_process(tmp_path: Path, number: signal.Signals, place: str) -> None:
    """By Ctrl-C, which a terminal sends to both, and where nobody is left to end it."""
    (tmp_path / "model.py").write_text("import time; time.sleep(600)")
    waits = "print(fork._pid, flush=True); " + ("time.sleep(600)" if place == "waits" else "reply(fork)")
    code = f"import time\n{BOTH.partition('    print(')[0]}    {waits}"
    command = [sys.executable, "-c", PREPARE + code, str(tmp_path)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        fork = psutil.Process(int(process.stdout.readline()))
        try:
            if number == signal.SIGINT:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            assert process.wait(60) == -number
            wait_until(lambda: not fork.is_running(), lambda: "the fork goes on")
        finally:
            process.kill()
            with contextlib.suppress(psutil.NoSuchProcess):
                fork.kill()


def test_fork_without_a_locale_as_in_a_plain_container(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("print('[1]')")
    assert run(tmp_path, BOTH, LC_ALL="", LC_CTYPE="", LANG="") == [True, [1], [1]]


def test_fork_that_was_killed_before_it_was_told_is_a_conversion_that_failed(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("print('[1]')")
    kill = (
        "import time\n"
        "real = forks.ForkedPython.__init__\n"
        "def killed(self, path):\n"
        "    real(self, path)\n"
        "    os.kill(self._pid, signal.SIGKILL)\n"
        "    time.sleep(0.5)\n"
        "forks.ForkedPython.__init__ = killed\n"
    )
    code = BOTH.replace("reply(fork), reply(None)", "reply(fork)")
    is_fork, failure = run(tmp_path, kill + code)
    assert is_fork and failure.startswith("the converted model does not run outside this process:")


def test_fork_that_cannot_become_a_new_python_says_why(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("print('[1]')")
    # What the fork imports anew, after its own path is set: a file that stands in for the hub's library.
    (tmp_path / "huggingface_hub.py").write_text("raise RuntimeError('no hub here')")
    hide = (
        "real = forks._run_when_told\n"
        "def broken(*words):\n"
        "    for name in [name for name in sys.modules if name.startswith('huggingface_hub')]:\n"
        "        del sys.modules[name]\n"
        "    sys.path.insert(0, sys.argv[1])\n"
        "    real(*words)\n"
        "forks._run_when_told = broken\n"
    )
    is_fork, failure = run(tmp_path, hide + BOTH.replace("reply(fork), reply(None)", "reply(fork)"))
    assert is_fork and failure.startswith("the converted model does not run outside this process:")
    assert "RuntimeError: no hub here" in failure

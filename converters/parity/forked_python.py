"""A process that has imported torch and transformers already and otherwise is a new `python -I`.

Importing them takes a processor six seconds. A conversion does it once, and forks before it does anything
else with them: the fork waits until the written model can be run.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import locale
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import IO, NoReturn

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Variables of a process that runs a written model, beside those of this process."""

LIBRARIES = (
    "numpy",
    "safetensors.torch",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)
"""What the `model.py` of the python back end imports."""
GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_POLL_S = 0.02


@contextlib.contextmanager
def forked_python() -> Iterator[ForkedPython | None]:
    """Import the libraries, and yield a fork; leaving the context ends it.

    Yields None where the fork would not be as good as a new process: where torch was in use before, where
    other threads run, where `python -I` would import other files than this process did or has other options,
    and where there is a GPU, since CUDA does not live through a fork.
    """
    fork = None
    # As its import leaves it, torch has no model, no OpenMP threads and no settings that anybody chose.
    is_untouched = "torch" not in sys.modules and threading.active_count() == 1
    if is_untouched and sys.platform == "linux" and not any(map(os.path.exists, GPUS)):
        for library in LIBRARIES:
            importlib.import_module(library)
        path = _isolated_path()
        fork = None if path is None else _single_threaded_fork(path)
    if fork is None:
        yield None
        return
    with fork:
        yield fork


def _isolated_path() -> list[str] | None:
    """Return the `sys.path` of `python -I`; None where that would be another Python or find other modules."""
    # Not `utf8_mode`: in the C locale Python sets LC_CTYPE for its children, which then need none.
    decided = "[sys.warnoptions, sys.flags.optimize, locale.getpreferredencoding(False).lower()]"
    question = f"import json, locale, sys; print(json.dumps([sys.path, {decided}]))"
    command = [sys.executable, "-I", "-c", question]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        return None
    path, settings = json.loads(answer.stdout)
    if settings != [sys.warnoptions, sys.flags.optimize, locale.getpreferredencoding(False).lower()]:
        return None
    for name, module in [*sys.modules.items()]:  # a search may import more
        spec = getattr(module, "__spec__", None)
        is_left = "." not in name and name not in ("conch", "__main__", "__mp_main__")
        # What a library makes in memory, as torch.distributed.nn does, has a name in brackets for a file.
        if is_left and spec is not None and spec.has_location and not str(spec.origin).startswith("<"):
            found = PathFinder.find_spec(name, path)
            if found is None or found.origin != spec.origin:
                return None
    return path


def _single_threaded_fork(path: Sequence[str]) -> ForkedPython | None:
    """Fork; None where other threads run, whose locks nobody would release in the fork."""
    threads = Path("/proc/self/task")
    try:
        fork = ForkedPython(path)
    except OSError:  # no memory for a fork
        return None
    # OpenBLAS has threads from numpy's import on and ends them for a fork: so they are counted after it.
    if threads.exists() and len(os.listdir(threads)) == 1:
        return fork
    with fork:
        return None


class ForkedPython:
    """A fork of this process that runs one program, as `python -I program` would.

    It has of `subprocess.Popen` what `SubprocessModel` uses.

    path: the program's `sys.path`.
    """

    def __init__(self, path: Sequence[str]) -> None:
        self.program: Path | None = None
        self.returncode: int | None = None
        # Files, so that neither side waits for the other to read.
        self._streams = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115
        told, tell = os.pipe()
        self._tell = open(tell, "w", encoding="utf-8")  # noqa: SIM115
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()  # or the fork might write it once more
        own = os.getpid()
        try:
            self._pid = os.fork()
            if self._pid == 0:
                self._tell.close()
                _run_when_told(told, self._streams, path)
        except BaseException:
            if os.getpid() != own:  # the program has not begun, and the conversion quotes what it wrote
                traceback.print_exc()
                sys.stderr.flush()
            raise
        finally:
            if os.getpid() != own:  # whatever happens, the fork must not go on with the conversion
                os._exit(1)
            os.close(told)

    def __enter__(self) -> ForkedPython:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        with contextlib.suppress(BrokenPipeError):  # what a fork that is gone was told
            self._tell.close()
        self._wait(None)
        for stream in self._streams:
            stream.close()

    def communicate(self, text: str | None = None, timeout: float | None = None) -> tuple[str, str]:
        """Wait until the process has ended, and return what `program` wrote to stdout and to stderr.

        text: has the program begin, with this on stdin; None only waits.
        timeout: in seconds.

        Raises:
            subprocess.TimeoutExpired: the program runs for longer.
        """
        stdin, *outputs = self._streams
        if text is not None:
            stdin.write(text.encode())
            stdin.seek(0)  # the fork's place in the file, too
            with contextlib.suppress(BrokenPipeError):  # of a fork that is gone the exit code tells
                self._tell.write(json.dumps(str(self.program)) + "\n")
                self._tell.flush()
        self._wait(timeout)
        for output in outputs:
            output.seek(0)
        out, err = (output.read().decode(errors="replace") for output in outputs)
        return out, err

    def kill(self) -> None:
        """End the process at once."""
        if self._poll() is None:
            os.kill(self._pid, signal.SIGKILL)

    def _poll(self) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self._pid, os.WNOHANG)
            except ChildProcessError:
                # Whoever started this program has SIGCHLD ignored, as Popen expects too.
                pid, status = self._pid, 0
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def _wait(self, timeout: float | None) -> None:
        start = time.monotonic()
        while self._poll() is None:
            if timeout is not None and time.monotonic() - start > timeout:
                raise subprocess.TimeoutExpired(str(self.program), timeout)
            time.sleep(_POLL_S)


def _run_when_told(told: int, streams: Sequence[IO[bytes]], path: Sequence[str]) -> NoReturn:
    """Become a new Python, wait for a program's name, run the program and end.

    told: pipe that the name comes through; it closes without one when nothing is to be run.
    streams: stdin, stdout and stderr.
    """
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            is_interrupt = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_interrupt else signal.SIG_DFL)
    _replaced = sys.stdin, sys.stdout, sys.stderr  # kept: an end of theirs might close what is opened here
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(streams[number].fileno(), number)
        text = {"buffering": 1, "encoding": "utf-8", "errors": "backslashreplace", "closefd": False}
        setattr(sys, name, open(number, "w" if number else "r", **text))  # noqa: SIM115
    _forget_conch()
    os.environ.update(ENVIRONMENT)
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True  # read from the environment when it was imported
    sys.path[:] = path
    sys.dont_write_bytecode = False
    gc.freeze()
    gc.enable()
    with open(told, encoding="utf-8") as pipe:
        line = pipe.readline()
    code = _exit_code(json.loads(line)) if line else 0
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # the program may have closed it
            stream.flush()
    os._exit(code)  # what is registered for the exit belongs to the conversion


def _forget_conch() -> None:
    """Drop the modules of Conch, and what they told other modules' loggers."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "conch"]:
        del sys.modules[name]
    for logger in logging.root.manager.loggerDict.values():
        for each in [*getattr(logger, "filters", ())]:
            if type(each).__module__.startswith("conch."):
                logger.removeFilter(each)  # pyright: ignore[reportAttributeAccessIssue]


def _exit_code(program: str) -> int:
    """Run a Python file as `__main__`; return the exit code that its Python would have."""
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__file__ = program
    sys.argv[:] = [program]
    try:
        exec(compile(Path(program).read_bytes(), program, "exec"), main.__dict__)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException as error:
        trace = error.__traceback__
        error.__traceback__ = trace and trace.tb_next  # without this file's line
        sys.__excepthook__(type(error), error, error.__traceback__)
        return 1
    return 0

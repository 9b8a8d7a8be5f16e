"""Times, cores and spreads: what the benchmarks measure with, and what they say about the machine."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import IO, Any

import torch

from conch.errors import ConchError
from conch.machine.malloc import set_thresholds
from conch.servers.restart import PARENT_PID_VARIABLE

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-4
SILENCE_S = 1800.0
"""Longest wait for a process of a benchmark: one that has hung would hold the benchmark for ever."""

END_S = 60.0
"""Longest wait for the end of a process that was killed."""


def check_scores(scores: Mapping[str, list[float]]) -> None:
    """Hold all ways' scores against the first way's.

    Raises:
        ConchError: some differ by more than `TOLERANCE`, or are NaN.
    """
    names = list(scores)
    for name in names[1:]:
        differences = [abs(a - b) for a, b in zip(scores[names[0]], scores[name], strict=True)]
        wrong = [each for each in differences if not each <= TOLERANCE]  # so that NaN is wrong
        if wrong:
            worst = max(wrong)
            raise ConchError(f"{name} differs by {worst:.1e} from {names[0]}: there is nothing to compare")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and both ends."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def cell(figures: Mapping[str, float], digits: int) -> str:
    """A spread as tables show it: median (lowest-highest)."""
    return f"{figures['median']:.{digits}f} ({figures['low']:.{digits}f}-{figures['high']:.{digits}f})"


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its seconds."""
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def resident_bytes(of: str = "VmRSS") -> int:
    """Memory that this process holds, or with `VmHWM` the most it has held since `forget_peak`.

    Not `ru_maxrss`, which begins with what the parent process held.
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{of}:"):
            return int(line.split()[1]) * 1024
    raise ConchError(f"/proc/self/status has no {of}: memory cannot be measured here")


def forget_peak() -> None:
    """From here on, the peak is that of what follows; memory that glibc holds free is given back first."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def give_back_at_once() -> None:
    """Have glibc give large blocks back as they are freed, so that a peak of this process is one of what it
    uses, not of what it keeps; slower."""
    set_thresholds(2**16, 2**16)


def alone(module: str, *arguments: str) -> dict[str, Any]:
    """What a module prints last, one JSON object, run in a process of its own.

    Raises:
        ConchError: it fails; its own words stand above.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise ConchError(f"`{module} {' '.join(arguments)}` ended with code {done.returncode}")
    return json.loads(lines[-1])


class LineProcess:
    """A process that does something for each line that it is told, and answers with lines.

    It inherits stderr, and `exit_with_parent` in it notices when the benchmark is gone.

    name: of it in messages.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**(os.environ if environment is None else environment), **parent_variable()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input = self._process.stdin
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        # Reading a pipe has no deadline: a thread does it, and the queue has one.
        reader = threading.Thread(target=_put_lines, args=(self._process.stdout, self._lines), daemon=True)
        reader.start()

    def tell(self, line: str) -> None:
        """Send a line; `answer` says so where the process is gone."""
        with suppress(BrokenPipeError):
            self._input.write(line + "\n")
            self._input.flush()

    def end_input(self) -> None:
        """Tell it that no more lines will come."""
        with suppress(BrokenPipeError):
            self._input.close()

    def answer(self, prefix: str, timeout_s: float = SILENCE_S) -> str:
        """The rest of the next line that begins with `prefix`; others are what libraries say in between.

        Raises:
            ConchError: the process ends before it, or there is none within `timeout_s`.
        """
        until = time.monotonic() + timeout_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise ConchError(
                    f"the process of {self.name} lives, and has not answered within {timeout_s:g} s"
                ) from None
            if line is None:
                self._lines.put(None)  # for whoever asks again
                raise ConchError(
                    f"the process of {self.name} has ended{self._code()}; its own words stand above"
                )
            if line.startswith(prefix):
                return line.removeprefix(prefix).rstrip("\n")

    def wait(self, timeout_s: float = END_S) -> None:
        """Until it has ended by itself.

        Raises:
            ConchError: it has not, within `timeout_s`.
        """
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ConchError(f"the process of {self.name} does not end") from None

    def kill(self, grace_s: float = 0.0) -> None:
        """End it, whatever has happened. grace_s: time that it gets behind SIGTERM, in seconds."""
        try:
            if grace_s:
                self._process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(grace_s)
        finally:
            self._process.kill()
            self.end_input()
            self._process.wait(END_S)

    def _code(self) -> str:
        with suppress(subprocess.TimeoutExpired):  # it has closed its output, and ends next
            return f" with code {self._process.wait(1.0)}"
        return ""


def _put_lines(stream: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    """Put all lines of a stream into a queue, and None behind the last; closes the stream."""
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def parent_variable() -> dict[str, str]:
    """What a process below this one has in its environment, so that `exit_with_parent` in it ends it."""
    return {PARENT_PID_VARIABLE: str(os.getpid())}


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Bind this thread, and what it starts, to one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def require_cores(*cores: int) -> None:
    """Refuse cores that this process may not use.

    Raises:
        ConchError: names those that it may.
    """
    allowed = os.sched_getaffinity(0)
    if not allowed.issuperset(cores):
        raise ConchError(
            f"this process may use cores {sorted(allowed)}: choose --server-core and --client-core there"
        )


def machine() -> dict[str, Any]:
    """Processor, cores and versions, for a report."""
    return {
        "machine": {"cpu": _cpu_name(), "cores": os.cpu_count(), "platform": platform.platform()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """What every comparison on two cores is told."""
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        required=True,
        help="JSON lines (.gz or not) with `chosen` and `rejected` dialogues",
    )
    add("--layers", type=int, default=4, help="of the random GPT-2; default: %(default)s")
    add("--width", type=int, default=256, help="of the random GPT-2; default: %(default)s")
    add("--server-core", type=int, default=0, help="also the limit's; default: %(default)s")
    add("--client-core", type=int, default=1, help="default: %(default)s")
    add("--json", type=Path, help="also write every figure to this file")


def run(
    arguments: argparse.Namespace,
    measure: Callable[[argparse.Namespace, Path], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> int:
    """Measure on the client's core in a folder of its own, and print; returns the exit code."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def bound(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
        require_cores(arguments.server_core, arguments.client_core)
        with on_core(arguments.client_core):
            return measure(arguments, folder)

    return run_unbound(arguments, bound, table)


def run_unbound(
    arguments: argparse.Namespace,
    measure: Callable[[argparse.Namespace, Path], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> int:
    """Measure on any core in a folder of its own, and print; returns the exit code.

    Raises:
        SystemExit: with code 143, after SIGTERM.
    """
    try:
        with leaving_on_sigterm(), tempfile.TemporaryDirectory(prefix="conch-benchmark-") as folder:
            report = measure(arguments, Path(folder))
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except (ConchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(report))
    return 0


@contextmanager
def leaving_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM raises SystemExit, so that processes and folders of a benchmark end with it."""

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def head(arguments: argparse.Namespace) -> dict[str, Any]:
    """What every report begins with."""
    told = {key: str(value) for key, value in vars(arguments).items()}
    return {"date": date.today().isoformat(), **machine(), "arguments": told}


def add_policy_options(parser: argparse.ArgumentParser) -> None:
    """What benchmarks of rollouts and steps are told."""
    add = parser.add_argument
    add("--data", type=Path, help="HH dialogues, JSON lines (.gz or not); default: like lengths, drawn")
    add("--threads", type=int, default=os.cpu_count(), help="of torch; default: %(default)s")
    add("--json", type=Path, help="also write every figure to this file")
    add("--small", action="store_true", help="tiny shapes and few rows, to try the script itself")


def add_precision_option(parser: argparse.ArgumentParser) -> None:
    """Precision of steps: bf16 pays where the processor multiplies it (avx512_bf16, amx_bf16)."""
    help_text = "weights stay float32, products are of this; default: %(default)s"
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no", help=help_text)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.processor()

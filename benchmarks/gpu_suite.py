"""Correctness, speed and profiles of Conch on one GPU, in one command and at most eight minutes.

    python -m benchmarks.gpu_suite --out gpu-suite

Nothing is fetched: models are random weights of known shapes, with tokenizers made for them. First come
checks: slots against `transformers.generate`, packed rows against padded ones, flash-attention, Liger,
bfloat16, float16 with skipped updates, weights handed to vLLM. Then tokens/s, MFU, peak memory and idle gaps
of SFT, GRPO and PPO steps in the shapes of GPT-2 small (125M) and Llama 3.2 1B, of Conch, of plain
transformers and, where it is installed, of TRL; each with a profile by phase.

Each part has a process of its own: one that fails, or that CUDA fails under, stops no other. After each part
`gpu_suite.md` and `gpu_suite.json` are written anew. A part that would not fit into what is left of the
budget is left out and listed. `--small --device cpu` tries the program itself, in tiny shapes; its figures
say nothing. The card is the first that CUDA_VISIBLE_DEVICES names.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# So that libraries that look for a GPU when they are imported do not start CUDA, which no fork survives.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import psutil
import torch

from benchmarks.gpu import cards
from benchmarks.gpu.cases import ALGORITHMS, SHAPES
from benchmarks.gpu.checks import CHECKS, NOT_INSTALLED, lacks_packages
from benchmarks.gpu.report import markdown
from benchmarks.gpu.speed import measure
from benchmarks.gpu.trl_side import TRAINERS
from benchmarks.measuring import ROOT
from conch.atomic_files import replace_text
from conch.errors import ConchError

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.05
_CARD_S = 60.0
"""Longest time to try the device out; CUDA that does not live through a fork may hang instead of failing."""


@dataclass(frozen=True)
class Part:
    """One process of the suite.

    name: of a check, or `SIDE-ALGORITHM-SHAPE`.
    needs_s: seconds that it is let begin with at least: a guess, not a measurement.
    """

    name: str
    kind: str
    needs_s: float

    @property
    def words(self) -> set[str]:
        """What `--only` may name it by."""
        return {self.kind, *self.name.split("-")}


def plan(device: str, *, small: bool) -> list[Part]:
    """All parts, in their order: what matters most comes first."""
    tiny = small or device == "cpu"
    parts = [Part(name, "checks", 3.0 if tiny else 15.0) for name in CHECKS]
    for sides in (("conch", "plain"), ("trl",)):
        for shape in SHAPES:
            for algorithm in ALGORITHMS:
                for side in sides:
                    needs = 5.0 if tiny else 15.0 + 10.0 * (shape == "1b") + 10.0 * (algorithm != "sft")
                    parts.append(Part(f"{side}-{algorithm}-{shape}", "speed", needs))
    return parts


def chosen(parts: Sequence[Part], only: Sequence[str] | None) -> list[Part]:
    """The parts that have all words of one of those of `--only`: `grpo-1b` is GRPO's at 1B, of all sides.

    Raises:
        ConchError: one of `--only` fits no part.
    """
    if not only:
        return list(parts)
    for each in only:
        if not any(part.words.issuperset(each.split("-")) for part in parts):
            known = sorted(set[str]().union(*(part.words for part in parts)))
            raise ConchError(f"--only {each}: no such part; parts are named by {', '.join(known)}")
    return [part for part in parts if any(part.words.issuperset(each.split("-")) for each in only)]


# --------------------------------------------------------------------------------------- a part's own process


def run_part(name: str, device: str, small: bool, file: Path) -> None:
    """Run one part in this process, and write what it found to `file`, as soon as it is found."""
    found: dict[str, Any] = {}

    def note(figures: dict[str, Any]) -> None:
        found.update(figures)
        replace_text(file, json.dumps(found))

    if small:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="conch-gpu-suite-", dir=file.parent) as folder:
        if name == "card":
            note(cards.card(device))
        elif name in CHECKS:
            note({"lines": [asdict(line) for line in CHECKS[name](device, small, Path(folder))]})
        else:
            side, algorithm, shape = name.split("-")
            measure(
                side,
                algorithm,  # pyright: ignore[reportArgumentType]
                shape,
                device=device,
                small=small,
                folder=Path(folder),
                note=note,
            )
    note({"complete": True})


def _child(part: str, arguments: argparse.Namespace, file: Path, log: Path, *, fresh: bool) -> None:
    """Become the process of a part; does not return."""
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (
            os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2)
        )
        if fresh:
            os.chdir(ROOT)
            told = ["--device", arguments.device, *(["--small"] if arguments.small else [])]
            own = [sys.executable, "-m", "benchmarks.gpu_suite", "--alone", part, str(file), *told]
            os.execv(sys.executable, own)
        run_part(part, arguments.device, arguments.small, file)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Runner:
    """Runs parts one after the other, each in a fork of this process, which has imported everything and
    computes nothing. Where forks find no GPU, parts are started afresh instead.

    folder: gets a part's results and its log.
    until: `time.monotonic()` at which a part is killed.
    """

    def __init__(self, arguments: argparse.Namespace, folder: Path, until: float) -> None:
        self._arguments = arguments
        self._folder = folder
        self._until = until
        self._fresh = False
        self._group: int | None = None

    @property
    def left_s(self) -> float:
        """Seconds that the budget has left."""
        return self._until - time.monotonic()

    def card(self) -> dict[str, Any]:
        """What the card is; tries the device out.

        Raises:
            ConchError: nothing can be computed there.
        """
        found = self.run("card", _CARD_S)
        if not found.get("complete"):
            self._fresh = True
            found = self.run("card", _CARD_S)
        if not found.get("complete"):
            why = found.get("error", f"no answer within {_CARD_S:.0f} s")
            raise ConchError(f"nothing can be computed on {self._arguments.device}: {why}")
        return {**found, "processes": "fresh" if self._fresh else "forked"}

    def run(self, name: str, limit_s: float = float("inf")) -> dict[str, Any]:
        """What a part found, with its `seconds`; `error` where it failed, `cut_off` where its time was
        over."""
        file, log = self._folder / f"{name}.json", self._folder / f"{name}.log"
        file.unlink(missing_ok=True)
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _child(name, self._arguments, file, log, fresh=self._fresh)
        self._group = child
        code = self._wait(child, min(self._until, started + limit_s))
        found: dict[str, Any] = {}
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
        found["seconds"] = time.monotonic() - started
        if code is None:
            found["cut_off"] = True
        elif code != 0 or not found.get("complete"):
            found["error"] = _last_line(log) or f"ended with code {code}"
        return found

    def _wait(self, child: int, until: float) -> int | None:
        """Exit code of a child; None where it was killed because the time was over."""
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                self._end_group(child)  # what it started itself
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() >= until:
                self.kill()
                return None
            time.sleep(_POLL_S)

    def kill(self) -> None:
        """End the part that runs, and all that it started."""
        if self._group is not None:
            group = self._group
            self._end_group(group)
            try:
                os.kill(group, signal.SIGKILL)  # where it has no group of its own yet
                os.waitpid(group, 0)
            except (ProcessLookupError, ChildProcessError):
                return

    def _end_group(self, group: int) -> None:
        self._group = None
        try:
            os.killpg(group, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line.strip()[:500] for line in reversed(lines) if line.strip()), "")


# ------------------------------------------------------------------------------------------------- the suite


def missing(part: Part) -> str | None:
    """Why a part is not run at all; None where it is."""
    side, *rest = part.name.split("-")
    if side != "trl":
        return None
    if find_spec("trl") is None:
        return NOT_INSTALLED
    return None if rest[0] in TRAINERS else "TRL has no such trainer"


def run_suite(
    arguments: argparse.Namespace, parts: Sequence[Part], out: Path, began: float | None = None
) -> dict[str, Any]:
    """Run the parts, and write the report after each.

    began: `time.monotonic()` that the budget counts from; None for now.

    Raises:
        ConchError: the device cannot be used.
    """
    started = time.monotonic() if began is None else began
    (out / "parts").mkdir(parents=True, exist_ok=True)
    runner = Runner(arguments, out / "parts", started + arguments.budget_s)
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.gpu_suite", *arguments.argv]),
        "small": arguments.small,
        "device": arguments.device,
        "budget_s": arguments.budget_s,
        **cards.host(),
        "driver": None if arguments.device == "cpu" else cards.driver(),
        "checks": {},
        "speed": {},
        "left_out": {},
        "not_run": {},
    }

    def write() -> None:
        report["seconds"] = time.monotonic() - started
        replace_text(out / "gpu_suite.json", json.dumps(report, indent=1) + "\n")
        replace_text(out / "gpu_suite.md", markdown(report))

    try:
        report["card"] = runner.card()
        for part in parts:
            why = missing(part)
            if why is not None:
                report["not_run"][part.name] = why
            elif lacks_packages(part.name):
                found = CHECKS[part.name](arguments.device, arguments.small, out)
                report["checks"][part.name] = {"lines": [asdict(line) for line in found], "seconds": 0.0}
            elif runner.left_s < part.needs_s:
                report["left_out"][part.name] = {"needs_s": part.needs_s, "left_s": max(0.0, runner.left_s)}
            else:
                print(f"{part.name} ({runner.left_s:.0f} s left) ...", file=sys.stderr, flush=True)
                report[part.kind][part.name] = runner.run(part.name)
            write()
        report["complete"] = True
    finally:
        runner.kill()
        write()
    return report


def failures(report: dict[str, Any]) -> list[str]:
    """What failed: checks with a failed line, and parts that ended in an error."""
    named = [*report["checks"].items(), *report["speed"].items()]
    return [
        name
        for name, found in named
        if "error" in found or any(line["result"] == "failed" for line in found.get("lines", ()))
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    add("--small", action="store_true", help="tiny shapes, to try the program itself")
    add("--out", type=Path, default=Path("outputs/gpu-suite"), help="folder; default: %(default)s")
    add("--only", nargs="+", metavar="PART", help="`checks`, `speed`, `slots`, `conch`, `grpo-1b`, ...")
    add("--budget_s", type=float, default=480.0, help="seconds for all of it; default: %(default)g")
    add("--alone", nargs=2, metavar=("PART", "FILE"), help="only one part, in this process")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 with the report on stdout; 1 where a check or a part failed, or nothing can be computed."""
    arguments = _parser().parse_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    # One card: with several in sight, transformers' own trainer would spread a batch over all of them.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if arguments.device == "cpu" else visible.split(",")[0]
    if arguments.alone is not None:
        run_part(arguments.alone[0], arguments.device, arguments.small, Path(arguments.alone[1]))
        return 0
    signal.signal(signal.SIGTERM, _leave)
    try:
        parts = chosen(plan(arguments.device, small=arguments.small), arguments.only)
        imports_s = time.time() - psutil.Process().create_time()  # they count as well
        report = run_suite(arguments, parts, arguments.out.absolute(), time.monotonic() - imports_s)
    except (ConchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(markdown(report))
    failed = failures(report)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _leave(_signal: int, _frame: object) -> None:
    sys.exit(143)


if __name__ == "__main__":
    sys.exit(main())

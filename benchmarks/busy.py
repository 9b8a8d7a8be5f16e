"""How much slower training on a CPU becomes beside other programs, by how OpenMP's threads wait.

    python -m benchmarks.busy

Measured: PPO steps of the random walks from random weights, in a process of their own, alone and beside other
two-thread torch processes that never rest and wait as torch does by itself. Fair sharing of C cores among N
programs of T threads each makes it N * T / C times slower. Ways, in turn, round after round: `conch` is what
importing Conch sets, `libgomp` what OpenMP does by itself, and a number is GOMP_SPINCOUNT.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measuring import ROOT, LineProcess, cell, head, run_unbound, spread

LIBGOMP = "300000"
"""Turns that libgomp's threads spin before they sleep where nothing is set (its env.c)."""
_NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "KMP_BLOCKTIME")
WAYS = ("conch", "libgomp", "1000", "3000", "10000", "30000", "100000", "passive", "one thread")


def main(argv: Sequence[str]) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.busy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--ways", nargs="+", default=list(WAYS), metavar="WAY", help=f"default: {', '.join(WAYS)}")
    add(
        "--others",
        type=int,
        default=2,
        help="torch processes beside it; 0 measures alone; default: %(default)s",
    )
    add("--threads", type=int, default=2, help="of each process; default: %(default)s")
    add("--steps", type=int, default=6, help="timed, after one that is not; default: %(default)s")
    add("--rounds", type=int, default=3, help="default: %(default)s")
    add("--json", type=Path, help="also write every figure to this file")
    arguments = parser.parse_args(argv)
    return run_unbound(arguments, _measure, table)


def _measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    del folder  # each process has its own
    seconds: dict[str, dict[str, list[float]]] = {way: {"alone": [], "busy": []} for way in arguments.ways}
    for _ in range(arguments.rounds):
        for way, found in seconds.items():
            found["alone"].append(_steps(way, arguments))
            print(f"{way}, alone: {found['alone'][-1]:.2f} s", file=sys.stderr, flush=True)
        if not arguments.others:
            continue
        with _others(arguments.others, arguments.threads):
            for way, found in seconds.items():
                found["busy"].append(_steps(way, arguments))
                print(f"{way}, busy: {found['busy'][-1]:.2f} s", file=sys.stderr, flush=True)
    return {**head(arguments), "seconds": seconds}


def environment_of(way: str, threads: int) -> dict[str, str]:
    """The environment in which a way's process starts.

    way: one of `WAYS`, or turns of GOMP_SPINCOUNT.
    """
    own = {name: value for name, value in os.environ.items() if name not in _NAMES}
    own |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if way == "passive":
        return {**own, "OMP_WAIT_POLICY": "PASSIVE"}
    if way == "one thread":
        return {**own, "OMP_NUM_THREADS": "1"}
    if way == "conch":
        return own
    return {**own, "GOMP_SPINCOUNT": LIBGOMP if way == "libgomp" else way}


def _steps(way: str, arguments: argparse.Namespace) -> float:
    """Seconds of the timed steps, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.walks_steps", str(arguments.steps)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment_of(way, arguments.threads), stdout=subprocess.PIPE, check=True
    )
    return float(done.stdout.split()[-1])


@contextmanager
def _others(count: int, threads: int) -> Iterator[None]:
    """Other torch programs, which train the same without end."""
    with ExitStack() as stack:
        for _ in range(count):
            command = [sys.executable, "-m", "benchmarks.walks_steps", "0"]
            process = LineProcess("another program", command, environment_of("libgomp", threads))
            stack.callback(process.kill)
            process.answer("ready")  # its first step is done
        time.sleep(1.0)
        yield


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    seconds, machine, told = report["seconds"], report["machine"], report["arguments"]
    base = statistics.median(seconds.get("libgomp", next(iter(seconds.values())))["alone"])
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, torch {report['versions']['torch']}, {report['date']}; "
        f"{told['steps']} steps, beside {told['others']} others",
        "",
        "| way | alone, s | ratio to libgomp's | busy, s | times slower than libgomp's alone |",
        "|---|---|---|---|---|",
    ]
    for way, found in seconds.items():
        alone, busy = statistics.median(found["alone"]), "- | -"
        if found["busy"]:
            busy = f"{cell(spread(found['busy']), 2)} | {statistics.median(found['busy']) / base:.2f}"
        lines.append(f"| {way} | {cell(spread(found['alone']), 2)} | {alone / base:.2f} | {busy} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

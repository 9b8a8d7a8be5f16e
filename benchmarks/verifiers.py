"""Checks of GSM8K answers on one core: the four extractors, and math-verify called by itself.

    python -m benchmarks.verifiers --data test.jsonl.gz

Completions are GSM8K's solutions with the answer in 20 forms, right and wrong, whole and cut (see
`benchmarks.completions`). `math` runs as a trainer runs it: in a pool of one process, handed over and fetched
one by one, with a deadline of 5 s for each check. "math-verify" is its `parse` of the gold and of the
completion and its `verify`, called in this process with its own time limits on, as its README shows. All of
it shares one core, the pool's process included. Checks are counted per second of the clock and per second of
processor time, of both processes; the latter says what a core can do where other work takes turns on it. Each
round measures all ways one after another; the verdicts of `math` must be those of math-verify.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import psutil

from benchmarks.completions import Sample, make_samples, read_answers
from benchmarks.measuring import cell, head, on_core, run_unbound, spread, timed
from conch.config.verifiers import GSM8KConfig, GSM8KExtractor
from conch.errors import ConchError
from conch.rewards.verifiers.gsm8k import GSM8K
from conch.rewards.verifiers.pool import CheckPool

ALONE = "math-verify"
_WAYS = {extractor: f"`{extractor}`" for extractor in get_args(GSM8KExtractor)}
_WAYS |= {"math": "`math`, in a pool of one process", ALONE: "math-verify alone"}


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Checks per second of each way, and the ratio of `math` to math-verify in the same round, by processor
    time."""
    del folder
    samples = make_samples(read_answers(arguments.data), arguments.samples, seed=0)
    with on_core(arguments.core):
        rates = measure_rates(samples, arguments.rounds)
    by_cpu = {way: [cpu for _, cpu in of] for way, of in rates.items()}
    ratio = [ours / theirs for ours, theirs in zip(by_cpu["math"], by_cpu[ALONE], strict=True)]
    return {
        **head(arguments),
        "samples": len(samples),
        "characters": sum(len(sample.completion) for sample in samples) / len(samples),
        "checks_per_s": {way: spread([clock for clock, _ in of]) for way, of in rates.items()},
        "checks_per_cpu_s": {way: spread(of) for way, of in by_cpu.items()},
        "ratio": spread(ratio),
    }


def measure_rates(samples: Sequence[Sample], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Checks per second of the clock and of processor time, of each way in each round, once all are warm.

    Raises:
        ConchError: `math` and math-verify do not judge alike.
    """
    # math-verify, which is measured beside, reads the whole completion.
    settings: dict[str, Any] = {"version": "whole", "processes": 1}
    verifiers = {name: GSM8K(GSM8KConfig(extractor=name, **settings)) for name in get_args(GSM8KExtractor)}
    keys = [verifiers["math"].read_key({"answer": sample.answer}) for sample in samples]
    checks = [(sample.completion, key) for sample, key in zip(samples, keys, strict=True)]
    rates: dict[str, list[tuple[float, float]]] = {way: [] for way in _WAYS}
    with CheckPool(verifiers["math"]) as pool:

        def in_pool() -> list[bool]:
            futures = [pool.submit(completion, key) for completion, key in checks]
            return [future.result().facts["correct"] == 1 for future in futures]

        ways: dict[str, Callable[[], list[bool]]] = {
            name: lambda verifier=verifier: [
                verifier.verify(*check).facts["correct"] == 1 for check in checks
            ]
            for name, verifier in verifiers.items()
        }
        ways |= {"math": in_pool, ALONE: lambda: [judged_alone(*check) for check in checks]}
        for number in range(rounds + 1):
            verdicts: dict[str, list[bool]] = {}
            for name, way in ways.items():
                before = cpu_seconds()
                verdicts[name], seconds = timed(way)
                if number:
                    rates[name].append((len(checks) / seconds, len(checks) / (cpu_seconds() - before)))
            if verdicts["math"] != verdicts[ALONE]:
                raise ConchError("`math` and math-verify do not judge alike: there is nothing to compare")
    return rates


def cpu_seconds() -> float:
    """Processor time of this process and of the one that checks, in seconds, to 10 ms for the latter."""
    children = [child.cpu_times() for child in psutil.Process().children()]
    return time.process_time() + sum(times.user + times.system for times in children)


def judged_alone(completion: str, gold: str) -> bool:
    """What math-verify says by itself. It is imported here, as the library's own file does."""
    from math_verify import parse, verify

    return verify(parse(gold), parse(completion))


def table(report: dict[str, Any]) -> str:
    """As Markdown."""
    lines = ["| way | checks/s | checks per s of processor time |", "|---|---|---|"]
    for way, title in _WAYS.items():
        clock, cpu = (cell(report[of][way], 0) for of in ("checks_per_s", "checks_per_cpu_s"))
        lines.append(f"| {title} | {clock} | {cpu} |")
    characters = f"{report['samples']} completions of {report['characters']:.0f} characters on average"
    ratio = f"`math` over math-verify, by processor time: {cell(report['ratio'], 2)}"
    return "\n".join([*lines, "", f"{characters}; {ratio}"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.verifiers", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="rows of GSM8K, JSON lines (.gz or not) with `answer`")
    add("--samples", type=int, default=2000, help="completions; default: %(default)s")
    add("--rounds", type=int, default=5, help="default: %(default)s")
    add("--core", type=int, default=0, help="that all of it runs on; default: %(default)s")
    add("--json", type=Path, help="also write every figure to this file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 with the table on stdout, 1 after an error, told in a sentence on stderr."""
    return run_unbound(_parser().parse_args(argv), measure, table)


if __name__ == "__main__":
    sys.exit(main())

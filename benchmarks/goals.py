"""Texts per second of each goal, and of the four together, on one core.

    python -m benchmarks.goals --data harmless-base.jsonl.gz

Texts are the last answers of dialogues, of 30 to 110 words. Each round measures all ways one after another on
the same texts; a first one, which does not count, loads dictionaries and meets the words. "unknown words" has
no word that is in a dictionary or was met before, which is the worst that texts can be. "kept values" asks a
shared cache for all that the four measured. Texts are counted per second of the clock and per second of
processor time; the latter says what a core can do where other work takes turns on it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.measuring import cell, head, on_core, run_unbound, spread
from conch.errors import ConchError, DataError
from conch.rewards.goals import DEFAULT_GOALS, GoalSpace
from conch.rewards.goals.cache import SharedValues

TOGETHER, UNKNOWN, KEPT = "the four together", "the four, unknown words", "the four, kept values"
_FEWEST_WORDS, _MOST_WORDS = 30, 110


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Texts per second of each way, in each round."""
    texts = read_answers(arguments.data, arguments.texts)
    with on_core(arguments.core):
        rates = measure_rates(texts, arguments.rounds, folder)
    return {
        **head(arguments),
        "texts": len(texts),
        "words": fmean(len(text.split()) for text in texts),
        "texts_per_s": {way: spread([clock for clock, _ in of]) for way, of in rates.items()},
        "texts_per_cpu_s": {way: spread([cpu for _, cpu in of]) for way, of in rates.items()},
    }


def measure_rates(texts: Sequence[str], rounds: int, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Texts per second of the clock and of processor time, of each way in each round.

    Raises:
        ConchError: the four together give other values than each by itself.
    """
    spaces = {name: GoalSpace([name]) for name in DEFAULT_GOALS}
    spaces[TOGETHER] = GoalSpace(DEFAULT_GOALS)
    store = SharedValues(folder / "values", 10 * len(texts))
    spaces[KEPT] = GoalSpace(DEFAULT_GOALS, store=store)
    ways: dict[str, Callable[[], dict[str, list[float]]]] = {
        name: lambda space=space: space.measure(texts) for name, space in spaces.items()
    }
    ways[UNKNOWN] = lambda: spaces[TOGETHER].measure([_unknown(text) for text in texts])
    rates: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        values: dict[str, dict[str, list[float]]] = {}
        for name, way in ways.items():
            clock, cpu = time.perf_counter(), time.process_time()
            values[name] = way()
            seconds = time.perf_counter() - clock, time.process_time() - cpu
            if number:
                rates[name].append((len(texts) / seconds[0], len(texts) / seconds[1]))
        alone = {name: values[name][name] for name in DEFAULT_GOALS}
        if not alone == values[TOGETHER] == values[KEPT]:
            raise ConchError("the four goals together are not what each is by itself: nothing to compare")
    store.close()
    return rates


def _unknown(text: str) -> str:
    """The text with words that are in no dictionary, new ones each time."""
    return " ".join(f"{word}{random.randrange(36**6):x}" if word.isalpha() else word for word in text.split())


def read_answers(path: Path, number: int) -> list[str]:
    """Read the last answers of dialogues, in an order of their own.

    Raises:
        DataError: the file is none of dialogues, or has no such answers.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        texts = [
            row[side].rpartition("Assistant:")[2].strip() for row in rows for side in ("chosen", "rejected")
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} does not hold JSON lines with `chosen` and `rejected` dialogues") from error
    texts = [text for text in texts if _FEWEST_WORDS <= len(text.split()) <= _MOST_WORDS]
    if not texts:
        raise DataError(f"{path} has no answer of {_FEWEST_WORDS} to {_MOST_WORDS} words")
    random.Random(0).shuffle(texts)
    return texts[:number]


def table(report: dict[str, Any]) -> str:
    """As Markdown."""
    lines = ["| goal | texts/s | texts per s of processor time |", "|---|---|---|"]
    for way in report["texts_per_s"]:
        clock, cpu = (cell(report[of][way], 0) for of in ("texts_per_s", "texts_per_cpu_s"))
        lines.append(f"| {f'`{way}`' if way in DEFAULT_GOALS else way} | {clock} | {cpu} |")
    return "\n".join([*lines, "", f"{report['texts']} texts of {report['words']:.0f} words on average"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.goals", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add(
        "--data", type=Path, required=True, help="dialogues, JSON lines (.gz or not) with chosen and rejected"
    )
    add("--texts", type=int, default=2000, help="default: %(default)s")
    add("--rounds", type=int, default=5, help="default: %(default)s")
    add("--core", type=int, default=0, help="that all of it runs on; default: %(default)s")
    add("--json", type=Path, help="also write every figure to this file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 with the table on stdout, 1 after an error, told in a sentence on stderr."""
    return run_unbound(_parser().parse_args(argv), measure, table)


if __name__ == "__main__":
    sys.exit(main())

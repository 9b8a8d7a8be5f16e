"""Does a reward client that lives long grow? Memory, files and threads over 200,000 requests.

    python -m benchmarks.soak

One client, one real server, `--callers` threads that each ask for one batch after the other; every score is
held against the truth. The served model is a checksum (`tests/stores.py`), so that time goes into the client.
USS is what the process alone holds in memory, Python's garbage collected before each look. `--warm-up`
requests go before, until the allocator's pools have settled.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from conch.config import RewardClientConfig, RewardConfig
from conch.errors import ConchError
from conch.rewards.served import TritonReward
from conch.serving.server.server import TritonServer
from conch.types import Completion, Prompt, Rollout
from tests.stores import HASH_MODEL, hash_score, store_model

MODEL = "hash"
_NOTHING = Completion("", (), (), "length")
_MOST_GROWTH = 0.01


@dataclass(frozen=True, slots=True)
class Look:
    """What the process held after so many requests. uss, rss: bytes. files: sockets among them."""

    requests: int
    seconds: float
    uss: int
    rss: int
    files: int
    threads: int

    def row(self) -> str:
        """As a line of a Markdown table."""
        sizes = f"{self.uss / 2**20:.2f} | {self.rss / 2**20:.2f}"
        return f"| {self.requests:,} | {self.seconds:.0f} | {sizes} | {self.files} | {self.threads} |"


@dataclass(frozen=True, slots=True)
class Report:
    """All looks, the first one after the warm-up."""

    looks: tuple[Look, ...]

    @property
    def growth(self) -> float:
        """Of the USS from the first look to the last, as a share."""
        return self.looks[-1].uss / self.looks[0].uss - 1

    @property
    def leaks(self) -> bool:
        """Whether files or threads became more."""
        first, last = self.looks[0], self.looks[-1]
        return last.files > first.files or last.threads > first.threads

    def table(self) -> str:
        """As Markdown."""
        head = "| requests | s | USS, MiB | RSS, MiB | files and sockets | threads |\n" + "|---" * 6 + "|"
        rows = [look.row() for look in self.looks]
        return "\n".join([head, *rows, "", f"USS after the warm-up: {100 * self.growth:+.2f} %"])


def _batches(size: int) -> Iterator[list[Rollout]]:
    """Samples of 10 to 500 letters that never come again."""
    for number in itertools.count():
        texts = (f"{number} {place} " + "x" * ((number * 37 + place * 101) % 490) for place in range(size))
        yield [Rollout(Prompt(text, ()), _NOTHING, 0) for text in texts]


def _score(source: TritonReward, batch: list[Rollout]) -> None:
    for rollout, result in zip(batch, source.submit(batch).result(), strict=True):
        if not result.ok or result.scores["reward"] != hash_score(rollout.sample):
            raise ConchError(f"a wrong reward: {result}")


def _look(requests: int, started: float) -> Look:
    gc.collect()
    process = psutil.Process()
    memory = process.memory_full_info()
    elapsed = time.perf_counter() - started
    return Look(requests, elapsed, memory.uss, memory.rss, process.num_fds(), process.num_threads())


def soak(
    url: str, requests: int, *, warm_up: int = 0, callers: int = 8, batch: int = 4, looks: int = 10
) -> Report:
    """Send `requests` requests of `batch` samples through one client and look at the process in between.

    warm_up: requests before the first look counts; memory settles after some 60,000.

    Raises:
        ConchError: a score is missing or wrong.
    """
    every = requests // looks
    with (
        TritonReward(url, RewardConfig(client=RewardClientConfig(batch_rows=batch))) as source,
        ThreadPoolExecutor(callers) as pool,
    ):
        source.check()
        batches, taken = _batches(batch), []
        for _ in pool.map(lambda one: _score(source, one), itertools.islice(batches, warm_up)):
            pass
        started, sent_before = time.perf_counter(), source.stats().requests
        while (sent := source.stats().requests - sent_before) < requests:
            work = list(itertools.islice(batches, min(every - sent % every, requests - sent)))
            for _ in pool.map(lambda one: _score(source, one), work):
                pass
            del work
            if source.stats().requests - sent_before >= every * (len(taken) + 1):
                taken.append(_look(source.stats().requests - sent_before, started))
                print(taken[-1].row(), file=sys.stderr, flush=True)
    return Report(tuple(taken))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--requests", type=int, default=200_000, help="default: %(default)s")
    parser.add_argument(
        "--warm-up", type=int, default=60_000, help="requests before that; default: %(default)s"
    )
    parser.add_argument("--callers", type=int, default=8, help="threads that ask; default: %(default)s")
    parser.add_argument("--batch", type=int, default=4, help="samples a request; default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if nothing leaked and memory grew by less than 1 %, with the table on stdout; 1 if not."""
    arguments = _parser().parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="conch-soak-") as folder:
            store = Path(folder)
            store_model(store, MODEL, model_py=HASH_MODEL, golden_score=hash_score("ab"))
            with TritonServer(store, [MODEL]) as server:
                report = soak(
                    server.endpoint(MODEL),
                    arguments.requests,
                    warm_up=arguments.warm_up,
                    callers=arguments.callers,
                    batch=arguments.batch,
                )
    except ConchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report.table())
    return int(report.leaks or report.growth >= _MOST_GROWTH)


if __name__ == "__main__":
    sys.exit(main())

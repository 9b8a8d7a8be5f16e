"""Served samples a second against the limit: the same model called in process with the best batching.

    python -m benchmarks.serving --data harmless-base.jsonl.gz --json serving.json

One core serves, another asks. The limit runs on the server's core, alone: rows sorted by length, cut into
batches of as many padded tokens as proved fastest, one thread, inference mode. Limit and served forms take
turns, round by round, on the same texts, so that a machine that is busy for a while is busy for all. Their
scores are compared first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import dialogues, write_checkpoint
from benchmarks.limit import Limit, Work
from benchmarks.measuring import add_common_options, check_scores, machine, on_core, run, spread, timed
from conch.config import RewardConfig
from conch.converters.to_triton import to_triton
from conch.errors import ConchError
from conch.rewards.served import TritonReward
from conch.serving.server.server import TritonServer
from conch.store.manifest import Backend
from conch.triton.contract import Form
from conch.types import Rollout

FROM_TEXT, FROM_TOKENS = "in process, from text", "in process, from tokens"


@dataclass(frozen=True, slots=True)
class ServedAs:
    """One way of serving the model. limit: name of the way that it is compared with."""

    model: str
    form: Form
    backend: Backend
    limit: str

    @property
    def name(self) -> str:
        """As the table calls it."""
        engine = "python" if self.backend == "python" else f"{self.backend} in python"
        return f"served, {engine}, {self.form} form"


SERVED = (
    ServedAs("python-text", "text", "python", FROM_TEXT),
    ServedAs("python-token", "token", "python", FROM_TOKENS),
    ServedAs("onnx-token", "token", "onnx", FROM_TOKENS),
)


@dataclass(slots=True)
class Row:
    """Seconds of each round of one way of scoring.

    limit: name of the way that it is compared with; None for a limit.
    """

    name: str
    samples: int
    limit: str | None
    seconds: list[float] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Samples a second, round by round."""
        return [self.samples / seconds for seconds in self.seconds]


class Served:
    """Several callers, each with a client of its own, as the ranks of a training run have."""

    def __init__(self, url: str, callers: int, samples_per_call: int) -> None:
        self._clients = [TritonReward(url, RewardConfig()) for _ in range(callers)]
        self._pool = ThreadPoolExecutor(callers)
        self._samples_per_call = samples_per_call

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Each caller scores its share, one call after the other.

        Raises:
            ConchError: a sample was not scored.
        """
        share = -(-len(rollouts) // len(self._clients))
        shares = [rollouts[start : start + share] for start in range(0, len(rollouts), share)]
        return [
            score for scores in self._pool.map(self._score_share, self._clients, shares) for score in scores
        ]

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown()
        for client in self._clients:
            client.close()

    def _score_share(self, client: TritonReward, rollouts: Sequence[Rollout]) -> list[float]:
        scores = []
        for start in range(0, len(rollouts), self._samples_per_call):
            for result in client.submit(rollouts[start : start + self._samples_per_call]).result():
                if not result.ok:
                    raise ConchError(f"a sample was not scored: {result.detail}")
                scores.append(result.scores["reward"])
        return scores


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Convert, serve, check, and time all ways in turn."""
    texts = dialogues(arguments.data, arguments.samples)
    checkpoint = write_checkpoint(
        folder / "checkpoint", texts, layers=arguments.layers, width=arguments.width
    )
    limit = Limit(checkpoint, arguments.server_core)
    work = Work(texts, limit.encode(texts))
    for way in SERVED:
        store = folder / "store"
        to_triton(checkpoint, name=way.model, form=way.form, backend=way.backend, model_store=store)
    with ExitStack() as stack:
        with on_core(arguments.server_core):  # which the server's processes inherit
            server = stack.enter_context(TritonServer(folder / "store", [way.model for way in SERVED]))
        clients = {
            way: Served(server.endpoint(way.model), arguments.callers, arguments.call) for way in SERVED
        }
        for client in clients.values():
            stack.callback(client.close)
        ways = _ways(limit, clients, work)
        check_scores({name: way() for name, (way, _) in ways.items()})  # warms up, too
        limit.choose_budget(work.ids)
        rows = _take_turns(ways, arguments.rounds, len(texts))
    lengths = sorted(len(ids) for ids in work.ids)
    return _report(arguments, limit, rows, lengths)


def _ways(
    limit: Limit, clients: dict[ServedAs, Served], work: Work
) -> dict[str, tuple[Callable[[], list[float]], str | None]]:
    rollouts = work.rollouts()
    ways: dict[str, tuple[Callable[[], list[float]], str | None]] = {
        FROM_TEXT: (lambda: limit.score_texts(work.texts), None),
        FROM_TOKENS: (lambda: limit.score_tokens(work.ids), None),
    }
    for way, client in clients.items():
        ways[way.name] = (partial(client.score, rollouts), way.limit)
    return ways


def _take_turns(
    ways: dict[str, tuple[Callable[[], list[float]], str | None]], rounds: int, samples: int
) -> list[Row]:
    rows = {name: Row(name, samples, limit) for name, (_, limit) in ways.items()}
    for number in range(rounds):
        for name, (way, _) in list(ways.items())[:: 1 if number % 2 == 0 else -1]:
            rows[name].seconds.append(timed(way)[1])
            print(f"round {number + 1}: {name}: {rows[name].rates[-1]:.1f} samples/s", file=sys.stderr)
    return list(rows.values())


def _report(
    arguments: argparse.Namespace, limit: Limit, rows: Sequence[Row], lengths: Sequence[int]
) -> dict[str, Any]:
    by_name = {row.name: row for row in rows}
    results = []
    for row in rows:
        ratios = None
        if row.limit is not None:
            pairs = zip(row.rates, by_name[row.limit].rates, strict=True)
            ratios = [served / alone for served, alone in pairs]
        results.append(
            {**asdict(row), "samples_per_s": spread(row.rates), "ratio": ratios and spread(ratios)}
        )
    return {
        "date": date.today().isoformat(),
        **machine(),
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "tokens": {"median": statistics.median(lengths), "longest": lengths[-1], "all": sum(lengths)},
        "limit_tokens_per_batch": limit.budget,
        "results": results,
    }


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table: median (lowest-highest) over the rounds."""

    def cell(spread: dict[str, float] | None, digits: int) -> str:
        if spread is None:
            return "1"
        return f"{spread['median']:.{digits}f} ({spread['low']:.{digits}f}-{spread['high']:.{digits}f})"

    lines = ["| way | samples/s | of its limit |", "|---|---|---|"]
    for row in report["results"]:
        lines.append(f"| {row['name']} | {cell(row['samples_per_s'], 1)} | {cell(row['ratio'], 2)} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--samples", type=int, default=512, help="dialogues to score in a round; default: %(default)s")
    add("--rounds", type=int, default=7, help="default: %(default)s")
    add("--callers", type=int, default=4, help="clients at once; default: %(default)s")
    add("--call", type=int, default=64, help="samples that a caller asks for at once; default: %(default)s")
    add_common_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 with the table on stdout, 1 after an error, told in a sentence on stderr."""
    return run(_parser().parse_args(argv), measure, table)


if __name__ == "__main__":
    sys.exit(main())

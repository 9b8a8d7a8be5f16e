"""How fast rewards come: our client, a sequential one with fixed batches, one sample a POST, and the limit.

    python -m benchmarks.rewards --data harmless-base.jsonl.gz

One core serves, the other asks, whatever the way; the same random GPT-2 scores the same dialogues. The limit
is that model in process, alone on the server's core, with the best batching. The ways take turns, round by
round, so that a machine that is busy for a while is busy for all; their scores are compared first. Then a few
PPO steps with the reward served, and with the same reward in process on a second core.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.callers import Scored, Way, ask_all, conch_way, fixed_batches, one_a_post
from benchmarks.checkpoint import dialogues, write_checkpoint
from benchmarks.limit import Limit, Work
from benchmarks.measuring import add_common_options, cell, check_scores, machine, on_core, run, spread
from benchmarks.served_step import Steps, in_process, median_of, seconds_of
from conch.converters.to_triton import to_triton
from conch.errors import ServerStartError
from conch.serving.server.server import TritonServer, free_port

LIMIT, OURS = "in process, best batching", "Conch"
POST, FRONT = "one sample a POST", "one sample a POST, to Conch's reward server"
PADDED, MASKED = "sequential, batches of 24", "sequential, batches of 24, padding told by a mask"
TEXT, TOKEN = "text", "token"
_START_S = 400.0


@dataclass(slots=True)
class Row:
    """One way with so many callers; seconds and latencies (s) round by round."""

    way: str
    callers: int
    ask: Callable[[], tuple[Scored, float]]
    rates: list[float] = field(default_factory=list)
    mean_s: list[float] = field(default_factory=list)
    p50_s: list[float] = field(default_factory=list)
    p99_s: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As the table calls it."""
        return f"{self.way}, {self.callers} caller{'s' if self.callers > 1 else ''}"

    def take_turn(self) -> None:
        """Once over all samples."""
        scored, seconds = self.ask()
        known = sorted(after for _, after in scored)
        self.rates.append(len(scored) / seconds)
        self.mean_s.append(sum(known) / len(known))
        self.p50_s.append(known[len(known) // 2])
        self.p99_s.append(known[int(0.99 * len(known))])

    def report(self, others: Sequence[Row]) -> dict[str, Any]:
        """Figures, and the rate over that of each other way in the same round."""
        ratios = {
            other.name: spread([mine / its for mine, its in zip(self.rates, other.rates, strict=True)])
            for other in others
        }
        figures = {name: spread(getattr(self, name)) for name in ("rates", "mean_s", "p50_s", "p99_s")}
        return {"way": self.way, "callers": self.callers, **figures, "over": ratios}


@contextmanager
def _fastapi(checkpoint: Path, core: int) -> Iterator[str]:
    """The FastAPI server on its core; its URL, once it answers."""
    port = free_port("127.0.0.1")
    url = f"http://127.0.0.1:{port}"
    with on_core(core):
        command = [sys.executable, "-m", "benchmarks.fastapi_reward", str(checkpoint), str(port)]
        process = subprocess.Popen(command, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    try:
        deadline = time.monotonic() + _START_S
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServerStartError("the FastAPI server did not start; its own words stand above")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _front(endpoint: str, core: int) -> Iterator[str]:
    """`conch reward-server` before the served model, on the same core; its URL, once it answers."""
    port = free_port("127.0.0.1")
    settings = [f"reward={endpoint}", f"port={port}", "restart=false", "source.client.cache_size=0"]
    with on_core(core):
        process = subprocess.Popen([sys.executable, "-m", "conch.reward_server", *settings])
    try:
        deadline = time.monotonic() + _START_S
        while not _answers(f"http://127.0.0.1:{port}", "/"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServerStartError("the reward server did not start; its own words stand above")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/get_reward"
    finally:
        process.terminate()
        process.wait()


def _answers(url: str, path: str = "/score") -> bool:
    try:
        return httpx2.post(f"{url}{path}", json={"query": ["a"]}, timeout=10.0, trust_env=False).is_success
    except httpx2.TransportError:
        return False


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Convert, serve, check, time all ways in turn, then the PPO steps."""
    texts = dialogues(arguments.data, arguments.samples)
    checkpoint = write_checkpoint(
        folder / "checkpoint", texts, layers=arguments.layers, width=arguments.width
    )
    limit = Limit(checkpoint, arguments.server_core)
    work = Work(texts, limit.encode(texts), limit.pad)
    for form in (TEXT, TOKEN):
        to_triton(checkpoint, name=form, form=form, model_store=folder / "store")
    with ExitStack() as stack:
        with on_core(arguments.server_core):  # which the server's processes inherit
            server = stack.enter_context(
                TritonServer(folder / "store", [TEXT, TOKEN], ready_timeout_s=_START_S)
            )
        post_url = stack.enter_context(_fastapi(checkpoint, arguments.server_core))
        front_url = stack.enter_context(_front(server.endpoint(TEXT), arguments.server_core))
        rows = _rows(stack, limit, work, server, (f"{post_url}/score", front_url), arguments.callers)
        if not arguments.sequential:
            rows = [row for row in rows if row.way not in (PADDED, MASKED)]
        check_scores({row.name: [score for score, _ in row.ask()[0]] for row in rows})  # warms up, too
        limit.choose_budget(work.ids)
        _take_turns(rows, arguments.rounds)
        steps = Steps(folder, checkpoint, texts[:64], steps=arguments.steps + 1)
        rounds = arguments.ppo_rounds
        ppo = _ppo(steps, limit, server.endpoint(TEXT), rounds) if rounds else {}
    others = [row for row in rows if row.way != OURS]
    return {
        "date": date.today().isoformat(),
        **machine(),
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "limit_tokens_per_batch": limit.budget,
        "results": [row.report(others) for row in rows],
        "ppo": ppo,
    }


def _rows(
    stack: ExitStack,
    limit: Limit,
    work: Work,
    server: TritonServer,
    urls: tuple[str, str],
    callers: Sequence[int],
) -> list[Row]:
    """urls: of the FastAPI server, and of ours."""
    samples = len(work.texts)

    def in_this_process(places: Sequence[int]) -> Scored:
        started = time.perf_counter()
        scores = limit.score_texts([work.texts[place] for place in places])
        return [(score, time.perf_counter() - started) for score in scores]

    def opened(way: tuple[Way, Callable[[], None]]) -> Way:
        stack.callback(way[1])
        return way[0]

    def row(name: str, way: Way, callers: int) -> Row:
        return Row(name, callers, lambda: ask_all(way, callers, samples))

    ours = opened(conch_way(server.endpoint(TEXT), work))
    post, front = (opened(one_a_post(url, work)) for url in urls)
    unmasked = opened(fixed_batches(server.endpoint(TOKEN), work, masked=False))
    masked = opened(fixed_batches(server.endpoint(TOKEN), work, masked=True))
    return [
        row(LIMIT, in_this_process, 1),
        *(row(OURS, ours, count) for count in callers),
        row(PADDED, unmasked, 1),
        row(MASKED, masked, 1),
        *(row(POST, post, count) for count in callers),
        *(row(FRONT, front, count) for count in callers),
    ]


def _take_turns(rows: Sequence[Row], rounds: int) -> None:
    for number in range(rounds):
        for row in rows[:: 1 if number % 2 == 0 else -1]:
            row.take_turn()
            print(f"round {number + 1}: {row.name}: {row.rates[-1]:.1f} samples/s", file=sys.stderr)


def _ppo(steps: Steps, limit: Limit, url: str, rounds: int) -> dict[str, Any]:
    """Median seconds of a step both ways, their ratio run by run, and what of the reward was hidden."""
    served, local, ratios = [], [], []
    for _ in range(rounds):
        with_function, with_server = steps.run(in_process(limit)), steps.run(url)
        ratios.append(_step_s(with_server) / _step_s(with_function))
        local += with_function
        served += with_server
    return {
        "step_in_process_s": _step_s(local),
        "step_served_s": _step_s(served),
        "served_over_in_process": spread(ratios),
        "rollout_s": median_of(served, "time/rollout_s"),
        "wait_s": median_of(served, "reward/wait_s"),
        "hidden_fraction": median_of(served, "reward/hidden_fraction"),
    }


def _step_s(steps: Sequence[dict[str, float]]) -> float:
    return spread([seconds_of(step) for step in steps])["median"]


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: median (lowest-highest) over the rounds."""
    results = report["results"]
    lines = ["| way | callers | samples/s | mean, s | p50, s | p99, s |", "|---|---|---|---|---|---|"]
    for row in results:
        after = " | ".join(f"{row[name]['median']:.2f}" for name in ("mean_s", "p50_s", "p99_s"))
        lines.append(f"| {row['way']} | {row['callers']} | {cell(row['rates'], 1)} | {after} |")
    ours = [row for row in results if row["way"] == OURS]
    lines += ["", f"| {OURS} over | " + " | ".join(f"{row['callers']} callers" for row in ours) + " |"]
    lines.append("|---" * (1 + len(ours)) + "|")
    for name in ours[0]["over"]:
        lines.append(f"| {name} | " + " | ".join(cell(row["over"][name], 2) for row in ours) + " |")
    lines += _front_table(results)
    ppo = report["ppo"]
    if not ppo:
        return "\n".join(lines)
    lines += ["", "| PPO step | |", "|---|---|"]
    lines.append(f"| served over in process on a second core | {cell(ppo['served_over_in_process'], 3)} |")
    for name in ("step_served_s", "step_in_process_s", "rollout_s", "wait_s", "hidden_fraction"):
        lines.append(f"| {name} | {ppo[name]:.3f} |")
    return "\n".join(lines)


def _front_table(results: Sequence[dict[str, Any]]) -> list[str]:
    """What is asked of the reward server: its rate over the limit, its slowest over the other's median.

    And over the other's mean: it serves some callers at once and lets others wait, so its median says little.
    """
    plain = {row["callers"]: row for row in results if row["way"] == POST}
    lines = [
        "",
        "| reward server | rate over the limit | p99 over the p50 of the FastAPI server | over its mean |",
        "|---|---|---|---|",
    ]
    for row in results:
        if row["way"] == FRONT:
            slowest, other = row["p99_s"]["median"], plain[row["callers"]]
            slow, of_mean = (slowest / other[name]["median"] for name in ("p50_s", "mean_s"))
            over = next(figures for name, figures in row["over"].items() if name.startswith(LIMIT))
            lines.append(f"| {row['callers']} callers | {cell(over, 2)} | {slow:.2f} | {of_mean:.2f} |")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rewards", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--samples", type=int, default=256, help="dialogues to score in a round; default: %(default)s")
    add("--rounds", type=int, default=3, help="default: %(default)s")
    add("--callers", type=int, nargs="+", default=[1, 8, 64], help="default: %(default)s")
    add(
        "--no-sequential",
        dest="sequential",
        action="store_false",
        help="without the slow way of fixed batches",
    )
    add("--steps", type=int, default=4, help="PPO steps that count, a run; default: %(default)s")
    add("--ppo-rounds", type=int, default=2, help="pairs of PPO runs, 0 for none; default: %(default)s")
    add_common_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 with the tables on stdout, 1 after an error, told in a sentence on stderr."""
    return run(_parser().parse_args(argv), measure, table)


if __name__ == "__main__":
    sys.exit(main())

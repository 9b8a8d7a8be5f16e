"""Does a PPO run end the same when its reward server is killed again and again? Many seeded runs say.

    python -m benchmarks.chaos --runs 100

Each run is a small PPO with evaluations and a checkpoint, `reward.failure.policy=wait`, whose rewards the
real server gives. Meanwhile the server gets SIGKILL one to four times, at random moments, stays away for a
random while, longer or shorter than the client's deadline, and is started again on its port. Metrics,
evaluations and the weights at the end must equal those of a run that nothing disturbed, to the last bit;
times and counts of requests may differ. The served model scores a text the same in any batch, see
`tests/stores.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from conch.errors import ConchError
from conch.serving.server.server import TritonServer, free_port
from tests.runs import ppo_trainer
from tests.stores import HASH_MODEL, hash_score, store_model

MODEL = "hash"
_MOST_KILLS = 4
_LONGEST_AWAY_S = 2.0
_TRAFFIC = ("reward/mean", "reward/std", "reward/failed_fraction")
_SETTINGS: dict[str, Any] = {
    "ppo": {"rollouts_per_step": 16, "epochs": 2, "minibatches": 2},
    "generation": {"max_new_tokens": 6, "chunk_size": 4},
    # The longest outage holds two deadlines of two attempts each: retries and waiting both happen.
    "reward": {
        "client": {"request_timeout_s": 0.5, "deadline_s": 1.0, "batch_rows": 4},
        "failure": {"policy": "wait", "wait_budget_s": 120.0},
    },
}


class Tormentor:
    """Kills and restarts a server a few times, in a thread of its own.

    kills: so far.
    """

    def __init__(self, store: Path, port: int, seed: int, longest_up_s: float) -> None:
        """longest_up_s: the server lives for a random time of up to so long before each kill."""
        self.kills = 0
        self._random = random.Random(seed)
        self._longest_up_s = longest_up_s
        self._server = TritonServer(store, [MODEL], grpc_port=port)
        self._url = f"127.0.0.1:{port}/{MODEL}"
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._torment, name="tormentor")

    def __enter__(self) -> str:
        """Start the server; where it is. It lives until `begin`."""
        self._server.start()
        return self._url

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._server.stop()
        if error is None and self._error is not None:
            raise self._error

    def begin(self) -> None:
        """From now on it is killed."""
        self._thread.start()

    def _torment(self) -> None:
        try:
            for _ in range(self._random.randint(1, _MOST_KILLS)):
                if self._over.wait(self._random.uniform(0, self._longest_up_s)):
                    return
                os.kill(self._server.pid, signal.SIGKILL)
                self.kills += 1
                self._server.wait(timeout_s=60.0)
                self._server.stop()
                time.sleep(self._random.uniform(0, _LONGEST_AWAY_S))
                self._server.start()
        except BaseException as error:  # told by `__exit__`; without a server the run would wait in vain
            self._error = error


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to.

    metrics: the lines of `metrics.jsonl` without times and traffic, as text. weights: their SHA-256.
    """

    metrics: tuple[str, ...]
    weights: str

    @classmethod
    def of(cls, folder: Path) -> Outcome:
        """Read a finished run."""
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        digest = hashlib.sha256()
        checkpoints = folder / "checkpoints"
        for path in sorted(checkpoints.rglob("*.safetensors")):
            digest.update(str(path.relative_to(checkpoints)).encode() + path.read_bytes())
        return cls(tuple(_lasting(json.loads(line)) for line in lines), digest.hexdigest())

    def difference(self, other: Outcome) -> str:
        """The first thing in which they differ; "" if there is none."""
        for mine, others in zip(self.metrics, other.metrics, strict=False):
            if mine != others:
                return f"{mine} instead of {others}"
        if len(self.metrics) != len(other.metrics):
            return f"{len(self.metrics)} lines of metrics instead of {len(other.metrics)}"
        return "" if self.weights == other.weights else "other weights at the end"


def _lasting(row: dict[str, Any]) -> str:
    kept = {
        name: value
        for name, value in row.items()
        if name.startswith(_TRAFFIC) or not name.startswith(("time/", "reward/"))
    }
    return json.dumps(kept, sort_keys=True)


def train(folder: Path, url: str, steps: int, begin: Callable[[], None] = lambda: None) -> float:
    """One run in `folder`; seconds that it took once the trainer was made, when `begin` is called."""
    trainer = ppo_trainer(
        folder,
        reward_fn=url,
        **_SETTINGS,
        train={"run_dir": folder, "total_steps": steps, "eval_every": 3, "eval_repeats": 2, "keep_last": 1},
    )
    try:
        begin()
        started = time.perf_counter()
        trainer.fit()
        return time.perf_counter() - started
    finally:
        trainer.close()


@dataclass(frozen=True, slots=True)
class Tally:
    """What all disturbed runs together came to. seconds: of each; calm_s: of the undisturbed one."""

    calm_s: float
    seconds: tuple[float, ...]
    kills: tuple[int, ...]
    differences: tuple[str, ...]

    def table(self) -> str:
        """As Markdown."""
        lines = [
            "| runs | the same end | kills in all | kills a run | s a run | s undisturbed |",
            "|" + "---|" * 6,
        ]
        same = sum(not difference for difference in self.differences)
        kills = f"{min(self.kills)}-{max(self.kills)}"
        seconds = f"{min(self.seconds):.1f}-{max(self.seconds):.1f}"
        lines.append(
            f"| {len(self.kills)} | {same} | {sum(self.kills)} | {kills} | {seconds} | {self.calm_s:.1f} |"
        )
        return "\n".join(lines)


def chaos(folder: Path, runs: int, *, seed: int, steps: int, longest_up_s: float) -> Tally:
    """The undisturbed run and `runs` disturbed ones, one after the other; run n is seeded with seed + n."""
    store = folder / "store"
    store_model(store, MODEL, model_py=HASH_MODEL, golden_score=hash_score("ab"))
    port = free_port("127.0.0.1")
    with TritonServer(store, [MODEL]) as server:
        calm_s = train(folder / "calm", server.endpoint(MODEL), steps)
    calm = Outcome.of(folder / "calm")
    seconds, kills, differences = [], [], []
    for number in range(seed, seed + runs):
        tormentor = Tormentor(store, port, number, longest_up_s)
        with tormentor as url:
            seconds.append(train(folder / f"run_{number}", url, steps, tormentor.begin))
        kills.append(tormentor.kills)
        differences.append(Outcome.of(folder / f"run_{number}").difference(calm))
        said = differences[-1] or "the same end"
        print(f"run {number}: {kills[-1]} kills, {seconds[-1]:.1f} s, {said}", file=sys.stderr, flush=True)
    return Tally(calm_s, tuple(seconds), tuple(kills), tuple(differences))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--runs", type=int, default=100, help="disturbed runs; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the first run's kills; default: %(default)s")
    parser.add_argument("--steps", type=int, default=8, help="PPO steps a run; default: %(default)s")
    parser.add_argument(
        "--up", type=float, default=1.5, help="longest life of a server, s; default: %(default)s"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if every run ended as the undisturbed one, with the table on stdout; 1 if not."""
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="conch-chaos-") as folder:
            tally = chaos(
                Path(folder),
                arguments.runs,
                seed=arguments.seed,
                steps=arguments.steps,
                longest_up_s=arguments.up,
            )
    except ConchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(tally.table())
    return int(any(tally.differences))


if __name__ == "__main__":
    sys.exit(main())

"""Seconds of a GRPO step that a client drives over HTTP, against the same step in one process.

    python -m benchmarks.remote_step

Both sides have the same model, prompts, group size, lengths and settings, and a reward that takes no time.
One is a trainer with that reward as a function. The other is `python -m conch.service`, and a client in a
process of its own: it asks for the completions of a step's prompts, rewards them, and waits for the update.
The service notes all of that down on disk before it answers.

The policy of randomwalks, 16 prompts of 8 completions of 9 tokens, in blocks of 5 steps; then a GPT-2 shape
of 30 million weights, 8 prompts of 4 completions of 32 tokens, step by step. Weights are random, and never
end a completion by themselves.

The sides take turns, in an order that changes, each with `--threads` threads of torch. A ratio is of two
blocks of one round. The first rounds warm up. Tokens of every block are checked. Checkpoints are not part of
it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2LMHeadModel

from benchmarks.measuring import (
    END_S,
    ROOT,
    LineProcess,
    add_policy_options,
    cell,
    head,
    parent_variable,
    run_unbound,
    spread,
    timed,
)
from benchmarks.policies import Case, dialogue_case, walk_case
from conch.config import load
from conch.errors import ConchError, ServiceError, ServiceUnavailableError
from conch.servers.restart import exit_with_parent
from conch.service.client import TrainingClient, TrainingSettings
from conch.service.protocol import KEY_VARIABLE, RewardsRequest, RewardsResponse, StatusResponse
from conch.service.runs.settings import RemoteRunConfig, run_config
from conch.serving.server.server import free_port
from conch.trainers.grpo import GRPORunConfig, GRPOTrainer
from conch.types import Metrics

APART, TOGETHER = "service", "one process"
AIM = 1.08


@dataclass(frozen=True)
class Shape:
    """What a case is measured with.

    prompts: of a step.
    group: completions of a prompt.
    tokens: of a completion.
    block: steps that a side takes in one turn.
    rounds: turns of each side that count.
    """

    prompts: int
    group: int
    tokens: int
    block: int
    rounds: int

    @property
    def completions(self) -> int:
        """Of a step."""
        return self.prompts * self.group


_START_S = 120.0
_TURN_S = 300.0
"""Longest wait within a turn: for completions, for an update, and for a block of the other side."""

_IDLE_S = 2 * _TURN_S
"""A run whose client is gone ends; it is not asked for anything while the other side takes its turn."""

_RETRY_S = 2.0
"""A service that does not answer any more is looked at, instead of asked again for long."""

_LOG_LINES = 5
_KEY, _CLIENT = "key-of-a-benchmark", "benchmark"
_TRAINER = (sys.executable, "-m", "benchmarks.remote_step", "--alone")
_SERVICE = (sys.executable, "-m", "conch.service")


def never_end(model: GPT2LMHeadModel, eos_id: int) -> None:
    """Have a random model give its end no probability, whatever stands before it.

    One channel behind the last norm becomes 1 at all places, and only the end's row of the head reads it.
    """
    norm, head_rows = model.transformer.ln_f, model.lm_head.weight
    with torch.no_grad():
        head_rows[:, 0], norm.weight[0], norm.bias[0] = 0.0, 0.0, 1.0
        head_rows[eos_id, 0] = -1e4


def write_spec(folder: Path, case: Case, shape: Shape, threads: int, warm_up: int) -> Path:
    """Model, tokenizer and settings, for both sides."""
    model = case.model()
    never_end(model, case.eos_id)
    place = folder / "model"
    model.save_pretrained(place)
    case.tokenizer.save_pretrained(place)
    spec = {
        "scratch": str(folder),
        "prompts": [case.prompts[row % len(case.prompts)].text for row in range(shape.prompts)],
        "block": shape.block,
        "threads": threads,
        "tokens": shape.completions * shape.tokens,
        "settings": {
            "model_id": str(place),
            "max_completion_length": shape.tokens,
            "num_completions_per_prompt": shape.group,
            "training_batch_size": shape.prompts,
            # The policy stays what it is, so that it goes on never to end.
            "learning_rate": 1e-12,
            # One turn more than is taken: a run that ends saves, while the other side takes its turn.
            "max_steps": (warm_up + shape.rounds + 1) * shape.block,
            "save_every": 10**6,
            "overrides": {
                # Random weights have log-probs that round by more than the trial allows.
                "model": {"trial": False},
                "scheduler": {"name": "constant"},
                "generation": {"chunk_size": shape.completions},
                "grpo": {"kl": {"coef": 0.0}},
            },
        },
    }
    file = folder / "spec.json"
    file.write_text(json.dumps(spec), encoding="utf-8")
    return file


def reward_of(outputs: Sequence[str]) -> list[float]:
    """How many letters `a` each output has."""
    return [float(output.count("a")) for output in outputs]


# ------------------------------------------------------------------------------------ a trainer's process


class TurnTaker(GRPOTrainer):
    """Takes a block of steps for each line that comes in, within the loop of a run."""

    block = 1
    _left = 0
    _started = 0.0

    def step(self) -> Metrics:
        if not self._left:
            if not sys.stdin.readline():
                raise ConchError("the benchmark has ended")
            self._left, self._started = self.block, time.perf_counter()
        metrics = super().step()
        self._left -= 1
        if not self._left:
            rollouts = self.config.grpo.prompts_per_step * self.config.grpo.group_size
            said = {
                "seconds": (time.perf_counter() - self._started) / self.block,
                "tokens": round(metrics["rollout/length_mean"] * rollouts),
            }
            print("BLOCK " + json.dumps(said), flush=True)
        return metrics


def run_together(spec: dict[str, Any]) -> None:
    """The whole run, with the settings that the service makes of a client's."""
    exit_with_parent(lambda: os._exit(1))
    torch.set_num_threads(spec["threads"])
    folder = Path(spec["scratch"]) / "together"
    remote: RemoteRunConfig = run_config(TrainingSettings(**spec["settings"]), folder)
    config = load(GRPORunConfig, remote.model_dump(exclude={"reward"}))
    trainer = TurnTaker(config, reward=lambda outputs, **_: reward_of(outputs), prompts=spec["prompts"])
    trainer.block = spec["block"]
    try:
        trainer.fit()
    finally:
        trainer.close()


class Together:
    """The side of one process. command: starts it; the file of the spec comes behind."""

    name = TOGETHER

    def __init__(self, spec_file: Path, command: Sequence[str] = _TRAINER) -> None:
        environment = _environment(json.loads(spec_file.read_text(encoding="utf-8")))
        self._process = LineProcess("the trainer", [*command, str(spec_file)], environment)

    def take_block(self) -> tuple[float, int]:
        """Seconds of a step, and tokens of the last.

        Raises:
            ConchError: the process is gone or stuck.
        """
        self._process.tell("go")
        said = json.loads(self._process.answer("BLOCK ", _TURN_S))
        return said["seconds"], said["tokens"]

    def close(self) -> None:
        """At the end, whatever has happened."""
        self._process.kill()


# ------------------------------------------------------------------------------------- a service's client


class Apart:
    """The side of the service. This process is its client.

    command: starts the service; its settings come behind.
    """

    name = APART

    def __init__(self, spec_file: Path, command: Sequence[str] = _SERVICE) -> None:
        self._spec = spec = json.loads(spec_file.read_text(encoding="utf-8"))
        self._version = 0
        scratch, port = Path(spec["scratch"]), free_port("127.0.0.1")
        self._log = scratch / "service.log"
        settings = {"restart": "false", "port": port, "output_dir": scratch / "apart", "idle_s": _IDLE_S}
        with ExitStack() as opened:
            client = TrainingClient(
                f"http://127.0.0.1:{port}", _KEY, client_id=_CLIENT, wait_s=_TURN_S, retry_s=_RETRY_S
            )
            self._client = opened.enter_context(client)
            # A service that outlives the benchmark would hold its streams open.
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [*command, *(f"--{name}={value}" for name, value in settings.items())],
                    cwd=ROOT,
                    env={**_environment(spec), **parent_variable()},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            opened.callback(self._process.wait, END_S)
            opened.callback(self._process.kill)
            with self._explained():
                self._wait_until_it_answers()
                self._client.start(TrainingSettings(**spec["settings"]))
            self._opened = opened.pop_all()

    def take_block(self) -> tuple[float, int]:
        """Seconds of a step, and tokens of the last.

        Raises:
            ConchError: the service is gone or stuck, refuses, or does not learn.
        """
        with self._explained():
            _, seconds = timed(lambda: [self._step() for _ in range(self._spec["block"])])
            status = self._client.get_status()
        self._check_updates(status)
        length = status.metrics["rollout/length_mean"] or 0.0
        settings = self._spec["settings"]
        count = settings["training_batch_size"] * settings["num_completions_per_prompt"]
        return seconds / self._spec["block"], round(length * count)

    def close(self) -> None:
        """At the end, whatever has happened."""
        self._opened.close()

    def _step(self) -> None:
        groups = self._client.get_completions_batch(self._spec["prompts"])
        posts = [
            RewardsRequest.from_completions(each, reward_of(each.completions), _CLIENT) for each in groups
        ]
        posts[-1] = posts[-1].model_copy(update={"wait_s": _TURN_S})
        for reply in self._client.submit_rewards_batch(posts):
            if not isinstance(reply, RewardsResponse) or reply.outcome != "whole":
                raise ServiceError(f"the service does not learn from a step's group: {reply}")

    def _check_updates(self, status: StatusResponse) -> None:
        """See that each step of a block has been an update: rewards are answered though it fails."""
        self._version += self._spec["block"]
        run_id, version = status.model_version
        if status.state not in ("running", "finished") or version != self._version:
            raise ServiceError(
                f"run {run_id} is {status.state} with a model of version {version} instead of "
                f"{self._version}: {status.error or self._last_words()}"
            )

    def _wait_until_it_answers(self) -> None:
        until = time.monotonic() + _START_S
        while True:
            try:
                self._client.get_status()
                return
            except ServiceUnavailableError:
                if self._process.poll() is not None or time.monotonic() >= until:
                    raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Tell, of a service that does not answer, whether it still runs, and what it said last."""
        try:
            yield
        except ServiceUnavailableError as error:
            code = self._process.poll()
            state = "still runs" if code is None else f"has ended with code {code}"
            raise ServiceUnavailableError(f"{error}; the service {state}: {self._last_words()}") from error

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(["its log ends with", *lines[-_LOG_LINES:]]) if lines else "its log is empty"


def _environment(spec: dict[str, Any]) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("CONCH_SERVICE_")}
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**own, **quiet, "OMP_NUM_THREADS": str(spec["threads"]), KEY_VARIABLE: _KEY}


# ------------------------------------------------------------------------------------------ the comparison


def in_turns(sides: Sequence[Any], rounds: int, warm_up: int, tokens: int) -> dict[str, Any]:
    """Figures of one case: the service first, then what it is compared with.

    sides: with `name`, and `take_block` as above.
    tokens: that each step must have sampled.

    Raises:
        ConchError: one sampled others.
    """
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(warm_up + rounds):
        for side in sides[:: 1 if number % 2 == 0 else -1]:
            taken, sampled = side.take_block()
            if sampled != tokens:
                raise ConchError(f"{side.name} sampled {sampled} tokens in a step instead of {tokens}")
            if number >= warm_up:
                seconds[side.name].append(taken)
    apart, together = seconds.values()
    return {
        "tokens": tokens,
        "seconds": {name: spread(column) for name, column in seconds.items()},
        "ratio": spread([one / other for one, other in zip(apart, together, strict=True)]),
        "milliseconds": spread([1000 * (one - other) for one, other in zip(apart, together, strict=True)]),
    }


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One case after the other."""
    plan = [(walk_case(), Shape(16, 8, 9, block=5, rounds=arguments.rounds))]
    if arguments.large_rounds:
        large = dialogue_case(arguments.data)
        plan.append((large, Shape(8, 4, 32, block=1, rounds=arguments.large_rounds)))
    if arguments.small:
        tiny = dialogue_case(None, 8, 4, layers=1, width=64, max_prompt_tokens=24, max_new_tokens=24)
        plan = [(tiny, Shape(2, 2, 4, block=2, rounds=arguments.rounds))]
    results = []
    for case, shape in plan:
        print(f"{case.name} ...", file=sys.stderr)
        place = Path(tempfile.mkdtemp(dir=folder))
        spec_file = write_spec(place, case, shape, arguments.threads, arguments.warm_up)
        with ExitStack() as opened:
            sides = [opened.enter_context(closing(kind(spec_file))) for kind in (Apart, Together)]
            found = in_turns(sides, shape.rounds, arguments.warm_up, shape.completions * shape.tokens)
        results.append({"case": case.name, "completions": shape.completions, **found})
    return {**head(arguments), "results": results}


def table(report: dict[str, Any]) -> str:
    """As Markdown."""
    lines = [
        f"| policy | completions, tokens | {APART}, s | {TOGETHER}, s | ratio (aim: at most {AIM:g}) "
        "| difference, ms |",
        "|---|---|---|---|---|---|",
    ]
    for each in report["results"]:
        times = " | ".join(cell(each["seconds"][name], 3) for name in (APART, TOGETHER))
        figures = f"{cell(each['ratio'], 3)} | {cell(each['milliseconds'], 1)}"
        lines.append(f"| {each['case']} | {each['completions']}, {each['tokens']} | {times} | {figures} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.remote_step", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--rounds", type=int, default=10, help="of blocks that count; default: %(default)s")
    add(
        "--large-rounds",
        type=int,
        default=6,
        help="the same for the 30M GPT-2; 0 leaves it out; default: %(default)s",
    )
    add("--warm-up", type=int, default=2, help="rounds that do not count; default: %(default)s")
    add("--alone", type=Path, metavar="SPEC", help=argparse.SUPPRESS)
    add_policy_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 with the table on stdout, 1 after an error, told in a sentence on stderr."""
    arguments = _parser().parse_args(argv)
    if arguments.alone is not None:
        run_together(json.loads(arguments.alone.read_text(encoding="utf-8")))
        return 0
    return run_unbound(arguments, measure, table)


if __name__ == "__main__":
    sys.exit(main())

"""Is a prompt lost or learned from twice when a process of an asynchronous run is killed? Seeded runs say.

    python -m benchmarks.chaos_async --runs 60

Each run is a small asynchronous GRPO: an actor of Ray samples, the real server gives the rewards
(`reward.failure.policy=wait`), a checkpoint is saved every third step; every other run has two training
ranks. At a random moment, from the run's start to where undisturbed ones end, a random process of it
gets SIGKILL: a training rank, the launcher of two, the sampling actor, one of Ray's own (raylet, GCS,
agents), or the reward server, which comes back a little later; each kind is as likely, and `--kill` takes
one of them alone. A run that has ended before its last step is resumed, as often as it needs.

A run passes if it comes to its end, in time; if each step of its ledger has its groups and each prompt
was learned from once per epoch (`ledger_faults`); and if none of its processes is left. All together
pass if the mean reward of their last evaluations is that of undisturbed runs with other seeds, within
three standard errors.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.chaos_parts import Process, Watch, distance
from benchmarks.measuring import ROOT
from conch.errors import ConchError
from conch.serving.server.server import TritonServer, free_port
from conch.training.overlap.ledger import ledger_faults, read_ledger
from tests.runs import PROMPTS, async_grpo_trainer
from tests.stores import store_model

MODEL = "vowels"
_GROUPS, _GROUP_SIZE = 4, 8
_MAX_RESUMES = 4
_LONGEST_AWAY_S = 2.0
_LONGEST_RUN_S = 240.0
_INTO_LIFE_S = 3.0
_LOOK_S = 0.2

KINDS = ("rank", "actor", "raylet", "gcs", "ray", "reward server")
"""Of processes that are killed, and the launcher where there are two ranks. `ray`: its agents and workers."""

VOWELS_MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(pb_utils.get_input_tensor_by_name(request, "text")) for request in requests]

    def answer(self, texts):
        texts = texts.as_numpy()[:, 0]
        shares = [[sum(byte in b"aeiou" for byte in text) / max(1, len(text))] for text in texts]
        rewards = pb_utils.Tensor("rewards", np.array(shares, dtype=np.float32))
        return pb_utils.InferenceResponse(output_tensors=[rewards])
"""


# ------------------------------------------------------------------------------------------ the run itself


def train(folder: Path, url: str, steps: int, seed: int) -> None:
    """A run, or what is left of it, in this process or on this rank."""
    torch.set_num_threads(1)
    trainer = async_grpo_trainer(
        folder,
        reward_fn=url,
        optimizer={"learning_rate": 0.003},
        grpo={"prompts_per_step": _GROUPS, "group_size": _GROUP_SIZE, "minibatches": 1},
        asynchronous={"max_staleness": 2, "deadline_s": 60.0},
        rollout={"engine": "ray"},
        reward={
            "client": {"request_timeout_s": 1.0, "deadline_s": 2.0},
            "failure": {"policy": "wait", "wait_budget_s": 60.0},
        },
        train={
            "run_dir": folder,
            "seed": seed,
            "total_steps": steps,
            "save_every": 3,
            "keep_last": 1,
            "eval_every": steps,
            "eval_repeats": 16,
            "resume": "auto",
        },
    )
    try:
        trainer.fit()
    finally:
        trainer.close()


def kind_of(process: Process) -> str:
    """What a process of a run is for, in a word."""
    for part, kind in (
        ("ray::SamplerActor", "actor"),
        ("raylet/raylet", "raylet"),
        ("gcs_server", "gcs"),
        ("accelerate", "launcher"),
        ("--alone", "rank"),
    ):
        if part in process.command:
            return kind
    return "ray" if "ray" in process.command else "other"


# ------------------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class Outcome:
    """What became of a run. killed: kind of the process; faults: in words; reward: of its last evaluation."""

    killed: str
    ranks: int
    resumes: int
    seconds: float
    reward: float | None
    faults: tuple[str, ...]


class Rewards:
    """The reward server, which is killed and comes back."""

    def __init__(self, store: Path) -> None:
        self._server = TritonServer(store, [MODEL], grpc_port=free_port("127.0.0.1"))
        self._server.start()

    @property
    def url(self) -> str:
        """Of the model."""
        return self._server.endpoint(MODEL)

    def kill(self, away_s: float) -> None:
        """It is away for so long."""
        os.kill(self._server.pid, signal.SIGKILL)
        self._server.wait(timeout_s=60.0)
        self._server.stop()
        time.sleep(away_s)
        self._server.start()

    def stop(self) -> None:
        """At the end."""
        self._server.stop()


def one_run(
    folder: Path,
    rewards: Rewards,
    *,
    seed: int,
    ranks: int,
    steps: int,
    kind: str = "nothing",
    kill_after_s: float | None = None,
) -> Outcome:
    """A run to its end. kind: of the process that is killed. kill_after_s: moment; None kills nothing."""
    draw, watch, started = random.Random(seed), Watch(), time.monotonic()
    killed, resumes, faults = "nothing", -1, []
    log = (folder.parent / f"{folder.name}.log").open("w")
    try:
        while resumes < _MAX_RESUMES:
            resumes += 1
            process = _launch(folder, rewards.url, ranks=ranks, steps=steps, seed=seed, log=log)
            watch.add(process.pid)
            if kill_after_s is not None and resumes == 0:
                killed = _kill_one(watch, process, rewards, draw, kill_after_s, kind)
            try:
                code = process.wait(_LONGEST_RUN_S)
            except subprocess.TimeoutExpired:
                faults.append(f"it does not end within {_LONGEST_RUN_S:.0f} s")
                break
            if code == 0:
                break
        else:
            faults.append(f"it does not end in {_MAX_RESUMES} resumes, see its log")
        faults += watch.left(kind_of)
    finally:
        watch.stop()
        log.close()
        for process in watch.living():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
    faults += _ledger_faults(folder, steps)
    reward = _last_reward(folder)
    if reward is None:
        faults.append("it has no last evaluation")
    return Outcome(killed, ranks, resumes, time.monotonic() - started, reward, tuple(faults))


def _launch(
    folder: Path, url: str, *, ranks: int, steps: int, seed: int, log: Any
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.chaos_async", "--alone", str(folder), "--url", url]
    if ranks > 1:
        launcher = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--cpu",
            "--num_processes",
            str(ranks),
        ]
        port = ["--main_process_port", str(free_port("127.0.0.1"))]
        command = [*launcher, "--num_machines", "1", "--mixed_precision", "no", *port, *command[1:]]
    command += ["--steps", str(steps), "--seed", str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
    )


def _kill_one(
    watch: Watch,
    process: subprocess.Popen[bytes],
    rewards: Rewards,
    draw: random.Random,
    after_s: float,
    kind: str,
) -> str:
    """Kill a process of this kind at its moment; the kind.

    after_s: the moment. Where none of the kind lives then, it is a moment in the life of the next one: the
        actor, which is made last and ends first, lives for a part of a run only.
    """
    with suppress(subprocess.TimeoutExpired):
        process.wait(after_s)
        return "nothing: it was over"
    if kind == "reward server":
        rewards.kill(draw.uniform(0, _LONGEST_AWAY_S))
        return kind
    if not _living(watch, kind):
        while not _living(watch, kind):
            if process.poll() is not None:
                return "nothing: it was over"
            time.sleep(_LOOK_S)
        time.sleep(draw.uniform(0, _INTO_LIFE_S))
    victims = _living(watch, kind)
    if not victims:
        return "nothing: it was over"
    with suppress(ProcessLookupError):
        os.kill(draw.choice(sorted(victims, key=lambda each: each.pid)).pid, signal.SIGKILL)
    return kind


def _living(watch: Watch, kind: str) -> list[Process]:
    watch.look()
    return [each for each in watch.living() if kind_of(each) == kind]


def _ledger_faults(folder: Path, steps: int) -> list[str]:
    try:
        counts = Counter(line["step"] for line in read_ledger(folder))
        wrong = [step for step in range(1, steps + 1) if counts[step] != _GROUPS]
        extra = sorted(set(counts) - set(range(1, steps + 1)))
        faults = [f"step {step} has {counts[step]} groups instead of {_GROUPS}" for step in wrong]
        return faults + [f"there is a step {step}" for step in extra] + ledger_faults(folder, len(PROMPTS))
    except OSError as error:
        return [f"there is no ledger ({error})"]


def _last_reward(folder: Path) -> float | None:
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    values = [json.loads(line).get("eval/reward") for line in lines if line.endswith("}")]
    return values[-1] if values else None


# ------------------------------------------------------------------------------------------------ all runs


def chaos(folder: Path, arguments: argparse.Namespace) -> tuple[list[Outcome], list[Outcome]]:
    """Undisturbed runs, then disturbed ones; run n is seeded with seed + n."""
    store = folder / "store"
    store_model(store, MODEL, model_py=VOWELS_MODEL, golden_score=0.5)
    rewards = Rewards(store)
    calm: list[Outcome] = []
    disturbed: list[Outcome] = []
    try:
        for number in range(arguments.calm):
            seed, ranks = 1000 + arguments.seed + number, 1 + number % 2
            calm.append(
                one_run(
                    folder / f"calm_{number}",
                    rewards,
                    seed=seed,
                    ranks=ranks,
                    steps=arguments.steps,
                )
            )
            _tell(f"undisturbed {number}", calm[-1])
        longest = {
            ranks: statistics.median(each.seconds for each in calm if each.ranks == ranks) for ranks in (1, 2)
        }
        for number in range(arguments.seed, arguments.seed + arguments.runs):
            ranks = 1 + number % 2
            moment = random.Random(f"moment {number}").uniform(0.5, longest[ranks])
            kinds = [*KINDS, "launcher"] if ranks > 1 else [*KINDS]
            kind = arguments.kill or random.Random(f"kind {number}").choice(kinds)
            disturbed.append(
                one_run(
                    folder / f"run_{number}",
                    rewards,
                    seed=number,
                    ranks=ranks,
                    steps=arguments.steps,
                    kind=kind,
                    kill_after_s=moment,
                )
            )
            _tell(f"run {number}, kill at {moment:.1f} s", disturbed[-1])
    finally:
        rewards.stop()
    return calm, disturbed


def _tell(name: str, outcome: Outcome) -> None:
    said = "; ".join(outcome.faults) or "passed"
    reward = "none" if outcome.reward is None else f"{outcome.reward:.3f}"
    print(
        f"{name}: {outcome.killed} killed, {outcome.ranks} ranks, {outcome.resumes} resumes, "
        f"{outcome.seconds:.0f} s, reward {reward}: {said}",
        file=sys.stderr,
        flush=True,
    )


def _distance(calm: Sequence[Outcome], disturbed: Sequence[Outcome]) -> float:
    return distance([each.reward for each in calm], [each.reward for each in disturbed])


def table(calm: Sequence[Outcome], disturbed: Sequence[Outcome]) -> str:
    """As Markdown: a line for each kind of process that was killed."""
    lines = ["| killed | runs | passed | resumed | s a run | reward |", "|" + "---|" * 6]
    kinds = sorted({each.killed for each in disturbed})
    sides = [("nothing (undisturbed)", calm), *((k, [e for e in disturbed if e.killed == k]) for k in kinds)]
    for name, side in [*sides, ("all disturbed", disturbed)]:
        rewards = [each.reward for each in side if each.reward is not None]
        passed = sum(not each.faults for each in side)
        resumed = sum(each.resumes > 0 for each in side)
        seconds = f"{min(each.seconds for each in side):.0f}-{max(each.seconds for each in side):.0f}"
        reward = "none" if not rewards else f"{statistics.mean(rewards):.3f}"
        if len(rewards) > 1:
            reward += f" (sd {statistics.stdev(rewards):.3f})"
        lines.append(f"| {name} | {len(side)} | {passed} | {resumed} | {seconds} | {reward} |")
    lines += ["", f"Difference of the mean rewards: {_distance(calm, disturbed):.1f} standard errors"]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos_async", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--runs", type=int, default=60, help="disturbed runs; default: %(default)s")
    add("--calm", type=int, default=8, help="undisturbed ones; default: %(default)s")
    add("--kill", choices=KINDS, help="kind of the processes that are killed; default: any")
    add("--seed", type=int, default=0, help="of the first run; default: %(default)s")
    add("--steps", type=int, default=24, help="of a run; default: %(default)s")
    add("--keep", type=Path, help="folder for the runs and their logs; default: one that is deleted")
    add("--alone", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    add("--url", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if all runs passed, with the table on stdout; 1 if not."""
    arguments = _parser().parse_args(argv)
    if arguments.alone is not None:
        train(arguments.alone, arguments.url, arguments.steps, arguments.seed)
        return 0
    if arguments.calm < 2:
        print("error: `--calm` takes at least 2, one of each number of ranks", file=sys.stderr)
        return 1
    try:
        with tempfile.TemporaryDirectory(prefix="conch-chaos-") as scratch:
            folder = arguments.keep or Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            calm, disturbed = chaos(folder, arguments)
    except ConchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(calm, disturbed))
    faulty = any(each.faults for each in [*calm, *disturbed])
    return int(faulty or abs(_distance(calm, disturbed)) > 3)


if __name__ == "__main__":
    sys.exit(main())

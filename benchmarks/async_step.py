"""Seconds of an asynchronous GRPO step: against a synchronous one, and against the longer of its two halves.

    python -m benchmarks.async_step --data harmless-base.jsonl.gz

A GPT-2 shape of 30 million weights on the beginnings of dialogues. Its weights are random, but for one
channel of its last layer that makes it end a response with the same probability at each token: lengths
are geometric, with the mean of the answers in the data and much the same tail. Both trainers take the
same settings and sample in one actor of Ray; the asynchronous one with `max_staleness=1`, or what
`--max-staleness` says: a longer lead evens out steps whose lengths differ.

Each trainer has a process and an actor of its own, the trainer's process bound to one core, all that
Ray started to the other. They take turns in blocks of steps, in an order that changes. An asynchronous
block begins with full buffers and an idle sampler, so its first steps do not count; it ends when
its sampler has nothing more to do. The two halves are those of the synchronous steps: sampling, with
the weights sent before it, and the rest.

The same again with a sampler elsewhere: a rollout server that takes 2.5 s for a step's completions and
computes nothing (`benchmarks/waiting_sampler.py`).

The hand-over is measured after each asynchronous block: from its beginning until the actor holds the
weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2LMHeadModel

from benchmarks.measuring import (
    ROOT,
    LineProcess,
    add_policy_options,
    cell,
    head,
    require_cores,
    resident_bytes,
    run_unbound,
    spread,
    timed,
)
from benchmarks.policies import Case, dialogue_case
from conch.config import load
from conch.serving.server.server import free_port
from conch.trainers.async_grpo import AsyncGRPORunConfig, AsyncGRPOTrainer
from conch.trainers.grpo import GRPORunConfig, GRPOTrainer

SYNC, ASYNC = "synchronous", "asynchronous"
MAX_NEW_TOKENS = 128
_ELSEWHERE_S = 2.5
_MANY_STEPS = 100_000


def end_by_itself(model: GPT2LMHeadModel, eos_id: int, mean_length: float) -> None:
    """Have a random model end with probability 1 / mean_length at each token, whatever stands before it.

    One channel behind the last norm becomes 1 at all places, and only the end's row of the head reads it.
    """
    norm, head_rows = model.transformer.ln_f, model.lm_head.weight
    with torch.no_grad():
        head_rows[:, 0], norm.weight[0], norm.bias[0] = 0.0, 0.0, 1.0
        ids = torch.randint(eos_id, len(head_rows), (8, 64), generator=torch.Generator().manual_seed(0))
        for _ in range(4):
            ends = model(ids).logits.float().softmax(-1)[..., eos_id].mean().item()
            head_rows[eos_id, 0] += math.log((1 / mean_length) / ends)


def write_spec(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Model, tokenizer and settings, for all processes of a comparison."""
    shape = {"layers": 1, "width": 64} if arguments.small else {}
    case: Case = dialogue_case(
        arguments.data,
        max(arguments.prompts * 4, 32),
        max_prompt_tokens=arguments.prompt_tokens,
        max_new_tokens=MAX_NEW_TOKENS,
        **shape,
    )
    model, mean_length = case.model(), statistics.mean(case.expected)
    end_by_itself(model, case.eos_id, mean_length)
    place = folder / "model"
    model.save_pretrained(place)
    case.tokenizer.save_pretrained(place)
    return {
        "model": str(place),
        "scratch": str(folder),
        "prompts": [prompt.text for prompt in case.prompts],
        "weights": sum(weight.numel() for weight in model.parameters()),
        "mean_length": mean_length,
        "prompts_per_step": arguments.prompts,
        "group_size": arguments.group,
        "micro_batches": arguments.micro_batches,
        "slots": arguments.slots,
        "max_staleness": arguments.max_staleness,
        "cores": [arguments.server_core, arguments.client_core],
    }


# ------------------------------------------------------------------------------------- a trainer's process


def trainer_of(spec: dict[str, Any], kind: str, url: str | None) -> GRPOTrainer:
    """The trainer of one side. url: a server to sample from, instead of an actor."""
    completions = spec["prompts_per_step"] * spec["group_size"]
    # A sampler that computes nothing has log-probs of its own.
    rollout: dict[str, Any] = {"urls": url, "logprob_diff_alarm": None}
    if url is None:
        rollout = {"engine": "ray", "max_num_seqs": spec["slots"], "ray": {"samplers": 1, "num_cpus": 1}}
    settings = {
        "model": {"path": spec["model"]},
        # The policy stays what it is, so that all steps have responses of the same lengths.
        "optimizer": {"learning_rate": 1e-12},
        "scheduler": {"name": "constant"},
        "generation": {"max_new_tokens": MAX_NEW_TOKENS},
        "rollout": rollout,
        "grpo": {
            "prompts_per_step": spec["prompts_per_step"],
            "group_size": spec["group_size"],
            "minibatches": 1,
            "forward_batch_size": completions // spec["micro_batches"],
            "correction": {"kind": "truncate"},
            "kl": {"coef": 0.0},
        },
        "train": {
            "run_dir": f"{spec['scratch']}/{kind}-{'ray' if url is None else 'elsewhere'}",
            "total_steps": _MANY_STEPS,
            "eval_every": 0,
            "gradient_accumulation_steps": spec["micro_batches"],
        },
        "tracking": {"rollouts": False},
    }
    facts: dict[str, Any] = {"reward": reward, "prompts": spec["prompts"]}
    if kind == SYNC:
        return GRPOTrainer(load(GRPORunConfig, settings), **facts)
    settings["asynchronous"] = {"max_staleness": spec["max_staleness"]}
    return AsyncGRPOTrainer(load(AsyncGRPORunConfig, settings), **facts)


def reward(samples: Sequence[str], **_: Any) -> list[float]:
    """Share of vowels, in no time."""
    return [sum(letter in "aeiou" for letter in sample) / max(1, len(sample)) for sample in samples]


def take_blocks(spec: dict[str, Any], kind: str, url: str | None) -> None:
    """Steps for each line that comes in, which says how many; a line of JSON for each block."""
    torch.set_num_threads(1)
    server_core, client_core = spec["cores"]
    os.sched_setaffinity(0, {client_core})
    trainer = trainer_of(spec, kind, url)
    first = True
    for line in sys.stdin:
        if first:  # the actor starts with it
            trainer.step()
            first = False
        bind_descendants(server_core)
        if isinstance(trainer, AsyncGRPOTrainer):
            wait_until_idle(trainer)
        steps = []
        for _ in range(int(line)):
            metrics, seconds = timed(trainer.step)
            steps.append({"seconds": seconds, **metrics})
        hand_over_s = None
        if isinstance(trainer, AsyncGRPOTrainer):
            wait_until_idle(trainer)
            _, hand_over_s = timed(trainer.overlap.present_weights)
            wait_until_idle(trainer)
        print("BLOCK " + json.dumps({"steps": steps, "hand_over_s": hand_over_s}), flush=True)
    trainer.close()
    print("END " + json.dumps({"peak_bytes": resident_bytes("VmHWM")}), flush=True)


def wait_until_idle(trainer: AsyncGRPOTrainer) -> None:
    """Until every group that was admitted has been sampled and scored."""
    while trainer.overlap.buffer.counts()[1]:
        time.sleep(0.05)
    time.sleep(0.2)


def bind_descendants(core: int) -> None:
    """Bind all threads of all processes that this one has started, and theirs, to one core."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parents[int(stat.parent.name)] = int(
                stat.read_text(encoding="utf-8").rpartition(")")[2].split()[1]
            )
    ours = {os.getpid()}
    while further := {child for child, parent in parents.items() if parent in ours} - ours:
        ours |= further
    for pid in ours - {os.getpid()}:
        for task in Path(f"/proc/{pid}/task").glob("*"):
            with suppress(OSError):
                os.sched_setaffinity(int(task.name), {core})


# ------------------------------------------------------------------------------------------ the comparison


class Side:
    """One side's process."""

    def __init__(self, spec_file: Path, kind: str, url: str | None) -> None:
        self.kind = kind
        command = [sys.executable, "-m", "benchmarks.async_step", "--alone", str(spec_file), "--kind", kind]
        if url is not None:
            command += ["--url", url]
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = LineProcess(f"the {kind} trainer", command, {**os.environ, **quiet})

    def block(self, steps: int) -> dict[str, Any]:
        """What the steps took.

        Raises:
            ConchError: the process is gone or stuck.
        """
        self._process.tell(str(steps))
        return json.loads(self._process.answer("BLOCK "))

    def end(self) -> dict[str, Any]:
        """Have it close; what it says then."""
        self._process.end_input()
        told = json.loads(self._process.answer("END "))
        self._process.wait()
        return told

    def kill(self) -> None:
        """At the end, whatever has happened."""
        self._process.kill(grace_s=30.0)  # its cluster ends with it


@contextmanager
def waiting_server(spec: dict[str, Any]) -> Iterator[str]:
    """A sampler elsewhere; yields its address."""
    port = free_port("127.0.0.1")
    seconds = _ELSEWHERE_S / (spec["prompts_per_step"] * spec["group_size"])
    command = [sys.executable, "-m", "benchmarks.waiting_sampler", "--model", spec["model"]]
    command += ["--port", str(port), "--seconds", str(seconds), "--mean-length", str(spec["mean_length"])]
    process = subprocess.Popen(command, cwd=ROOT)
    os.sched_setaffinity(process.pid, {spec["cores"][0]})
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def compare(spec_file: Path, arguments: argparse.Namespace, urls: Sequence[str | None]) -> dict[str, Any]:
    """Figures of one case: both sides' blocks in turns. urls: of the sampler of each side."""
    # The first steps of an asynchronous block find their samples there, and do not count.
    warm_up = arguments.max_staleness + 1
    counts = {SYNC: arguments.sync_steps, ASYNC: arguments.async_steps + warm_up}
    rounds: list[dict[str, dict[str, float]]] = []
    with ExitStack() as opened:
        sides: list[Side] = []
        for kind, url in zip((SYNC, ASYNC), urls, strict=True):
            sides.append(Side(spec_file, kind, url))
            opened.callback(sides[-1].kill)
        for side in sides:
            side.block(1)  # warms up
        for number in range(arguments.rounds):
            blocks = {}
            for side in sides[:: 1 if number % 2 == 0 else -1]:
                blocks[side.kind] = side.block(counts[side.kind])
            rounds.append({SYNC: _sync_figures(blocks[SYNC]), ASYNC: _async_figures(blocks[ASYNC], warm_up)})
            print(f"round {number}: {rounds[-1]}", file=sys.stderr)
        ends = {side.kind: side.end() for side in sides}
    return {**_figures(rounds), "peak_bytes": {kind: end["peak_bytes"] for kind, end in ends.items()}}


def _sync_figures(block: dict[str, Any]) -> dict[str, float]:
    steps = block["steps"]
    sampling = statistics.mean(step["time/rollout_s"] for step in steps)
    seconds = statistics.mean(step["seconds"] for step in steps)
    tokens = statistics.mean(step["rollout/length_mean"] for step in steps)
    return {"seconds": seconds, "sampling": sampling, "training": seconds - sampling, "length": tokens}


def _async_figures(block: dict[str, Any], warm_up: int) -> dict[str, float]:
    steps = block["steps"][warm_up:]
    return {
        "seconds": statistics.mean(step["seconds"] for step in steps),
        "length": statistics.mean(step["rollout/length_mean"] for step in steps),
        "trainer_idle": statistics.mean(step["async/trainer_idle_fraction"] for step in steps),
        "sampler_idle": statistics.mean(step["async/sampler_idle_fraction"] for step in steps),
        "staleness": max(step["staleness/max"] for step in steps),
        "hand_over": block["hand_over_s"],
    }


def _figures(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Spreads over rounds; ratios are taken within a round."""
    halves = [max(each[SYNC]["sampling"], each[SYNC]["training"]) for each in rounds]
    seconds = [each[ASYNC]["seconds"] for each in rounds]
    columns = {
        "to_sync": [mine / each[SYNC]["seconds"] for mine, each in zip(seconds, rounds, strict=True)],
        "to_half": [mine / half for mine, half in zip(seconds, halves, strict=True)],
        "hand_over_share": [each[ASYNC]["hand_over"] / each[ASYNC]["seconds"] for each in rounds],
    }
    for kind in (SYNC, ASYNC):
        columns |= {f"{kind}/{name}": [each[kind][name] for each in rounds] for name in rounds[0][kind]}
    return {name: spread(values) for name, values in columns.items()}


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both cases, one after the other."""
    require_cores(arguments.server_core, arguments.client_core)
    spec = write_spec(folder, arguments)
    spec_file = folder / "spec.json"
    spec_file.write_text(json.dumps(spec), encoding="utf-8")
    results = {}
    if arguments.case in ("both", "actor"):
        results["actor of Ray"] = compare(spec_file, arguments, (None, None))
    if arguments.case in ("both", "elsewhere"):
        with waiting_server(spec) as first, waiting_server(spec) as second:
            results[f"elsewhere, {_ELSEWHERE_S} s"] = compare(spec_file, arguments, (first, second))
    return {**head(arguments), "weights": spec["weights"], "mean": spec["mean_length"], "results": results}


def table(report: dict[str, Any]) -> str:
    """As Markdown."""
    lines = [
        "| sampler | sampling, s | training, s | synchronous step, s | asynchronous step, s | to synchronous "
        "| to longer half | hand-over | idle: trainer, sampler |",
        "|" + "---|" * 9,
    ]
    for name, each in report["results"].items():
        columns = [cell(each[f"{SYNC}/{part}"], 2) for part in ("sampling", "training", "seconds")]
        columns += [cell(each[f"{ASYNC}/seconds"], 2), cell(each["to_sync"], 2), cell(each["to_half"], 2)]
        share = each["hand_over_share"]["median"]
        columns.append(f"{1000 * each[f'{ASYNC}/hand_over']['median']:.0f} ms, {share:.1%}")
        idle = [each[f"{ASYNC}/{side}_idle"]["median"] for side in ("trainer", "sampler")]
        columns.append(f"{idle[0]:.0%}, {idle[1]:.0%}")
        lines.append(f"| {name} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.async_step", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--case", choices=("both", "actor", "elsewhere"), default="both", help="default: %(default)s")
    add("--rounds", type=int, default=5, help="blocks of each side that count; default: %(default)s")
    add("--sync-steps", type=int, default=2, help="of a synchronous block; default: %(default)s")
    add(
        "--async-steps", type=int, default=6, help="of an asynchronous block that count; default: %(default)s"
    )
    add("--max-staleness", type=int, default=1, help="of the asynchronous side; default: %(default)s")
    add("--prompts", type=int, default=8, help="a step; default: %(default)s")
    add("--group", type=int, default=4, help="completions a prompt; default: %(default)s")
    add("--micro-batches", type=int, default=2, help="of an update; default: %(default)s")
    add("--slots", type=int, default=8, help="completions sampled at once; default: %(default)s")
    add("--prompt-tokens", type=int, default=16, help="longest prompt; default: %(default)s")
    add("--server-core", type=int, default=0, help="of actor or server; default: %(default)s")
    add("--client-core", type=int, default=1, help="of the trainer; default: %(default)s")
    add("--alone", type=Path, metavar="SPEC", help=argparse.SUPPRESS)
    add("--kind", choices=(SYNC, ASYNC), help=argparse.SUPPRESS)
    add("--url", help=argparse.SUPPRESS)
    add_policy_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 with the table on stdout, 1 after an error, told in a sentence on stderr."""
    arguments = _parser().parse_args(argv)
    if arguments.alone is not None:
        take_blocks(json.loads(arguments.alone.read_text(encoding="utf-8")), arguments.kind, arguments.url)
        return 0
    return run_unbound(arguments, measure, table)


if __name__ == "__main__":
    sys.exit(main())

"""Seconds of a GRPO step: ours against that of TRL's trainer, with the same model, batch and lengths.

    python -m venv trl-env && trl-env/bin/pip install torch==2.13.0 trl
    python -m benchmarks.grpo_step --trl-python trl-env/bin/python --data harmless-base.jsonl.gz

Randomwalks: 16 prompts of 8 completions, each of 9 tokens, one update of one micro-batch, without a reference
and with one. Then a GPT-2 shape of 30 million weights: 8 HH prompts of 4 completions that are as long as the
answer there, 4 micro-batches. Weights are random; both sides' rows end where `benchmarks/forced_lengths.py`
lets them. Both compute in float32 (`--mixed-precision bf16`: under autocast, on weights in float32) with the
same loss, sample all completions in one batch and take their own optimizer; TRL without gradient
checkpointing, which is on by default (`--trl-checkpoints` leaves it on).

Each side has a process and an environment of its own, and both wait until they are told to take a step: they
take turns, step by step, in an order that changes. A step is rollout, rewards, log-probs and update, without
logging or saving. The first steps warm up. Tokens of every step are checked.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.forced_lengths import EndAt
from benchmarks.measuring import (
    LineProcess,
    add_policy_options,
    add_precision_option,
    cell,
    head,
    resident_bytes,
    run_unbound,
    spread,
    timed,
)
from benchmarks.policies import Case, case_of, forced_engine
from conch.config import load
from conch.errors import ConchError
from conch.machine.processors import SPINS
from conch.servers.restart import exit_with_parent
from conch.trainers.grpo import GRPORunConfig, GRPOTrainer

OURS, THEIRS = "Conch", "TRL"
BETA = 0.04
SHAPES = {"walks": (16, 8, 1), "dialogues": (8, 4, 4)}
"""Prompts a step, completions a prompt, micro-batches."""


def write_spec(
    folder: Path,
    case: Case,
    name: str,
    beta: float,
    steps: int,
    threads: int,
    *,
    trl_checkpoints: bool = False,
    mixed_precision: str = "no",
) -> Path:
    """Model, tokenizer and what both sides must know of them."""
    prompts_per_step, group_size, micro_batches = SHAPES[name]
    if case.lengths is None:
        prompts, lengths = list(dict.fromkeys(prompt.text for prompt in case.prompts)), []
    else:  # all of them in every step, so that every step has the same tokens
        prompts, lengths = [prompt.text for prompt in case.prompts[:prompts_per_step]], case.lengths
    prompts_per_step = min(prompts_per_step, len(prompts))
    model = folder / "model"
    case.model().save_pretrained(model)
    case.tokenizer.save_pretrained(model)
    spec = {
        **{"model": str(model), "scratch": str(folder / "scratch"), "prompts": prompts, "lengths": lengths},
        **{"eos_id": case.eos_id, "first_marker": case.first_marker, "max_new_tokens": case.max_new_tokens},
        **{"prompts_per_step": prompts_per_step, "group_size": group_size, "micro_batches": micro_batches},
        **{"beta": beta, "learning_rate": 1e-4, "steps": steps, "threads": threads},
        **{"trl_checkpoints": trl_checkpoints, "mixed_precision": mixed_precision},
    }
    file = folder / "spec.json"
    file.write_text(json.dumps(spec), encoding="utf-8")
    return file


def tokens_of(spec: dict[str, Any]) -> int:
    """Response tokens of a step."""
    if not spec["lengths"]:
        return spec["prompts_per_step"] * spec["group_size"] * spec["max_new_tokens"]
    return spec["group_size"] * sum(spec["lengths"][: spec["prompts_per_step"]])


def our_trainer(spec: dict[str, Any]) -> GRPOTrainer:
    """Our side, set as TRL's."""
    completions = spec["prompts_per_step"] * spec["group_size"]
    settings = {
        "model": {"path": spec["model"]},
        "optimizer": {"learning_rate": spec["learning_rate"]},
        "scheduler": {"name": "constant"},
        "generation": {"max_new_tokens": spec["max_new_tokens"], "chunk_size": completions},
        "grpo": {
            "prompts_per_step": spec["prompts_per_step"],
            "group_size": spec["group_size"],
            "epochs": 1,
            "minibatches": 1,
            "forward_batch_size": completions // spec["micro_batches"],
            "kl": {"coef": spec["beta"]},
        },
        "train": {
            "run_dir": f"{spec['scratch']}/run",
            "total_steps": spec["steps"],
            "eval_every": 0,
            "gradient_accumulation_steps": spec["micro_batches"],
            "mixed_precision": spec["mixed_precision"],
        },
        "tracking": {"rollouts": False},
    }
    trainer = GRPOTrainer(
        load(GRPORunConfig, settings),
        reward=lambda samples, **_: [float(sample.count("a")) for sample in samples],
        prompts=spec["prompts"],
    )
    end_at = EndAt(spec["eos_id"], spec["first_marker"], spec["lengths"])
    trainer.sampler = forced_engine(trainer, end_at)
    return trainer


def take_our_steps(spec: dict[str, Any]) -> None:
    """One for each line that comes in."""
    torch.set_num_threads(spec["threads"])
    trainer = our_trainer(spec)
    completions = spec["prompts_per_step"] * spec["group_size"]
    for _ in range(spec["steps"]):
        if not sys.stdin.readline():
            return
        metrics, seconds = timed(trainer.step)
        tokens = round(metrics["rollout/length_mean"] * completions)
        print("STEP " + json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)
    trainer.close()
    print("END " + json.dumps({"peak_bytes": resident_bytes("VmHWM"), "versions": {}}), flush=True)


class Worker:
    """One side's process."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if environment.get("GOMP_SPINCOUNT") == SPINS:  # by `import conch` here, not by who runs this
            del environment["GOMP_SPINCOUNT"]
        self._process = LineProcess(name, command, environment)

    def step(self, tokens: int) -> float:
        """Seconds of one step.

        Raises:
            ConchError: the process is gone or stuck, or its responses have other than so many tokens in all.
        """
        self._process.tell("go")
        told = json.loads(self._process.answer("STEP "))
        if told["tokens"] != tokens:
            raise ConchError(f"{self.name} sampled {told['tokens']} tokens in a step instead of {tokens}")
        return told["seconds"]

    def end(self) -> dict[str, Any]:
        """What it says after its last step."""
        return json.loads(self._process.answer("END "))

    def kill(self) -> None:
        """At the end, whatever has happened."""
        self._process.kill()


def compare(spec_file: Path, trl_python: Path, warm_up: int) -> dict[str, Any]:
    """Start both sides and let them take turns."""
    spec = json.loads(spec_file.read_text(encoding="utf-8"))
    commands = {
        OURS: [sys.executable, "-m", "benchmarks.grpo_step", "--alone", str(spec_file)],
        THEIRS: [str(trl_python.absolute()), "-m", "benchmarks.trl_step", str(spec_file)],
    }
    with ExitStack() as opened:
        workers: list[Worker] = []
        for name, command in commands.items():
            workers.append(Worker(name, command))
            opened.callback(workers[-1].kill)
        return in_turns(spec, workers, warm_up)


def in_turns(spec: dict[str, Any], workers: Sequence[Worker], warm_up: int) -> dict[str, Any]:
    """Figures of one case: our worker first, then the one it is compared with."""
    seconds: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for number in range(spec["steps"]):
        for worker in workers[:: 1 if number % 2 == 0 else -1]:
            taken = worker.step(tokens_of(spec))
            if number >= warm_up:
                seconds[worker.name].append(taken)
    ends = {worker.name: worker.end() for worker in workers}
    mine, theirs = seconds.values()
    return {
        "completions": spec["prompts_per_step"] * spec["group_size"],
        "response_tokens": tokens_of(spec),
        "beta": spec["beta"],
        "seconds": {name: spread(column) for name, column in seconds.items()},
        "peak_bytes": {name: end["peak_bytes"] for name, end in ends.items()},
        "trl_versions": ends[THEIRS]["versions"],
        "ratio": spread([ours / other for ours, other in zip(mine, theirs, strict=True)]),
    }


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One case after the other."""
    plan = [("walks", 0.0, arguments.steps, 3), ("walks", BETA, arguments.steps, 3)]
    if arguments.dialogue_steps:
        plan.append(("dialogues", BETA, arguments.dialogue_steps, 1))
    results = []
    for number, (name, beta, steps, warm_up) in enumerate(plan):
        print(f"{name}, beta {beta} ...", file=sys.stderr)
        case = case_of(name, arguments.data, small=arguments.small)
        place = folder / str(number)
        place.mkdir()
        spec_file = write_spec(
            *(place, case, name, beta, warm_up + steps, arguments.threads),
            trl_checkpoints=arguments.trl_checkpoints,
            mixed_precision=arguments.mixed_precision,
        )
        results.append({"case": case.name, **compare(spec_file, arguments.trl_python, warm_up)})
    return {**head(arguments), "results": results}


def table(report: dict[str, Any]) -> str:
    """As Markdown."""
    lines = [
        f"| policy | completions, tokens | beta | {OURS}, s | {THEIRS}, s | ratio | peaks, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in report["results"]:
        times = " | ".join(cell(each["seconds"][name], 3) for name in (OURS, THEIRS))
        peaks = ", ".join(f"{each['peak_bytes'][name] / 1e6:.0f}" for name in (OURS, THEIRS))
        what = f"{each['case']} | {each['completions']}, {each['response_tokens']} | {each['beta']}"
        lines.append(f"| {what} | {times} | {cell(each['ratio'], 2)} | {peaks} |")
    versions = report["results"][0]["trl_versions"]
    lines += ["", f"{THEIRS}: " + ", ".join(f"{name} {number}" for name, number in versions.items())]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.grpo_step", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--trl-python", type=Path, default=Path("python"), help="the python of an environment with trl")
    add("--steps", type=int, default=20, help="of randomwalks that count; default: %(default)s")
    add(
        "--dialogue-steps",
        type=int,
        default=2,
        help="of the 30M GPT-2; 0 leaves it out; default: %(default)s",
    )
    add(
        "--trl-checkpoints",
        action="store_true",
        help="leave TRL's gradient checkpointing on, as it is by default",
    )
    add_precision_option(parser)
    add("--alone", type=Path, metavar="SPEC", help="only our side, one step for each line that comes in")
    add_policy_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 with the table on stdout, 1 after an error, told in a sentence on stderr."""
    arguments = _parser().parse_args(argv)
    if arguments.alone is not None:
        exit_with_parent(lambda: os._exit(1))
        take_our_steps(json.loads(arguments.alone.read_text(encoding="utf-8")))
        return 0
    return run_unbound(arguments, measure, table)


if __name__ == "__main__":
    sys.exit(main())

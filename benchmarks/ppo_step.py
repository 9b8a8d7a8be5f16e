"""Seconds of each phase of a PPO step, its peak memory, and what a shared-trunk reference saves.

    python -m benchmarks.ppo_step --data harmless-base.jsonl.gz

Randomwalks as trlX runs it: 140 walks from an SFT policy, in batches of 20, then 4 epochs of 2 updates, with
a full copy as reference. trlX updates on 100 and 40 walks, we on 70 and 70. A second run samples the 140 in
one batch. Then a GPT-2 shape of 30 million weights on 32 HH prompts, with responses as long as the answers
there (forced by `benchmarks/forced_lengths.py`, for a model without training does not end by itself), one
epoch of 2 updates in micro-batches of 8. Last, for that shape with 2 of 8 blocks trained, both references:
bytes that each holds beside the policy, and seconds that its log-probs take beyond the policy's own pass.

Every run has a process of its own. A step is what `trainer.step()` does; the first ones warm up. Peak memory
is that of the whole process, as it was taken of trlX.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.measuring import (
    ROOT,
    add_policy_options,
    add_precision_option,
    alone,
    cell,
    forget_peak,
    give_back_at_once,
    head,
    resident_bytes,
    run_unbound,
    spread,
    timed,
)
from benchmarks.policies import Case, case_of, forced_engine
from conch.cli import load_run_config
from conch.config import load
from conch.models.forward import ForwardInputs
from conch.models.freezing import freeze_layers
from conch.models.policy import response_logits
from conch.models.reference import FullCopyReference, Reference, SharedTrunkReference
from conch.trainers.ppo import PPORunConfig, PPOTrainer
from examples.randomwalks.sft_start import GRAPH_SEED, sft_start
from examples.randomwalks.task import RandomWalks

TRLX = {
    "step": 1.6,
    "rollout": 0.35,
    "logprobs": None,
    "score": 0.34,
    "experience": None,
    "update": 0.92,
    "peak_mb": 745,
}
"""Seconds and MB of trlX (torch 2.13, transformers 4.32) on two cores; its `score` holds the passes of policy
and reference, which are our `logprobs`."""

PHASES = ("rollout", "logprobs", "score", "experience", "update")
WALKS = {"walks-20": 20, "walks-140": 140}
REFERENCES = ("reference-shared", "reference-full")
_UNFROZEN = 2


def walk_trainer(folder: Path, start: Path, chunk_size: int, mixed_precision: str = "no") -> PPOTrainer:
    """The example's PPO, with its presets. start: the policy that it begins with."""
    config = load_run_config(
        PPORunConfig,
        [
            f"model.path={start}",
            f"train.run_dir={folder}/run",
            f"generation.chunk_size={chunk_size}",
            "train.total_steps=1000",
            f"train.mixed_precision={mixed_precision}",
            "tracking.rollouts=false",
        ],
        default_name="randomwalks/ppo_exact",
        config_dir=ROOT / "configs",
    )
    task = RandomWalks(GRAPH_SEED)
    return PPOTrainer(config, reward=task.reward, prompts=task.start_nodes)


def dialogue_trainer(folder: Path, case: Case, mixed_precision: str = "no") -> PPOTrainer:
    """PPO over half of the case's prompts; their responses have the lengths drawn."""
    rows = len(case.prompts) // 2  # 4 micro-batches
    settings = {
        "model": {"architecture": {"model_type": "gpt2"}},
        "generation": {"max_new_tokens": case.max_new_tokens, "chunk_size": case.chunk_size},
        "ppo": {
            "rollouts_per_step": rows,
            "epochs": 1,
            "minibatches": 2,
            "forward_batch_size": case.chunk_size,
        },
        "train": {
            **{"run_dir": f"{folder}/run", "total_steps": 1000, "eval_every": 0},
            "gradient_accumulation_steps": 2,
            "mixed_precision": mixed_precision,
        },
    }
    trainer = PPOTrainer(
        load(PPORunConfig, settings),
        reward=lambda samples, **_: [float(len(sample) % 7) for sample in samples],
        prompts=[prompt.text for prompt in case.prompts],
        model=case.model(),
        tokenizer=case.tokenizer,
    )
    trainer.sampler = forced_engine(trainer, case.end_at())
    return trainer


def phases_of(trainer: PPOTrainer, steps: int, warm_up: int) -> dict[str, Any]:
    """Seconds of each phase and of the step, step by step, and the process's peak."""
    columns: dict[str, list[float]] = {name: [] for name in ("step", *PHASES)}
    lengths = []
    try:
        for number in range(warm_up + steps):
            metrics, seconds = timed(trainer.step)
            if number >= warm_up:
                lengths.append(metrics["rollout/length_mean"])
                columns["step"].append(seconds)
                for name in PHASES:
                    columns[name].append(metrics[f"time/{name}_s"])
    finally:
        trainer.close()
    return {
        "seconds": {name: spread(column) for name, column in columns.items()},
        "response_tokens": median(lengths),
        "peak_bytes": resident_bytes("VmHWM"),
    }


def reference_cost(case: Case, *, shared: bool, rounds: int = 5) -> dict[str, Any]:
    """Bytes that a reference holds beside the policy, and seconds of both and of the policy's pass alone.

    A batch of 8 prompts with random responses; `_UNFROZEN` blocks train, whatever the reference. Its peak is
    its weights and whatever both passes take at once beyond what the policy's takes by itself.
    """
    lm = case.model()
    blocks = min(_UNFROZEN, case.model_config.n_layer)
    config = {"architecture": {"model_type": "gpt2"}, "num_layers_unfrozen": blocks}
    freeze_layers(lm, load(PPORunConfig, {"model": config}).model)
    inputs = _batch(case)
    reference = SharedTrunkReference(lm, blocks) if shared else FullCopyReference(lm)
    columns: dict[str, list[float]] = {"policy": [], "both": []}
    with torch.no_grad():
        for number in range(rounds + 1):
            alone_s = timed(lambda: response_logits(lm, inputs))[1]
            both_s = timed(lambda: _both(lm, reference, inputs))[1]
            if number:
                columns["policy"].append(alone_s)
                columns["both"].append(both_s)
        give_back_at_once()
        own = [_peak_of(lambda: response_logits(lm, inputs)) for _ in range(rounds)]
        together = [_peak_of(lambda: _both(lm, reference, inputs)) for _ in range(rounds)]
    weight_bytes = bytes_beside(reference, lm)
    added = [both - own for both, own in zip(columns["both"], columns["policy"], strict=True)]
    return {
        "weight_bytes": weight_bytes,
        "peak_bytes": weight_bytes + max(0, median(together) - median(own)),
        "seconds": {**{name: spread(column) for name, column in columns.items()}, "added": spread(added)},
    }


def _peak_of(run: Callable[[], object]) -> int:
    """Bytes that it takes at most beyond what was there before."""
    forget_peak()
    before = resident_bytes()
    run()
    return resident_bytes("VmHWM") - before


def _both(lm: PreTrainedModel, reference: Reference, inputs: ForwardInputs) -> None:
    with reference.recording():
        response_logits(lm, inputs)
    reference.logits(inputs)


def _batch(case: Case) -> ForwardInputs:
    prompts = [list(prompt.token_ids) for prompt in case.prompts[:8]]
    longest = max(map(len, prompts))
    num_response = max(case.expected[:8])
    ids = torch.full((len(prompts), longest + num_response), 2)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, length) in enumerate(zip(prompts, case.expected, strict=False)):
        ids[row, longest - len(prompt) : longest] = torch.tensor(prompt)
        mask[row, longest - len(prompt) : longest + length] = True
    return ForwardInputs(ids, mask, num_response)


def bytes_beside(reference: Reference, lm: nn.Module) -> int:
    """Bytes of the reference's weights and buffers that are not the policy's own."""

    def stored(module: nn.Module) -> dict[int, int]:
        tensors = [*module.parameters(), *module.buffers()]
        return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}

    own = stored(lm)
    found: dict[int, int] = {}
    for value in vars(reference).values():
        if isinstance(value, nn.Module):
            found |= stored(value)
    return sum(size for place, size in found.items() if place not in own)


def measure_alone(arguments: argparse.Namespace) -> dict[str, Any]:
    """What one of the processes says. --alone: what to measure, and a folder to work in."""
    what, folder = arguments.alone[0], Path(arguments.alone[1])
    if what in WALKS:
        start = _start(folder, arguments.small)
        trainer = walk_trainer(folder / what, start, WALKS[what], arguments.mixed_precision)
        return phases_of(trainer, arguments.steps, arguments.warm_up)
    case = case_of("dialogues", arguments.data, small=arguments.small)
    if what in REFERENCES:
        return {"case": case.name, **reference_cost(case, shared=what == "reference-shared")}
    # Long enough to need no warming up beyond one step.
    trainer = dialogue_trainer(folder / what, case, arguments.mixed_precision)
    return {"case": case.name, **phases_of(trainer, arguments.dialogue_steps, 1)}


def _start(folder: Path, small: bool) -> Path:
    """The policy after SFT, trained at the first call; small: random weights."""
    if not small:
        return sft_start(folder)
    case, start = case_of("walks", None), folder / "start"
    case.model().save_pretrained(start)
    case.tokenizer.save_pretrained(start)
    return start


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One process after the other."""
    told = ["--threads", str(arguments.threads), "--steps", str(arguments.steps)]
    told += ["--warm-up", str(arguments.warm_up), "--dialogue-steps", str(arguments.dialogue_steps)]
    told += ["--mixed-precision", arguments.mixed_precision]
    told += [] if arguments.data is None else ["--data", str(arguments.data)]
    told += ["--small"] if arguments.small else []
    _start(folder, arguments.small)
    found = {}
    for what in (*WALKS, "dialogues", *REFERENCES):
        print(f"{what} ...", file=sys.stderr)
        found[what] = alone("benchmarks.ppo_step", "--alone", what, str(folder), *told)
    ratios = {
        key: found["reference-shared"][key] / found["reference-full"][key]
        for key in ("weight_bytes", "peak_bytes")
    }
    return {
        **head(arguments),
        **found,
        "shared_over_full": ratios,
        "step_over_trlx": found["walks-20"]["seconds"]["step"]["median"] / float(TRLX["step"] or 0),
    }


def table(report: dict[str, Any]) -> str:
    """As Markdown."""
    names = ("step", *PHASES)
    lines = ["| PPO step, s | " + " | ".join(names) + " | peak, MB |", "|---" * (2 + len(names)) + "|"]
    cells = ["" if TRLX[name] is None else str(TRLX[name]) for name in (*names, "peak_mb")]
    lines.append("| trlX, randomwalks, batches of 20 | " + " | ".join(cells) + " |")
    for what, title in (
        ("walks-20", "randomwalks, batches of 20"),
        ("walks-140", "randomwalks, one batch"),
        ("dialogues", f"30M GPT-2, {report['dialogues']['case']}"),
    ):
        run = report[what]
        cells = [cell(run["seconds"][name], 3) for name in names]
        lines.append(f"| {title} | {' | '.join(cells)} | {run['peak_bytes'] / 1e6:.0f} |")
    lines += ["", f"batches of 20 over trlX: {report['step_over_trlx']:.2f}", ""]
    lines.append("| reference | weights beside the policy's, MB | its peak, MB | added s | policy alone, s |")
    lines.append("|---|---|---|---|---|")
    for what, title in zip(REFERENCES, ("shared trunk, 2 blocks", "full copy"), strict=True):
        run = report[what]
        sizes = f"{run['weight_bytes'] / 1e6:.1f} | {run['peak_bytes'] / 1e6:.1f}"
        seconds = f"{cell(run['seconds']['added'], 3)} | {cell(run['seconds']['policy'], 3)}"
        lines.append(f"| {title} | {sizes} | {seconds} |")
    ratios = report["shared_over_full"]
    lines.append(f"| shared over full | {ratios['weight_bytes']:.2f} | {ratios['peak_bytes']:.2f} | | |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ppo_step", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--steps", type=int, default=20, help="of randomwalks that count; default: %(default)s")
    add("--warm-up", type=int, default=3, help="steps before those; default: %(default)s")
    add("--dialogue-steps", type=int, default=2, help="of the 30M GPT-2 that count; default: %(default)s")
    add_precision_option(parser)
    add("--alone", nargs=2, metavar=("WHAT", "FOLDER"), help="only one measurement, in this process")
    add_policy_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 with the tables on stdout, 1 after an error, told in a sentence on stderr."""
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.alone is None:
        return run_unbound(arguments, measure, table)
    print(json.dumps(measure_alone(arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

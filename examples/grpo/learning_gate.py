"""GRPO learns from a verifier, shown in minutes on a laptop and without a download: from the checkout,

    python -m examples.grpo.learning_gate gsm8k train.seed=1
    python -m examples.grpo.learning_gate ifeval train.seed=1
    python -m examples.grpo.learning_gate gsm8k --async asynchronous.max_staleness=4

A small model learns from nothing, by SFT, solutions of word problems that are mostly half right, or answers
that follow few of their instructions; then GRPO, whose only reward is the verifier's, teaches it to do right.
Both are measured on held-out prompts, sampled at temperature 1. Overrides are those of
`configs/grpo_gates/<gate>/grpo.yaml`; with `--async` it samples in Ray while it trains, and asynchronous.yaml
beside that file is laid over it. The exit code is 1 where the gate is missed.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from conch.cli import compose, load_run_config, run_main
from conch.config import TrainConfig, load
from conch.config.algorithms.async_grpo import AsyncGRPORunConfig
from conch.config.algorithms.grpo import GRPORunConfig
from conch.config.algorithms.sft import SFTRunConfig
from conch.errors import ConfigError
from conch.runs.plots import read_metric
from conch.runs.reading import steps_of
from conch.runs.tracking import make_run_dir
from examples.byte_pairs import EOS, PAD
from examples.grpo import instructions, word_problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_ASYNC = "--async"
_WORDS = r" ?\d+| ?\p{L}+|\n| ?[^\s\p{L}\d]+|\s"
"""What may become one token: a number or a word with the space before it, marks."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """What a policy learns from and is measured on.

    texts: that the tokenizer is made of.
    samples: of SFT, with `prompt` and `completion`.
    prompts, held_out: of GRPO, with the columns that the verifier reads.
    """

    texts: list[str]
    samples: list[Row]
    prompts: list[Row]
    held_out: list[Row]


@dataclass(frozen=True)
class Gate:
    """What is to be learned, and how well.

    metric: of evaluations on held-out prompts.
    start: the most that the policy may reach that GRPO starts from.
    end: the least that GRPO must make of it.
    make_data: the same data in every run.
    """

    metric: str
    start: float
    end: float
    make_data: Callable[[], Data]


def word_problem_data() -> Data:
    """Word problems. The tokenizer is made of texts without their names, which are then spelled in letters:
    a held-out name has no token that the model has never seen."""
    half_right = word_problems.half_right_rows(20_000, seed=0)
    name = re.compile("|".join(word_problems.NAMES["train"]))
    questions = [name.sub("X", row["question"]) for row in half_right]

    def prompts(rows: Iterable[word_problems.Row]) -> list[Row]:
        return [{"prompt": f"{row['question']}\n", "answer": row["answer"]} for row in rows]

    return Data(
        texts=[*questions, *(row["answer"] for row in half_right)],
        samples=[{"prompt": row["prompt"], "completion": row["answer"]} for row in prompts(half_right)],
        prompts=prompts(word_problems.rows("train", 5000, seed=1)),
        held_out=prompts(word_problems.rows("held_out", 400, seed=3)),
    )


def instruction_data() -> Data:
    """Requests with instructions."""

    def prompts(rows: Iterable[Row]) -> list[Row]:
        return [{**row, "prompt": f"{row['prompt']}\n"} for row in rows]

    samples = prompts(instructions.half_followed_rows(12_000, seed=0))
    return Data(
        texts=[row["prompt"] + row["completion"] for row in samples],
        samples=samples,
        prompts=prompts(request.row for request in instructions.requests("train", 4000, seed=1)),
        held_out=prompts(request.row for request in instructions.requests("held_out", 300, seed=3)),
    )


GATES = {
    "gsm8k": Gate("eval/correct", start=0.35, end=0.80, make_data=word_problem_data),
    "ifeval": Gate("eval/inst_strict", start=0.40, end=0.85, make_data=instruction_data),
}


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte pairs of the texts' words and numbers, at most `vocab_size` of them."""
    from transformers import PreTrainedTokenizerFast  # loads torch, which help and mistyped keys do without

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left"
    )


def run(name: str, config: GRPORunConfig) -> dict[str, Any]:
    """SFT, then GRPO; returns what `summary.json` in the run's folder holds."""
    gate, run_dir = GATES[name], make_run_dir(config.train)
    data = gate.make_data()
    seconds = [time.perf_counter()]
    start = train_start(name, data, config.train, run_dir / "sft")
    seconds.append(time.perf_counter())
    train_policy(config, data, start, run_dir / "grpo")
    seconds.append(time.perf_counter())
    summary = {
        "gate": name,
        "seed": config.train.seed,
        "metric": gate.metric,
        "sampled": curve(run_dir / "grpo", gate.metric),
        "greedy": curve(run_dir / "grpo", f"{gate.metric}@do_sample=false"),
        "num_held_out": len(data.held_out),
        "seconds": {
            "sft": round(seconds[1] - seconds[0], 1),
            "grpo": round(seconds[2] - seconds[1], 1),
            "processor": round(time.process_time(), 1),
        },
    }
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def train_start(name: str, data: Data, train: TrainConfig, run_dir: Path) -> Path:
    """Train the policy that GRPO starts from, with `configs/grpo_gates/<name>/sft.yaml`; returns its
    checkpoint."""
    from conch.trainers.sft import SFTTrainer

    values = compose(f"grpo_gates/{name}/sft", [], CONFIGS)
    values["train"] |= {"seed": train.seed, "run_dir": str(run_dir)}
    config = load(SFTRunConfig, values)
    assert config.model.architecture is not None
    tokenizer = make_tokenizer(data.texts, config.model.architecture["vocab_size"])
    trainer = SFTTrainer(config, samples=data.samples, tokenizer=tokenizer)
    try:
        trainer.fit()
    finally:
        trainer.close()
    return next(iter(steps_of(run_dir).values()))


def train_policy(config: GRPORunConfig, data: Data, start: Path, run_dir: Path) -> None:
    """GRPO with the verifier that `config.reward` names, from the policy in `start`."""
    from conch.trainers.async_grpo import AsyncGRPOTrainer
    from conch.trainers.grpo import GRPOTrainer

    values = config.model_dump()
    values["model"]["path"] = str(start)
    values["train"]["run_dir"] = str(run_dir)
    inputs: dict[str, Any] = {"prompts": data.prompts, "eval_prompts": data.held_out}
    if isinstance(config, AsyncGRPORunConfig):
        trainer = AsyncGRPOTrainer(load(AsyncGRPORunConfig, values), **inputs)
    else:
        trainer = GRPOTrainer(load(GRPORunConfig, values), **inputs)
    try:
        trainer.fit()
    finally:
        trainer.close()


def curve(run_dir: Path, metric: str) -> dict[int, float]:
    """Step -> value of a metric."""
    return dict(zip(*read_metric(run_dir, metric), strict=True))


def report(summary: dict[str, Any]) -> bool:
    """Print the table for a person; returns whether the gate is met."""
    gate = GATES[summary["gate"]]
    held_out = f"{summary['num_held_out']} held-out prompts"
    print(f"\n{summary['gate']}, seed {summary['seed']}: {gate.metric} on {held_out}")
    print(f"{'':10}{'start':>8}{'end':>8}")
    for decoding in ("sampled", "greedy"):
        first, *_, last = summary[decoding].values()
        print(f"{decoding:10}{first:8.3f}{last:8.3f}")
    print(f"{'gate':10}{f'<= {gate.start:.2f}':>8}{f'>= {gate.end:.2f}':>8}   for the sampled one")
    print("seconds   " + ", ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items()))
    start, *_, end = summary["sampled"].values()
    return start <= gate.start and end >= gate.end


def main(argv: Sequence[str]) -> None:
    """Command line: the gate's name, then `key=value` overrides of its `grpo.yaml`.

    Raises:
        ConfigError: there is no such gate.
        SystemExit: 1 where the gate is missed.
    """
    name, *overrides = argv or [""]
    if name not in GATES:
        raise ConfigError(f"name a gate before the overrides: {' or '.join(GATES)}")
    overlaps = _ASYNC in overrides
    config = load_run_config(
        AsyncGRPORunConfig if overlaps else GRPORunConfig,
        [word for word in overrides if word != _ASYNC],
        default_name=f"grpo_gates/{name}/{'asynchronous' if overlaps else 'grpo'}",
        config_dir=CONFIGS,
    )
    if not report(run(name, config)):
        print("the gate is missed", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)

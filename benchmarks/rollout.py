"""Tokens a second of our engine against plain `transformers.generate`, and the memory that each takes.

    python -m benchmarks.rollout --data harmless-base.jsonl.gz

Two policies with random weights: that of randomwalks, 128 walks of 9 tokens, and a GPT-2 shape of 30 million
weights on 64 HH prompts (the last 256 tokens of each) with as many tokens as the answers there have (128 at
most). Models without training do not end by themselves: on both sides the same logits processor forbids the
end before a row's length and forces it there (`benchmarks/forced_lengths.py`).

The plain side is what a user would write: prompts in the order given, padded left, in batches of our chunk
size, `generate` with `output_scores`, log-probs of the samples by `compute_transition_scores`, cut at the
first end, decoded. Both give ids, log-probs and text. Tokens are those of the responses, ends included,
padding not. The sides take turns, in an order that changes with each round; every output is checked. Peak
memory is that of a process of its own that samples everything once, less what it held before.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2LMHeadModel, LogitsProcessorList

from benchmarks.measuring import (
    add_policy_options,
    alone,
    cell,
    forget_peak,
    head,
    resident_bytes,
    run_unbound,
    spread,
    timed,
)
from benchmarks.policies import Case, case_of
from conch.config import GenerationConfig
from conch.errors import ConchError
from conch.rollouts.hf.engine import HFEngine

OURS, PLAIN = "Conch", "transformers.generate"
CASES = ("walks", "dialogues")


@dataclass(frozen=True)
class Sampled:
    """One response. logprobs: of each id under the distribution it was drawn from."""

    ids: list[int]
    logprobs: list[float]
    text: str


Side = Callable[[], list[Sampled]]
"""Samples a response to every prompt of a case."""


def ours(case: Case, model: GPT2LMHeadModel) -> Side:
    """Our engine."""
    config = GenerationConfig(max_new_tokens=case.max_new_tokens, chunk_size=case.chunk_size)
    processors = [case.end_at()]
    engine = HFEngine(
        lambda: model, case.tokenizer, config, version=lambda: 0, processors=lambda: nullcontext(processors)
    )

    def sample() -> list[Sampled]:
        completions = [each.completion for chunk in engine.generate(case.prompts) for each in chunk]
        return [Sampled(list(each.token_ids), list(each.logprobs), each.text) for each in completions]

    return sample


def plain(case: Case, model: GPT2LMHeadModel) -> Side:
    """What a user would write instead."""
    size = case.chunk_size

    def sample() -> list[Sampled]:
        rows = [list(prompt.token_ids) for prompt in case.prompts]
        return [
            each for start in range(0, len(rows), size) for each in _plain(case, model, rows[start:][:size])
        ]

    return sample


@torch.no_grad()
def _plain(case: Case, model: Any, rows: list[list[int]]) -> list[Sampled]:
    tokenizer: Any = case.tokenizer
    batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    output: Any = model.generate(
        **batch,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=case.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        logits_processor=LogitsProcessorList([case.end_at()]),
        return_dict_in_generate=True,
        output_scores=True,
    )
    logprobs = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    responses = output.sequences[:, batch["input_ids"].shape[1] :].tolist()
    cut = [ids[: ids.index(case.eos_id) + 1] if case.eos_id in ids else ids for ids in responses]
    texts = tokenizer.batch_decode(cut, skip_special_tokens=True)
    kept = [row[: len(ids)] for row, ids in zip(logprobs.tolist(), cut, strict=True)]
    return [Sampled(*each) for each in zip(cut, kept, texts, strict=True)]


SIDES: dict[str, Callable[[Case, GPT2LMHeadModel], Side]] = {OURS: ours, PLAIN: plain}


def check(case: Case, name: str, sampled: Sequence[Sampled]) -> int:
    """The number of tokens.

    Raises:
        ConchError: a response has another length than it was to have, or no log-prob a token.
    """
    lengths = [len(each.ids) for each in sampled]
    if lengths != case.expected:
        raise ConchError(f"{name} gave {case.name} other lengths than drawn: {lengths} for {case.expected}")
    values = [value for each in sampled for value in each.logprobs]
    if len(values) != sum(lengths) or not all(-math.inf < value <= 0 for value in values):
        raise ConchError(f"{name} gave {case.name} log-probs that are none")
    return sum(lengths)


@dataclass
class Rates:
    """Tokens a second of one side, round by round, and what it took at its peak."""

    tokens_per_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def take_turns(case: Case, rounds: int) -> dict[str, Rates]:
    """Every side once a round, and once before."""
    model = case.model()
    sides = {name: make(case, model) for name, make in SIDES.items()}
    rates = {name: Rates() for name in sides}
    for number in range(rounds + 1):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            torch.manual_seed(number)
            sampled, seconds = timed(sides[name])
            rate = check(case, name, sampled) / seconds
            if number:  # the first one warms up
                rates[name].tokens_per_s.append(rate)
                print(f"{case.name}, round {number}: {name}: {rate:.0f} tokens/s", file=sys.stderr)
    return rates


def peak_of(case: Case, name: str) -> int:
    """Bytes that one pass over all prompts takes beyond what the process held before."""
    side = SIDES[name](case, case.model())
    forget_peak()
    before = resident_bytes()
    check(case, name, side())
    return resident_bytes("VmHWM") - before


def measure(arguments: argparse.Namespace, _folder: Path) -> dict[str, Any]:
    """Both cases: speed in this process, memory in others."""
    torch.set_num_threads(arguments.threads)
    results = []
    for name in CASES:
        case = case_of(name, arguments.data, small=arguments.small)
        rates = take_turns(case, arguments.rounds)
        for side, taken in rates.items():
            taken.peak_bytes = alone("benchmarks.rollout", *_told(arguments, name, side))["peak_bytes"]
        results.append(result(case, rates))
    return {**head(arguments), "results": results}


def _told(arguments: argparse.Namespace, case: str, side: str) -> list[str]:
    data = [] if arguments.data is None else ["--data", str(arguments.data)]
    small = ["--small"] if arguments.small else []
    return ["--alone", case, side, "--threads", str(arguments.threads), *data, *small]


def result(case: Case, rates: dict[str, Rates]) -> dict[str, Any]:
    """Figures of one case."""
    pairs = zip(rates[OURS].tokens_per_s, rates[PLAIN].tokens_per_s, strict=True)
    return {
        "case": case.name,
        "rows": len(case.prompts),
        "chunk_size": case.chunk_size,
        "prompt_tokens": sum(len(prompt.token_ids) for prompt in case.prompts),
        "response_tokens": sum(case.expected),
        "sides": {
            name: {"tokens_per_s": spread(taken.tokens_per_s), "peak_bytes": taken.peak_bytes}
            for name, taken in rates.items()
        },
        "ratio": spread([mine / its for mine, its in pairs]),
    }


def table(report: dict[str, Any]) -> str:
    """As Markdown."""
    lines = [
        "| policy | rows, chunk | response tokens | side | tokens/s | ratio | peak, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in report["results"]:
        for name, side in each["sides"].items():
            ratio = cell(each["ratio"], 2) if name == OURS else "1"
            what = f"{each['case']} | {each['rows']}, {each['chunk_size']} | {each['response_tokens']}"
            figures = f"{cell(side['tokens_per_s'], 0)} | {ratio} | {side['peak_bytes'] / 2**20:.0f}"
            lines.append(f"| {what} | {name} | {figures} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rollout", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--alone", nargs=2, metavar=("CASE", "SIDE"), help="only one side's peak memory")
    add_policy_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 with the table on stdout, 1 after an error, told in a sentence on stderr."""
    arguments = _parser().parse_args(argv)
    if arguments.alone is None:
        return run_unbound(arguments, measure, table)
    torch.set_num_threads(arguments.threads)
    case, side = arguments.alone
    peak = peak_of(case_of(case, arguments.data, small=arguments.small), side)
    print(json.dumps({"peak_bytes": peak}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

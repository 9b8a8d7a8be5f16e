"""Seconds to sample many completions of one long prompt, read once, and of as many different prompts.

    python -m benchmarks.best_of_n

A GPT-2 of 4 layers and width 256 with random weights, one prompt of 512 tokens, 64 completions of 16 tokens
in 8 slots. The other side samples the same from prompts of the same length that differ in one token: each is
read for its own completion, which is what an engine does that shares nothing. The sides take turns, in an
order that changes with each round; a ratio is of two turns of one round. Then the seconds of the estimator:
all n of the published study at once, from 12,600 samples.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.measuring import cell, head, run_unbound, spread, timed
from conch.config import GenerationConfig
from conch.errors import ConchError
from conch.evaluation.best_of_n import best_of_n_curve
from conch.rollouts.hf.engine import HFEngine
from conch.types import Prompt
from tests.tiny import char_tokenizer

SHARED, UNSHARED = "one prompt", "prompts that differ"
NS = [*(2**power for power in range(13)), 6144, 8192, 12500]


@dataclass(frozen=True)
class Shape:
    """What is sampled. Tokens: of the prompt, and of each completion."""

    prompt_tokens: int
    completions: int
    new_tokens: int
    slots: int
    layers: int
    width: int


FULL = Shape(prompt_tokens=512, completions=64, new_tokens=16, slots=8, layers=4, width=256)
SMALL = Shape(prompt_tokens=24, completions=12, new_tokens=3, slots=4, layers=1, width=32)
TOKENIZER = char_tokenizer("abcdefgh")


def model_of(shape: Shape) -> GPT2LMHeadModel:
    """Random weights."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 8192,
        "n_positions": shape.prompt_tokens + shape.new_tokens,
        "n_embd": shape.width,
        "n_layer": shape.layers,
        "n_head": max(1, shape.width // 64),
        "bos_token_id": None,
        "eos_token_id": TOKENIZER.eos_token_id,
    }
    return GPT2LMHeadModel(GPT2Config(**settings)).eval()


def prompts_of(shape: Shape, side: str) -> list[Prompt]:
    """One per completion: all equal, or each with a first token of its own."""
    rest = tuple(100 + number % 1000 for number in range(shape.prompt_tokens - 1))
    firsts = [0 if side == SHARED else number for number in range(shape.completions)]
    return [Prompt("", (20 + first, *rest)) for first in firsts]


def sample(shape: Shape, model: GPT2LMHeadModel, side: str) -> int:
    """Tokens that were sampled.

    Raises:
        ConchError: a completion is missing.
    """
    config = GenerationConfig(max_new_tokens=shape.new_tokens, chunk_size=shape.slots)
    engine = HFEngine(lambda: model, TOKENIZER, config, version=lambda: 0)
    completions = [
        rollout.completion for chunk in engine.generate(prompts_of(shape, side)) for rollout in chunk
    ]
    if len(completions) != shape.completions:
        raise ConchError(f"{side}: {len(completions)} of {shape.completions} completions")
    return sum(len(completion.token_ids) for completion in completions)


def measure(arguments: argparse.Namespace, _folder: Path) -> dict[str, Any]:
    """Both sides in turn, then the estimator."""
    torch.set_num_threads(arguments.threads)
    shape = SMALL if arguments.small else FULL
    model = model_of(shape)
    seconds: dict[str, list[float]] = {SHARED: [], UNSHARED: []}
    for number in range(arguments.rounds + 1):
        for side in list(seconds)[:: 1 if number % 2 == 0 else -1]:
            torch.manual_seed(number)
            _, taken = timed(lambda side=side: sample(shape, model, side))
            if number:  # the first one warms up
                seconds[side].append(taken)
                print(f"round {number}: {side}: {taken:.2f} s", file=sys.stderr)
    ratios = [one / other for one, other in zip(seconds[SHARED], seconds[UNSHARED], strict=True)]
    draws = np.random.default_rng(0)
    proxy, gold = draws.normal(size=NS[-1] + 100), draws.normal(size=NS[-1] + 100)
    _, estimator_s = timed(lambda: best_of_n_curve(proxy, gold, NS))
    return {
        **head(arguments),
        "shape": vars(shape),
        "seconds": {side: spread(values) for side, values in seconds.items()},
        "ratio": spread(ratios),
        "estimator_s": estimator_s,
    }


def table(report: dict[str, Any]) -> str:
    """As Markdown."""
    shape = report["shape"]
    what = f"{shape['completions']} completions behind {shape['prompt_tokens']} prompt tokens"
    one, other = (cell(report["seconds"][side], 2) for side in (SHARED, UNSHARED))
    return "\n".join(
        [
            f"| | {SHARED}, s | {UNSHARED}, s | ratio |",
            "|---|---|---|---|",
            f"| {what} | {one} | {other} | {cell(report['ratio'], 2)} |",
            "",
            f"estimator, N = 12,600, {len(NS)} values of n: {report['estimator_s']:.3f} s",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 with the table on stdout, 1 after an error, told in a sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.best_of_n", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    add = parser.add_argument
    add("--threads", type=int, default=1, help="of torch; default: %(default)s")
    add("--json", type=Path, help="also write every figure to this file")
    add("--small", action="store_true", help="tiny shapes and few rows, to try the script itself")
    return run_unbound(parser.parse_args(argv), measure, table)


if __name__ == "__main__":
    sys.exit(main())

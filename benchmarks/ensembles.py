"""What an ensemble of five costs: five calls one after another, one call to an ensemble that asks its
members, and one to an ensemble that holds them and scores short batches in one pass.

    python -m benchmarks.ensembles

Everything, server and client, runs on one core. The members are random GPT-NeoX classifiers of one shape; the
ways take turns, call by call, so that a machine that is busy for a while is busy for all, and each ratio is
to the five calls of the same round. All ways' scores are compared first. Once through Triton, once in this
process, where there is no server between.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tritonclient.grpc as triton
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from benchmarks.measuring import cell, head, on_core, require_cores, run_unbound, spread, timed
from conch.converters.ensemble import to_ensemble
from conch.converters.to_triton import to_triton
from conch.converters.triton_models.reward_model import Scorer
from conch.converters.triton_models.stacked_model import StackedScorer
from conch.errors import ConchError
from conch.serving.server.server import TritonServer
from conch.store.store import read_model
from conch.triton.channel import open_client

MEMBERS = 5
WORDS = 2_000
SHAPES = {"2 layers of 64": (2, 64), "6 layers of 128": (6, 128), "6 layers of 512": (6, 512)}
"""Name -> layers and width: a laboratory's, Pythia-14M's and Pythia-70M's, without their vocabularies."""
CASES = ((1, 8), (1, 16), (1, 32), (4, 16), (8, 16), (16, 16), (32, 16), (1, 128), (16, 64))
"""Texts of a request, and tokens of each."""
FIVE, ASKED, HELD = "five calls", "one call, members asked", "one call, members held"
ALONE, PASS, APART = "five models", "held, in one pass", "held, one after another"
SERVED, IN_PROCESS = (FIVE, ASKED, HELD), (ALONE, PASS, APART)
_TOLERANCE = 1e-4
_LONGEST_S = 6.0


@dataclass(slots=True)
class Way:
    """One way to score texts by all members: member scores [texts, members]; seconds, round by round."""

    name: str
    score: Callable[[list[str]], np.ndarray]
    seconds: list[float] = field(default_factory=list)


def texts_of(rows: int, tokens: int) -> list[str]:
    """Texts of so many words, each a token; no two alike."""
    generator = np.random.default_rng(rows * 1000 + tokens)
    return [" ".join(f"w{word}" for word in generator.integers(WORDS, size=tokens)) for _ in range(rows)]


def write_member(folder: Path, layers: int, width: int, seed: int) -> Path:
    """Save a random classifier with its tokenizer."""
    vocabulary = {f"w{number}": number for number in range(WORDS)} | {"<pad>": WORDS, "<unk>": WORDS + 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(
        folder
    )
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "gpt_neox",
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(2, width // 64),
        intermediate_size=4 * width,
        max_position_embeddings=512,
        pad_token_id=WORDS,
        bos_token_id=None,
        eos_token_id=None,
        num_labels=1,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def served_ways(server: TritonServer, client: Any, names: Sequence[str]) -> list[Way]:
    """The ways through a server: five calls, and one to each ensemble."""

    def call(model: str, texts: list[str], output: str) -> np.ndarray:
        tensor = triton.InferInput("text", [len(texts), 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[text.encode()] for text in texts], dtype=np.object_))
        reply = client.infer(model, [tensor], outputs=[triton.InferRequestedOutput(output)])
        return reply.as_numpy(output)

    return [
        Way(FIVE, lambda texts: np.concatenate([call(name, texts, "rewards") for name in names], axis=1)),
        Way(ASKED, lambda texts: call("asked", texts, "member_rewards")),
        Way(HELD, lambda texts: call("held", texts, "member_rewards")),
    ]


def ways_in_process(store: Path, names: Sequence[str]) -> list[Way]:
    """The ways without a server, by the code that runs in it."""
    members = [Scorer(read_model(store, name).path, "cpu") for name in names]
    held = StackedScorer(read_model(store, "held").path, "cpu")

    def encoded(texts: list[str]) -> Any:
        return held.rows_from_texts([text.encode() for text in texts])

    def alone(texts: list[str]) -> np.ndarray:
        raw = [text.encode() for text in texts]
        return np.concatenate(
            [member.score(member.rows_from_texts(raw)).rewards for member in members], axis=1
        )

    return [
        Way(ALONE, alone),
        Way(PASS, lambda texts: held.score_in_one_pass(encoded(texts))),
        Way(APART, lambda texts: np.array(held.score_apart(encoded(texts)))),
    ]


def take_turns(ways: Sequence[Way], texts: list[str], rounds: int) -> list[dict[str, Any]]:
    """Time all ways in turn, after a round that warms up; milliseconds, and the share of the first way's.

    rounds: most of them; less where they would take more than `_LONGEST_S`, but 5 at least.

    Raises:
        ConchError: their scores differ.
    """
    for way in ways:
        way.score(texts)
    scores, took_s = timed(lambda: [way.score(texts) for way in ways])
    rounds = max(5, min(rounds, int(_LONGEST_S / took_s)))
    for way, found in zip(ways, scores, strict=True):
        if not np.abs(found - scores[0]).max() <= _TOLERANCE:  # so that NaN is wrong
            raise ConchError(f"{way.name} scores other than {ways[0].name}: there is nothing to compare")
    for way in ways:
        way.seconds = []
    for _ in range(rounds):
        for way in ways:
            way.seconds.append(timed(lambda way=way: way.score(texts))[1])
    first = ways[0].seconds
    return [
        {
            "way": way.name,
            "ms": spread([1000 * seconds for seconds in way.seconds]),
            "over": spread([mine / its for mine, its in zip(way.seconds, first, strict=True)]),
        }
        for way in ways
    ]


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Convert, serve and time each shape."""
    torch.set_num_threads(1)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    require_cores(arguments.core)
    results = []
    with on_core(arguments.core):
        for shape in arguments.shapes:
            results += _measure_shape(shape, folder / f"shape-{len(results)}", arguments.rounds)
    return {**head(arguments), "results": results}


def _measure_shape(shape: str, folder: Path, rounds: int) -> list[dict[str, Any]]:
    layers, width = SHAPES[shape]
    store, names = folder / "store", [f"m{seed}" for seed in range(MEMBERS)]
    for seed, name in enumerate(names):
        to_triton(write_member(folder / name, layers, width, seed), name=name, model_store=store)
    for name, stacked in (("asked", False), ("held", True)):
        to_ensemble(names, name=name, objective="mean", stacked=stacked, model_store=store)
    results = []
    with TritonServer(store, ["asked", "held"]) as server, open_client(server.url, server.access) as client:
        ways = served_ways(server, client, names), ways_in_process(store, names)
        for rows, tokens in CASES:
            for where, these in zip(("served", "in process"), ways, strict=True):
                figures = take_turns(these, texts_of(rows, tokens), rounds)
                results.append(
                    {"shape": shape, "rows": rows, "tokens": tokens, "where": where, "ways": figures}
                )
                print(f"{shape}, {rows} x {tokens}, {where}: done", file=sys.stderr)
    return results


def table(report: dict[str, Any]) -> str:
    """The report as tables of Markdown: milliseconds of five calls, and the others' share of these."""
    lines = [f"{report['machine']['cpu']}, {report['date']}"]
    for where, names in (("served", SERVED), ("in process", IN_PROCESS)):
        lines += ["", f"| {where}: shape | texts x tokens | {names[0]}, ms | {names[1]} | {names[2]} |"]
        lines.append("|---|---|---|---|---|")
        for result in report["results"]:
            if result["where"] == where:
                first, *others = result["ways"]
                cells = [cell(first["ms"], 1), *(cell(way["over"], 2) for way in others)]
                size = f"{result['rows']} x {result['tokens']}"
                lines.append(f"| {result['shape']} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.ensembles", description=__doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="default: all")
    add("--rounds", type=int, default=15, help="calls of each way, in turn; default: %(default)s")
    add("--core", type=int, default=0, help="that everything runs on; default: %(default)s")
    add("--json", type=Path, help="also write every figure to this file")
    return run_unbound(parser.parse_args(), measure, table)


if __name__ == "__main__":
    sys.exit(main())

"""What queue delay, instances and warm-up do to a served reward model: the figures of docs/serving.md.

    taskset -c 0,1 python -m benchmarks.serving_settings

A random GPT-2 (4 layers, width 256) is converted and served by the bundled server, on one thread. Callers
send one text of 64 tokens at a time. Settings take turns, `--rounds` times; medians are printed as JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import tritonclient.grpc as triton
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

from conch.converters.to_triton import to_triton
from conch.serving.server.server import TritonServer
from conch.triton.channel import Access, open_client

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT = (LETTERS * 3)[:63]
NAME = "measured"


def main() -> None:
    """Print one JSON object for each setting and number of callers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=200, help="of each caller; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "store"
        to_triton(checkpoint(Path(scratch) / "checkpoint"), name=NAME, model_store=store)
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(arguments.rounds):
            for delay_us, instances in ((0, 1), (1000, 1), (3000, 1), (0, 2)):
                for callers, measured in batching(store, delay_us, instances, arguments.requests):
                    found.setdefault(
                        f"delay {delay_us} us, {instances} instances, {callers} callers", []
                    ).append(measured)
            for warm in (False, True):
                found.setdefault(f"swap, {'with' if warm else 'without'} warm-up", []).append(
                    first_after_load(store, warm)
                )
        for what, rounds in found.items():
            medians = {key: round(statistics.median(r[key] for r in rounds), 3) for key in rounds[0]}
            print(json.dumps({"what": what, **medians}), flush=True)


def checkpoint(folder: Path) -> Path:
    """A random classifier with one token a letter."""
    torch.manual_seed(0)
    vocabulary = {token: index for index, token in enumerate([*LETTERS, "<pad>", "<eos>", "<unk>"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    shape = GPT2Config(
        vocab_size=len(vocabulary), n_layer=4, n_embd=256, n_head=4, n_positions=128,
        pad_token_id=vocabulary["<pad>"], eos_token_id=vocabulary["<eos>"], bos_token_id=None,
    )  # fmt: skip
    shape.num_labels = 1
    GPT2ForSequenceClassification(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def changed(store: Path, change: dict[str, str]) -> Iterator[Path]:
    """A copy of the store whose configurations have every pattern of `change` replaced."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(store, Path(scratch) / "store"))
        for config in (copy / NAME).rglob("*.pbtxt"):
            text = config.read_text()
            for pattern, new in change.items():
                text, count = re.subn(pattern, new, text)
                assert count == 1, f"{pattern} is not in {config}"
            config.write_text(text)
        yield copy


def batching(
    store: Path, delay_us: int, instances: int, requests: int
) -> Iterator[tuple[int, dict[str, float]]]:
    """(callers, figures) for 1 and 8 callers."""
    delay = r"dynamic_batching \{[^}]*\}"
    change = {
        delay: f"dynamic_batching {{ max_queue_delay_microseconds: {delay_us} }}",
        r"(instance_group \{\s*)count: 1": rf"\g<1>count: {instances}",
    }
    with changed(store, change) as copy, TritonServer(copy, [NAME]) as server:
        for callers in (1, 8):
            calls(server.url, callers, requests // 4)  # the first ones are slow
            yield callers, calls(server.url, callers, requests)


def first_after_load(store: Path, warm: bool) -> dict[str, float]:
    """Milliseconds of the first request to a version that was just loaded, and of later ones."""
    without = {} if warm else {r"(?s)model_warmup \{.*\Z": ""}
    with (
        changed(store, without) as copy,
        TritonServer(copy, [NAME]) as server,
        open_client(server.url, server.access) as client,
    ):
        client.load_model(NAME)
        times = [timed(client) for _ in range(50)]
    return {"first_ms": times[0], "later_ms": statistics.median(times[10:])}


def calls(url: str, callers: int, requests: int) -> dict[str, float]:
    """Score `requests` texts from each of `callers` threads."""

    def work(count: int) -> list[float]:
        with open_client(url, Access()) as client:
            return [timed(client) for _ in range(count)]

    with open_client(url, Access()) as client, ThreadPoolExecutor(callers) as pool:
        before, started = executions(client), time.perf_counter()
        times = [ms for part in pool.map(work, [requests] * callers) for ms in part]
        seconds = time.perf_counter() - started
        batches = executions(client) - before
    return {
        "per_s": len(times) / seconds,
        "p50_ms": statistics.median(times),
        "p99_ms": float(np.quantile(times, 0.99)),
        "mean_batch": len(times) / batches,
    }


def timed(client: triton.InferenceServerClient) -> float:
    """Milliseconds of one request."""
    tensor = triton.InferInput("text", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[TEXT.encode()]], dtype=np.object_))
    started = time.perf_counter()
    client.infer(NAME, [tensor], client_timeout=60)
    return (time.perf_counter() - started) * 1e3


def executions(client: triton.InferenceServerClient) -> int:
    """Batches that the model has scored."""
    return sum(entry.execution_count for entry in client.get_inference_statistics(NAME).model_stats)  # pyright: ignore


if __name__ == "__main__":
    main()
